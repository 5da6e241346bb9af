"""Documents of several tables: whatever changes, each index equals what one SQL statement over the tables says."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.clusters import OTHER_VERSIONS
from tests.support.related import TABLES, make_orders, make_tickets, restore, rows, settled
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server]

SceneOf = Callable[..., Scene]


@pytest.fixture(scope="module")
def scene_of(make_scene: MakeScene) -> Iterator[SceneOf]:
    """Returns the scene of a name, with a source of the tests' own version or another one; each is made once."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def made(name: str, version: int | None = None) -> Scene:
            source = None
            if version is not None:
                if not OTHER_VERSIONS[version].exists():
                    pytest.skip(f"PostgreSQL {version} is not installed")
                source = stack.enter_context(Cluster(bin_dir=OTHER_VERSIONS[version])).dsn()
            return {"tickets": make_tickets, "orders": make_orders}[name](make_scene, source)

        yield made


@pytest.fixture
def tickets(scene_of: SceneOf) -> Scene:
    return scene_of("tickets")


@pytest.fixture
def orders(scene_of: SceneOf) -> Scene:
    return scene_of("orders")


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


OF_ORDERS: dict[str, list[str]] = {
    "one person is both": ["UPDATE sales.orders SET seller_id = buyer_id WHERE no = 2"],
    "a person in both places is renamed": ["UPDATE people SET name = 'someone else' WHERE id = 1"],
    "buyers and sellers change places": ["UPDATE sales.orders SET buyer_id = seller_id, seller_id = buyer_id"],
    "a person goes and leaves NULL": ["DELETE FROM people WHERE id = 2"],
    "a person goes and comes again before the key is checked": [
        "SET CONSTRAINTS ALL DEFERRED; UPDATE sales.orders SET buyer_id = NULL; DELETE FROM people WHERE id = 3;"
        " INSERT INTO people VALUES (3, 'again')"],
    "an order goes with its lines": ["DELETE FROM sales.orders WHERE no = 3"],
    "an order's key changes with that of its lines": ["UPDATE sales.orders SET no = no + 90 WHERE no = 4"],
    "an order goes to another region": ["UPDATE sales.orders SET region = 'ca' WHERE (region, no) = ('eu', 5)"],
    "lines come before their order": [
        "INSERT INTO sales.lines VALUES ('eu', 50, 1, 'early'); INSERT INTO sales.orders VALUES ('eu', 50, 'late', 1)"],
    "a line goes to another partition": ["UPDATE sales.lines SET region = 'us', pos = pos + 10 WHERE region = 'eu'"],
    "one of two columns changes": ["UPDATE sales.lines SET order_no = 1 WHERE (order_no, pos) = (2, 2)"],
    "one of two equal rows without a key goes": [
        "DELETE FROM remarks WHERE ctid IN (SELECT min(ctid) FROM remarks GROUP BY region, order_no)"],
    "one of two columns becomes NULL": ["UPDATE remarks SET region = NULL WHERE order_no = 2"],
    "all lines go": ["TRUNCATE sales.lines"],
    "all lines and remarks go at once": ["TRUNCATE sales.lines, remarks"],
    "all lines go and others come": ["TRUNCATE sales.lines", "INSERT INTO sales.lines VALUES ('eu', 1, 1, 'new')"],
    "everybody goes, with all orders": ["TRUNCATE people CASCADE"],
}  # fmt: skip


def test_changes_of_each_related_table_are_counted_from_0(tickets: Scene) -> None:
    counted = re.findall(
        r'cdcsync_related_changes_total{index="roots",relation="(.*)"}', "\n".join(tickets.pipeline.metrics())
    )
    assert set(counted) == {"customer", "comments", "comments.author", "tags", "children"}


