"""Documents of several tables: whatever changes, each index equals what one SQL statement over the tables says."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server]

TABLES = [
    "CREATE SCHEMA crm",
    "CREATE TABLE crm.customers (id int PRIMARY KEY, name text, tier text)",
    "CREATE TABLE users (id int PRIMARY KEY, name text, boss_id int)",
    "CREATE TABLE tickets (id bigint PRIMARY KEY, subject text, customer_id int, parent_id bigint)",
    "CREATE TABLE comments (id int PRIMARY KEY, ticket_id int, author_id int, body text, created int NOT NULL,"
    " hidden bool NOT NULL DEFAULT false)",
    "ALTER TABLE comments REPLICA IDENTITY FULL",
    "CREATE TABLE tags (id int PRIMARY KEY, name text)",
    "CREATE TABLE ticket_tags (ticket_id bigint REFERENCES tickets ON DELETE CASCADE ON UPDATE CASCADE, tag_id int,"
    " PRIMARY KEY (ticket_id, tag_id))",
    "ALTER TABLE tickets REPLICA IDENTITY FULL",
    "INSERT INTO crm.customers SELECT i, 'customer ' || i, 'tier ' || i % 2 FROM generate_series(1, 5) i",
    "INSERT INTO users SELECT i, 'user ' || i, nullif(i - 1, 0) FROM generate_series(1, 4) i",
    "INSERT INTO tickets SELECT i, 'subject ' || i, 1 + i % 5, nullif(i / 3, 0) FROM generate_series(1, 20) i",
    "INSERT INTO comments"
    " SELECT i, 1 + i % 20, 1 + i % 4, 'body ' || i, i % 7, i % 9 = 0 FROM generate_series(1, 70) i",
    "INSERT INTO tags SELECT i, 'tag ' || i FROM generate_series(1, 6) i",
    "INSERT INTO ticket_tags SELECT 1 + i % 20, 1 + i % 6 FROM generate_series(1, 30) i ON CONFLICT DO NOTHING",
    # What the documents are to be, in SQL of our own.
    """
    CREATE VIEW tickets_expected AS SELECT t.*,
        (SELECT name FROM crm.customers WHERE id = t.customer_id) AS "customer.name",
        (SELECT tier FROM crm.customers WHERE id = t.customer_id) AS "customer.tier",
        (SELECT string_agg(line, E'\n' ORDER BY created DESC, id) FROM (
            SELECT concat('<', u.name, '> ', c.body) AS line, c.created, c.id
            FROM comments c LEFT JOIN users u ON u.id = c.author_id
            WHERE c.ticket_id = t.id AND NOT c.hidden ORDER BY c.created DESC, c.id LIMIT 3) AS newest) AS comments,
        (SELECT string_agg(g.name, ', ' ORDER BY g.name, g.id) FROM ticket_tags x JOIN tags g ON g.id = x.tag_id
            WHERE x.ticket_id = t.id) AS tags,
        (SELECT string_agg(k.subject, '; ' ORDER BY k.id) FROM tickets k WHERE k.parent_id = t.id) AS children
    FROM tickets t
    """,
]

RELATED = """
[indexes.NAME.related.customer]
table = "crm.customers"
on = { id = "customer_id" }
[indexes.NAME.related.comments]
table = "comments"
on = { ticket_id = "id" }
text = "<{author.name}> {body}"
order_by = "created DESC"
limit = 3
where = "NOT hidden"
[indexes.NAME.related.comments.related.author]
table = "users"
on = { id = "author_id" }
[indexes.NAME.related.tags]
table = "tags"
on = { id = "tag_id" }
via = { table = "ticket_tags", on = { ticket_id = "id" } }
text = "{name}"
separator = ", "
order_by = "name"
[indexes.NAME.related.children]
table = "tickets"
on = { parent_id = "id" }
text = "{subject}"
separator = "; "
"""

TEXT = "{subject} ({tags})\n{comments}\nfrom {customer.name}, above {children}"


@pytest.fixture(scope="module")
def tickets(make_scene: MakeScene) -> Scene:
    scene = make_scene(
        TABLES,
        {
            "tickets": Followed("tickets", TEXT, columns=("customer.tier", "parent_id"), more=RELATED),
            "roots": Followed(
                "tickets", TEXT, columns=("parent_id",), more='where = "parent_id IS NULL AND id <> 3"\n' + RELATED
            ),
            "comments": Followed("comments", "{body}"),
        },
        options="streaming = true",
    )
    scene.oracle_reads("tickets", "tickets_expected")
    scene.oracle_reads("roots", "tickets_expected")
    return scene


CHANGES: dict[str, list[str]] = {
    "a comment is added": ["INSERT INTO comments VALUES (1000, 3, 2, 'new', 100)"],
    "a comment is edited": ["UPDATE comments SET body = 'edited' WHERE id = 5"],
    "a comment is hidden": ["UPDATE comments SET hidden = true WHERE id = 6"],
    "a comment is deleted": ["DELETE FROM comments WHERE id = 7"],
    "a comment moves": ["UPDATE comments SET ticket_id = 12 WHERE id = 8"],
    "a comment belongs nowhere": ["UPDATE comments SET ticket_id = NULL WHERE id = 10"],
    "a comment's key changes": ["UPDATE comments SET id = 2001 WHERE id = 11"],
    "an author is renamed": ["UPDATE users SET name = 'someone else' WHERE id = 2"],
    "an author goes": ["DELETE FROM users WHERE id = 4"],
    "a comment's author changes": ["UPDATE comments SET author_id = 1 WHERE id = 13"],
    "a customer is renamed": ["UPDATE crm.customers SET name = 'renamed' WHERE id = 3"],
    "a carried value changes": ["UPDATE crm.customers SET tier = 'gold' WHERE id = 2"],
    "a customer's key changes": ["UPDATE crm.customers SET id = 77 WHERE id = 5"],
    "a ticket changes its customer": ["UPDATE tickets SET customer_id = 1 WHERE id = 9"],
    "a tag is renamed": ["UPDATE tags SET name = 'urgent' WHERE id = 1"],
    "a tag is put on": ["INSERT INTO ticket_tags VALUES (4, 1), (4, 2) ON CONFLICT DO NOTHING"],
    "a tag is taken off": ["DELETE FROM ticket_tags WHERE tag_id = 3"],
    "a tag moves": ["UPDATE ticket_tags SET ticket_id = 20 WHERE (ticket_id, tag_id) = (SELECT ticket_id, tag_id FROM"
                    " ticket_tags x WHERE NOT EXISTS (SELECT FROM ticket_tags y WHERE y.ticket_id = 20 AND y.tag_id ="
                    " x.tag_id) LIMIT 1)"],
    "a child's subject changes": ["UPDATE tickets SET subject = 'child' WHERE id = 6"],
    "a child moves": ["UPDATE tickets SET parent_id = 2 WHERE id = 12"],
    "a ticket goes with its tags": ["DELETE FROM tickets WHERE id = 15"],
    "a ticket's key changes": ["UPDATE tickets SET id = 99 WHERE id = 16"],
    "a comment comes before its ticket": ["INSERT INTO comments VALUES (1001, 500, 1, 'early', 3)",
                                          "INSERT INTO tickets VALUES (500, 'late', 1)"],
    "everything of a ticket comes at once": [
        "INSERT INTO comments VALUES (1002, 501, 1, 'early', 3); INSERT INTO crm.customers VALUES (60, 'new', 'new');"
        " INSERT INTO ticket_tags SELECT 1, 1 WHERE false; INSERT INTO tickets VALUES (501, 'late', 60)"],
    "nothing but a carried column of the parent changes": ["UPDATE tickets SET parent_id = parent_id WHERE id = 1"],
    "all comments change": ["UPDATE comments SET body = body || '!'"],
    "all comments are rewritten twice": ["UPDATE comments SET body = 'a'; UPDATE comments SET body = 'b' || id"],
    "all comments go": ["TRUNCATE comments"],
    "all tickets go": ["TRUNCATE tickets CASCADE"],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_each_document_is_what_its_tables_say_once(tickets: Scene, change: str) -> None:
    before = rows(tickets)
    for statements in CHANGES[change]:
        tickets.at_once(*statements.split("; "))

    tickets.settle()
    settled(tickets)

    restore(tickets, before)


def test_verify_finds_documents_of_several_tables_equal_and_a_stale_one_among_them(tickets: Scene) -> None:
    tickets.settle()
    settled(tickets)
    equal = tickets.command("verify", "tickets", "--json")
    assert json.loads(equal.stdout)["equal"] is True, equal.stdout + equal.stderr

    tickets.pipeline.target.execute("UPDATE cdcsync.tickets_chunks SET document_hash = '\\x00' WHERE id = 3")
    different = tickets.command("verify", "tickets", "--repair", "--json")

    assert json.loads(different.stdout)["differences"] == {"stale": 1}, different.stdout + different.stderr
    settled(tickets)


def test_a_carried_value_of_a_related_row_filters_searches(tickets: Scene) -> None:
    found = tickets.command(
        "search", "tickets", "subject", "-k", "50", "--json", "--where", "\"customer.tier\" = 'tier 1'"
    )

    hits = json.loads(found.stdout)
    expected = tickets.pipeline.source.execute(
        """SELECT count(*) FROM tickets_expected WHERE "customer.tier" = 'tier 1'"""
    ).fetchone()
    assert (len(hits["hits"] if isinstance(hits, dict) else hits),) == expected, found.stdout + found.stderr


def test_a_replay_and_its_dry_run_read_related_rows(tickets: Scene) -> None:
    dry = tickets.command("replay", "tickets", "--dry-run", "--json")
    assert json.loads(dry.stdout)["changed"] == 0, dry.stdout + dry.stderr

    done = tickets.command("replay", "tickets", "--key", "4", "--key", "9999")

    assert done.returncode == 0, done.stdout + done.stderr
    settled(tickets)


def test_a_row_that_takes_part_in_more_documents_than_a_batch_takes_is_a_request(tickets: Scene) -> None:
    before = rows(tickets)
    tickets.execute("INSERT INTO tickets SELECT i, 'many ' || i, 4 FROM generate_series(10001, 11500) i")
    tickets.settle()
    settled(tickets)

    tickets.execute("UPDATE crm.customers SET name = 'of many' WHERE id = 4")
    tickets.pipeline.reach("tickets")  # which waits for the request, too

    assert tickets.pipeline.target.execute(
        "SELECT state FROM cdcsync.backfills WHERE kind = 'related' AND NOT keyed"
        " AND index_name = 'tickets' AND through = 'customer'"
    ).fetchall() == [("done",)]
    settled(tickets)
    restore(tickets, before)


@pytest.mark.parametrize(
    ("alter", "back"),
    [
        ("ALTER TABLE users RENAME COLUMN name TO nom", "ALTER TABLE users RENAME COLUMN nom TO name"),
        ("ALTER TABLE comments REPLICA IDENTITY DEFAULT", "ALTER TABLE comments REPLICA IDENTITY FULL"),
        ("ALTER TABLE tags RENAME TO labels", "ALTER TABLE labels RENAME TO tags"),
        ("ALTER PUBLICATION cdcsync DROP TABLE crm.customers", "ALTER PUBLICATION cdcsync ADD TABLE crm.customers"),
    ],
    ids=str,
)
def test_an_index_is_paused_while_a_related_table_is_not_fit_and_the_other_goes_on(
    tickets: Scene, alter: str, back: str
) -> None:
    tickets.execute(alter)
    if "PUBLICATION" in alter:
        # Whoever may add the table is the worker: it does.
        tickets.heals()
        return
    assert tickets.paused("tickets")
    tickets.execute("INSERT INTO comments VALUES (3000, 1, 1, 'meanwhile', 1)")
    until(partial(tickets.equal, "comments"), tickets.pipeline.tail)

    tickets.execute(back)

    tickets.heals()
    tickets.execute("DELETE FROM comments WHERE id = 3000")
    settled(tickets)


def test_values_of_a_related_table_that_change_without_a_row_event_are_read_again(tickets: Scene) -> None:
    tickets.at_once("DROP VIEW tickets_expected", "ALTER TABLE tags ALTER name TYPE text USING upper(name)", TABLES[-1])

    tickets.heals()


Rows = dict[str, list[tuple[object, ...]]]
ALL = ("crm.customers", "users", "tickets", "comments", "tags", "ticket_tags")


def rows(scene: Scene) -> Rows:
    return {table: scene.pipeline.source.execute(f"SELECT * FROM {table}").fetchall() for table in ALL}


def restore(scene: Scene, before: Rows) -> None:
    """Put the tables' rows back, in one transaction, which is one more case."""
    with scene.pipeline.source.transaction():
        for table in reversed(ALL):
            scene.pipeline.source.execute(f"DELETE FROM {table}")
        for table, found in before.items():
            for row in found:
                places = ", ".join(["%s"] * len(row))
                scene.pipeline.source.execute(f"INSERT INTO {table} VALUES ({places})", row)
    scene.settle()
    settled(scene)


