"""Tables that are related in many ways, indexes whose documents are made of them, and what these are to be, in SQL."""

from __future__ import annotations

from functools import partial

from tests.support.configs import NO_AUDIT
from tests.support.scenes import BEAT, Followed, MakeScene, Scene
from tests.support.workers import until

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

ORDERS = [
    "CREATE SCHEMA sales",
    "CREATE TABLE people (id int PRIMARY KEY, name text)",
    "CREATE TABLE sales.orders (region text, no int, title text, buyer_id int REFERENCES people ON DELETE SET NULL,"
    " seller_id int REFERENCES people ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED, PRIMARY KEY (region, no))",
    # Its key covers the columns that lines are found by.
    "CREATE TABLE sales.lines (region text, order_no int, pos int, what text, PRIMARY KEY (region, order_no, pos),"
    " FOREIGN KEY (region, order_no) REFERENCES sales.orders ON DELETE CASCADE ON UPDATE CASCADE"
    " DEFERRABLE INITIALLY DEFERRED) PARTITION BY LIST (region)",
    "CREATE TABLE sales.lines_eu PARTITION OF sales.lines FOR VALUES IN ('eu')",
    "CREATE TABLE sales.lines_rest PARTITION OF sales.lines DEFAULT",
    "CREATE TABLE remarks (region text, order_no int, said text)",  # without a key
    "ALTER TABLE remarks REPLICA IDENTITY FULL",
    "INSERT INTO people SELECT i, 'person ' || i FROM generate_series(1, 4) i",
    "INSERT INTO sales.orders SELECT (ARRAY['eu', 'us'])[1 + i % 2], (i + 1) / 2, 'order ' || i, 1 + i % 4, 1 + i % 3"
    " FROM generate_series(1, 12) i",
    "INSERT INTO sales.lines SELECT region, no, pos, 'thing ' || no || '.' || pos"
    " FROM sales.orders, generate_series(1, 3) pos WHERE no > 1",
    "INSERT INTO remarks SELECT region, no, 'said ' || no % 2 FROM sales.orders, generate_series(1, 2)",
    """
    CREATE VIEW orders_expected AS SELECT o.*,
        (SELECT name FROM people WHERE id = o.buyer_id) AS "buyer.name",
        (SELECT name FROM people WHERE id = o.seller_id) AS "seller.name",
        (SELECT string_agg(concat(pos, ' ', what), ', ' ORDER BY pos DESC) FROM sales.lines
            WHERE region = o.region AND order_no = o.no) AS lines,
        (SELECT string_agg(said, ', ' ORDER BY said) FROM remarks WHERE region = o.region AND order_no = o.no)
            AS remarks
    FROM sales.orders o
    """,
]

PARTS = """
[indexes.NAME.chunking]
strategy = "characters"
max_tokens = 40
overlap_tokens = 0
[indexes.NAME.related.buyer]
table = "people"
on = { id = "buyer_id" }
[indexes.NAME.related.seller]
table = "people"
on = { id = "seller_id" }
[indexes.NAME.related.lines]
table = "sales.lines"
on = { region = "region", order_no = "no" }
text = "{pos} {what}"
order_by = "pos DESC"
separator = ", "
[indexes.NAME.related.remarks]
table = "remarks"
on = { order_no = "no", region = "region" }
text = "{said}"
separator = ", "
"""

TEXT = "{subject} ({tags})\n{comments}\nfrom {customer.name}, above {children}"


def make_tickets(make_scene: MakeScene, source: str | None) -> Scene:
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
        worker_lines=NO_AUDIT,
        source=source,
    )
    scene.oracle_reads("tickets", "tickets_expected")
    scene.oracle_reads("roots", "tickets_expected")
    return scene


def make_orders(make_scene: MakeScene, source: str | None) -> Scene:
    """Keys of several columns, one table related twice, a partitioned one, one without a key, and a `chunk_text`."""
    frame = 'chunk_text = "{buyer.name} from {seller.name}: {chunk}"\n'
    parts = Followed("sales.orders", "{title}: {lines}. {remarks}", columns=("buyer.name", "title"), more=frame + PARTS)
    scene = make_scene(ORDERS, {"orders": parts, "lines": Followed("sales.lines", "{what}")}, source=source)
    scene.oracle_reads("orders", "orders_expected")
    return scene


Rows = dict[str, list[tuple[object, ...]]]
ALL = {
    "tickets": ("crm.customers", "users", "tickets", "comments", "tags", "ticket_tags"),
    "orders": ("people", "sales.orders", "sales.lines", "remarks"),
}


def rows(scene: Scene) -> Rows:
    tables = next(tables for name, tables in ALL.items() if name in scene.pipeline.config.indexes)
    return {table: scene.pipeline.source.execute(f"SELECT * FROM {table}").fetchall() for table in tables}


def restore(scene: Scene, before: Rows) -> None:
    """Put the tables' rows back, in one transaction, which is one more case."""
    with scene.pipeline.source.transaction():
        for table in reversed(before):
            scene.pipeline.source.execute(f"DELETE FROM {table}")
        for table, found in before.items():
            for row in found:
                places = ", ".join(["%s"] * len(row))
                scene.pipeline.source.execute(f"INSERT INTO {table} VALUES ({places})", row)
    scene.settle()
    settled(scene)


def settled(scene: Scene) -> None:
    """Fail unless the indexes get to equal their tables without being read again."""
    for name in scene.pipeline.config.indexes.keys() - {BEAT}:
        assert scene.state(name)[0] == "live", scene.state(name)
        until(partial(scene.equal, name), lambda: f"{scene.pipeline.difference}; {scene.pipeline.tail()}")