@pytest.mark.parametrize(
    "version",
    [None, *(pytest.param(one, marks=pytest.mark.proof) for one in OTHER_VERSIONS)],
    ids=lambda one: f"PostgreSQL {one}" if one else "",
)
@pytest.mark.parametrize(
    ("name", "change"), [("tickets", one) for one in CHANGES] + [("orders", one) for one in OF_ORDERS]
)
def test_each_document_is_what_its_tables_say_once(
    scene_of: SceneOf, name: str, change: str, version: int | None
) -> None:
    scene = scene_of(name, version)
    before = rows(scene)
    for statements in (CHANGES | OF_ORDERS)[change]:
        scene.at_once(*statements.split("; "))

    scene.settle()
    settled(scene)

    restore(scene, before)


@pytest.mark.parametrize(
    ("statements", "documents"),
    [
        (["UPDATE comments SET body = 'once' WHERE id = 5"], 1),
        (["INSERT INTO comments SELECT i, 3, 1, 'body', 1 FROM generate_series(4001, 5000) i"], 1),
        (["UPDATE comments SET body = 'a' WHERE ticket_id = 4; UPDATE users SET name = 'b' WHERE id = 999"], 1),
        (["UPDATE tickets SET subject = 'a' WHERE id = 18; UPDATE comments SET body = 'b' WHERE ticket_id = 18"], 2),
    ],
    ids=[
        "a comment",
        "a thousand comments of one ticket",
        "and an author of nothing",
        "a ticket, its parent and its comments",
    ],
)
def test_each_document_is_read_once_however_many_of_its_rows_change(
    tickets: Scene, statements: list[str], documents: int
) -> None:
    before = rows(tickets)
    tickets.settle()
    read = tickets.rereads()["tickets"]

    for each in statements:
        tickets.at_once(*each.split("; "))

    tickets.settle()
    settled(tickets)
    assert tickets.rereads()["tickets"] == read + documents
    restore(tickets, before)


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    "statements",
    [
        ["TRUNCATE sales.lines"],
        ["TRUNCATE remarks, sales.lines"],
        ["TRUNCATE remarks", "TRUNCATE sales.lines"],
        ["TRUNCATE people CASCADE"],
    ],
    ids=": ".join,
)
def test_documents_whose_related_tables_are_truncated_are_made_again_and_not_compared_besides(
    orders: Scene, statements: list[str]
) -> None:
    before, compared = rows(orders), orders.compared("orders")

    orders.execute(*statements)

    orders.settle()
    settled(orders)
    tables = ("sales.orders", "people", "sales.lines", "remarks")
    until(partial(orders.noted, "orders", *tables), orders.pipeline.tail)
    assert orders.compared("orders") == compared
    restore(orders, before)


@pytest.mark.proof
def test_documents_are_compared_if_one_partition_of_a_related_table_is_truncated(orders: Scene) -> None:
    """The stream does not bring that, where the publication sends the root."""
    before, compared = rows(orders), orders.compared("orders")

    orders.execute("TRUNCATE sales.lines_eu")

    # A comparison that was still under way may heal it before its own is asked for.
    until(lambda: orders.compared("orders") > compared, orders.pipeline.tail)
    orders.heals()
    restore(orders, before)


@pytest.mark.proof
def test_partitions_of_a_related_table_come_and_go_with_their_rows(orders: Scene) -> None:
    before = rows(orders)
    orders.execute(
        "CREATE TABLE sales.lines_ca (LIKE sales.lines INCLUDING INDEXES)",
        "INSERT INTO sales.lines_ca VALUES ('ca', 1, 1, 'from before')",
        "INSERT INTO sales.orders VALUES ('ca', 1, 'far', 1)",
        "ALTER TABLE sales.lines ATTACH PARTITION sales.lines_ca FOR VALUES IN ('ca')",
    )
    orders.heals()
    until(partial(orders.noted, "orders", "sales.lines"), orders.pipeline.tail)

    orders.execute("DROP TABLE sales.lines_ca")

    orders.heals()
    restore(orders, before)