def settled(scene: Scene) -> None:
    """Fail unless the indexes get to equal their tables without being read again."""
    for name in ("tickets", "roots", "comments"):
        assert scene.state(name)[0] == "live", scene.state(name)
        until(partial(scene.equal, name), lambda: f"{scene.pipeline.difference}; {scene.pipeline.tail()}")


BOOKS = [
    "CREATE TABLE books (id int PRIMARY KEY, title text)",
    "CREATE TABLE reviews (id int PRIMARY KEY, book_id int, body text)",
    "ALTER TABLE reviews REPLICA IDENTITY FULL",
    "INSERT INTO books VALUES (3, 'third')",
    """
    CREATE VIEW books_expected AS SELECT b.*,
        (SELECT string_agg(body, ' ' ORDER BY id) FROM reviews WHERE book_id = b.id) AS reviews FROM books b
    """,
]

REVIEWS = """
[indexes.NAME.related.reviews]
table = "reviews"
on = { book_id = "id" }
text = "{body}"
separator = " "
"""


@pytest.mark.parametrize(
    "later",
    [
        ["INSERT INTO reviews VALUES (2, 3, 'seen')"],
        ["TRUNCATE books", "INSERT INTO books VALUES (3, 'third again')"],
    ],
    ids=["touched again", "truncated and inserted again"],
)
def test_a_related_row_that_waits_for_a_standby_is_not_forgotten_for_a_later_change(
    make_scene: MakeScene, make_cluster: Callable[..., Cluster], later: list[str]
) -> None:
    """Both come in one batch, and snapshots see the later one first."""
    cluster = make_cluster(settings={"synchronous_standby_names": "nobody", "synchronous_commit": "local"})
    scene = make_scene(BOOKS, {"books": Followed("books", "{title} {reviews}", more=REVIEWS)}, source=cluster.dsn())
    scene.oracle_reads("books", "books_expected")
    scene.pipeline.stop(scene.pipeline.processes[-1])
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin, psycopg.connect(cluster.dsn()) as waiting:
        waiting.execute("SET synchronous_commit = on")
        waiting.execute("INSERT INTO reviews VALUES (1, 3, 'hidden')")
        waiting.pgconn.send_query(b"COMMIT")
        until(
            lambda: admin.execute("SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchone() is not None,
            "the commit to wait",
        )
        scene.execute(*later)
        scene.pipeline.start()
        scene.pipeline.event("reread_waits")
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        admin.execute("SELECT pg_reload_conf()")
        while waiting.pgconn.get_result() is not None:
            pass

    scene.follows("books")