def test_verify_finds_documents_of_several_tables_equal_and_a_stale_one_among_them(tickets: Scene) -> None:
    tickets.settle()
    settled(tickets)
    equal = tickets.command("verify", "tickets", "--json")
    assert json.loads(equal.stdout)["equal"] is True, equal.stdout + equal.stderr

    tickets.pipeline.target.execute("UPDATE cdcsync.tickets_chunks SET document_hash = '\\x00' WHERE id = 3")
    different = tickets.command("verify", "tickets", "--repair", "--json")

    assert json.loads(different.stdout)["differences"] == {"stale": 1}, different.stdout + different.stderr
    settled(tickets)


def test_verify_decides_about_a_document_while_related_rows_of_others_change_all_the_time(tickets: Scene) -> None:
    before = rows(tickets)
    tickets.settle()
    settled(tickets)
    tickets.pipeline.target.execute("UPDATE cdcsync.tickets_chunks SET document_hash = '\\x00' WHERE id = 3")
    stopping = threading.Event()

    def change() -> None:
        with psycopg.connect(tickets.source.dsn, autocommit=True) as connection:
            for number in itertools.count():
                # A steady load; as many as the server takes would only keep the comparison from a processor.
                if stopping.wait(0.01):
                    return
                connection.execute("UPDATE comments SET body = %s WHERE ticket_id = %s", [f"{number}", 5 + number % 10])

    changing = threading.Thread(target=change)
    changing.start()
    try:
        verified = tickets.command("verify", "tickets", "--json")
    finally:
        stopping.set()
        changing.join()

    found = json.loads(verified.stdout)["differences"]
    assert {kind: count for kind, count in found.items() if kind != "undecided"} == {"stale": 1}, verified.stdout
    tickets.command("verify", "tickets", "--repair")
    restore(tickets, before)


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


def test_a_plan_counts_the_documents_that_another_text_of_a_related_table_changes(tickets: Scene) -> None:
    path = tickets.pipeline.path
    before = path.read_text()
    path.write_text(before.replace('text = "<{author.name}> {body}"', 'text = "{author.name}: {body}"'))
    try:
        planned = tickets.command("plan", "--json")
    finally:
        path.write_text(before)

    found = {one["index"]: one for one in json.loads(planned.stdout)["indexes"]}
    changed, roots = (
        tickets.source.execute(f"SELECT count(*) FROM tickets_expected WHERE comments <> '' AND ({condition})")[0][0]
        for condition in ("true", "parent_id IS NULL AND id <> 3")
    )
    assert changed > roots > 0
    for index, count in (("tickets", changed), ("roots", roots)):
        assert found[index]["embedding"]["documents"] == count, planned.stdout
    assert found["comments"]["action"] == "unchanged"


@pytest.mark.parametrize(
    ("wrong", "right", "keys"),
    [
        ("customer.name = 'customer 2'", "customer.name = 'customer 2'", "customer_id = 2"),
        ("\"customer.tier\" = 'tier 1'", "customer.tier = 'tier 1'", "customer_id IN (1, 3, 5)"),
        ("tags LIKE '%tag 1%'", "tags.id = 1", "id IN (SELECT ticket_id FROM ticket_tags WHERE tag_id = 1)"),
    ],
    ids=["a value", "a carried column", "over a table between"],
)
def test_a_replay_of_documents_by_their_related_rows_asks_for_them_by_a_query(
    tickets: Scene, wrong: str, right: str, keys: str
) -> None:
    refused = tickets.command("replay", "tickets", "--where", wrong)
    assert refused.returncode == 2, refused.stdout
    (query,) = re.findall(r"by a query: (EXISTS .*) AND …", " ".join(refused.stderr.split()))

    done = tickets.command("replay", "tickets", "--where", f"{query} AND {right})")

    assert done.returncode == 0, done.stdout + done.stderr
    read = tickets.target.execute("SELECT rows_done FROM cdcsync.backfills WHERE kind = 'replay' ORDER BY id DESC")[0]
    assert read == tickets.source.execute(f"SELECT count(*) FROM tickets WHERE {keys}")[0]
    assert read > (0,)
    settled(tickets)


@pytest.mark.proof
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


@pytest.mark.proof_from(1)
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
    reason = tickets.paused("tickets")
    if "RENAME" in alter and "COLUMN" not in alter:
        assert back.replace("labels", "public.labels") in reason
    tickets.execute("INSERT INTO comments VALUES (3000, 1, 1, 'meanwhile', 1)")
    until(partial(tickets.equal, "comments"), tickets.pipeline.tail)

    tickets.execute(back)

    tickets.heals()
    tickets.execute("DELETE FROM comments WHERE id = 3000")
    settled(tickets)


def test_values_of_a_related_table_that_change_without_a_row_event_are_read_again(tickets: Scene) -> None:
    tickets.at_once("DROP VIEW tickets_expected", "ALTER TABLE tags ALTER name TYPE text USING upper(name)", TABLES[-1])

    tickets.heals()


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


@pytest.mark.proof
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


MOVING = [
    "CREATE TABLE folders (id int PRIMARY KEY, tenant int, path text, title text)",
    "CREATE TABLE files (id int PRIMARY KEY, tenant int, path text, name text)",
    "ALTER TABLE files ALTER path SET STORAGE EXTERNAL",
    "ALTER TABLE files REPLICA IDENTITY FULL",
    "INSERT INTO folders VALUES (1, 1, repeat('p', 3000), 'one'), (2, 2, repeat('p', 3000), 'two')",
    "INSERT INTO files VALUES (1, 1, repeat('p', 3000), 'a file')",
    "CREATE TABLE posts (id int PRIMARY KEY, title text)",
    'CREATE TABLE replies (id int PRIMARY KEY, post int, body text, hidden bool NOT NULL, "is bad" bool NOT NULL)',
    "ALTER TABLE replies REPLICA IDENTITY FULL",
    "INSERT INTO posts VALUES (1, 'a post')",
    "INSERT INTO replies VALUES (1, 1, 'r1', false, false), (2, 1, 'r2', false, false)",
]

FILES = """
[indexes.folders.related.files]
table = "files"
on = { tenant = "tenant", path = "path" }
text = "{name}"
"""

REPLIES = """
[indexes.NAME.related.replies]
table = "replies"
on = { post = "id" }
text = "{body}"
order_by = "ID"
where = 'WHERE'
"""


@pytest.mark.proof
def test_a_related_row_moves_although_a_column_of_its_link_is_not_sent_and_conditions_may_be_written_in_any_way(
    make_scene: MakeScene,
) -> None:
    conditions = {"lower": "NOT hidden", "upper": "NOT Hidden", "quoted": 'NOT "is bad"'}
    scene = make_scene(
        MOVING,
        {
            "folders": Followed("folders", "{title}: {files}", more=FILES),
            **{
                name: Followed(
                    *("posts", "{title}: {replies}"),
                    view=f"by_{name}",
                    more=REPLIES.replace("NAME", name).replace("WHERE", where),
                )
                for name, where in conditions.items()
            },
        },
    )

    scene.execute("UPDATE files SET tenant = 2 WHERE id = 1")
    until(lambda: _contents(scene, "folders") == ["one:", "two: a file"], scene.pipeline.tail)
    # Neither a row nor a file of the table tells of this: the new columns have their default from the catalog.
    scene.at_once(
        'ALTER TABLE replies DROP COLUMN hidden, DROP COLUMN "is bad"',
        "ALTER TABLE replies ADD COLUMN hidden bool NOT NULL DEFAULT true,"
        ' ADD COLUMN "is bad" bool NOT NULL DEFAULT true',
    )
    until(lambda: all(_contents(scene, name) == ["a post:"] for name in conditions), scene.pipeline.tail)
    until(lambda: {scene.state(name)[0] for name in scene.pipeline.config.indexes} == {"live"}, scene.pipeline.tail)


def _contents(scene: Scene, name: str) -> list[str]:
    """Return the texts of an index in the order of their documents."""
    return [text for (text,) in scene.target.execute(f"SELECT content FROM cdcsync.{name}_chunks ORDER BY id")]
