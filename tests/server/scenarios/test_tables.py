"""Tables of every shape: names, widths, generated columns, inheritance, and what TRUNCATE empties."""

from __future__ import annotations

import re
from functools import partial

import psycopg
import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.servers import Server
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]  # dozens of indexes, on a machine that may be busy

ODD = 'Ödd "100 %s" \\ {na.me}'
"""A name with everything that some syntax could take for its own."""


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.fixture(scope="module")
def tables(make_scene: MakeScene, server_version: int) -> Scene:
    """A table of each shape."""
    odd = quoted(ODD)
    wide = ", ".join(f"c{at} int" for at in range(1598))
    publish = ", publish_generated_columns = stored" if server_version >= 180000 else ""
    virtual = ", twice int GENERATED ALWAYS AS (n * 2) VIRTUAL" if server_version >= 180000 else ""
    return make_scene(
        [
            f"CREATE SCHEMA {odd}",
            f"CREATE TABLE {odd}.{odd} ({odd} int, {quoted('%')} text, {quoted('Title')} text, {quoted('%s')} text,"
            f" PRIMARY KEY ({odd}, {quoted('%')}))",
            "CREATE TABLE plain (id int PRIMARY KEY, title text, n int)",
            'CREATE TABLE "Plain" ("ID" int PRIMARY KEY, "Title" text, n int)',
            f"CREATE TABLE wide (id int PRIMARY KEY, title text, {wide})",
            "CREATE TABLE computed (id int PRIMARY KEY, n int, title text GENERATED ALWAYS AS ('number ' || n::text)"
            f" STORED{virtual})".replace("n::text", "(CASE WHEN n > 5 THEN 'many' ELSE 'few' END)"),
            "CREATE TABLE parent (id int PRIMARY KEY, title text)",
            "CREATE TABLE child (extra text, PRIMARY KEY (id)) INHERITS (parent)",
            "CREATE TABLE orders (id int PRIMARY KEY, title text)",
            "CREATE TABLE lines (id int PRIMARY KEY, title text, order_id int REFERENCES orders)",
            "CREATE TABLE counted (id serial PRIMARY KEY, title text)",
            'CREATE PUBLICATION mine FOR TABLE beat, plain, "Plain", wide, computed, child, orders, lines, counted,'
            f" {odd}.{odd} WITH (publish_via_partition_root = true{publish})",
        ],
        {
            "odd": Followed(f"{odd}.{odd}", '{Title} {"%"}', ("%s",), view=f"{odd}.{quoted(ODD + 'v')}"),
            "plain": Followed("plain", columns=("n",)),
            "quoted": Followed('"Plain"', "{Title}", ("n",)),
            "wide": Followed("wide", "{title} {c0} {c1597}", tuple(f"c{at}" for at in range(0, 1598, 2))),
            "computed": Followed("computed", "{title}" if publish else "{n}", ("n",)),
            "child": Followed("child", "{title} {extra}"),
            "orders": Followed("orders"),
            "lines": Followed("lines", columns=("order_id",)),
            "counted": Followed("counted"),
        },
        publication="mine",
    )


@pytest.fixture(scope="module")
def server_version(server: Server) -> int:
    """The server's version as a number."""
    with server.connect() as connection:
        return connection.info.server_version


def test_names_may_hold_anything(tables: Scene) -> None:
    table = f"{quoted(ODD)}.{quoted(ODD)}"
    tables.execute(
        f"INSERT INTO {table} VALUES (1, 'a%b', 'one', '%'), (2, '%s', 'two', NULL), (3, '', '', '{{}}')",
        f"UPDATE {table} SET {quoted('Title')} = '100 %' WHERE {quoted('%')} = '%s'",
        f"UPDATE {table} SET {quoted('%')} = '%(x)s' WHERE {quoted(ODD)} = 3",
        f"DELETE FROM {table} WHERE {quoted(ODD)} = 1",
    )
    tables.follows("odd")
    for arguments in (
        ("replay", "odd"),
        ("replay", "odd", "--key", '[2, "%s"]'),
        ("replay", "odd", "--where", f"{quoted('%')} LIKE '%s'"),
        ("verify", "odd"),
        ("search", "odd", "100 %"),
        ("search", "odd", "100 %", "--where", f"{quoted('%s')} IS NULL"),
    ):
        done = tables.command(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    tables.follows("odd")


def test_case_tells_tables_and_columns_apart(tables: Scene) -> None:
    tables.execute(
        "INSERT INTO plain VALUES (1, 'lower', 1)",
        "INSERT INTO \"Plain\" VALUES (1, 'upper', 2)",
        "DELETE FROM plain",
        'UPDATE "Plain" SET "ID" = 2',
    )

    tables.follows("plain", "quoted")


@pytest.mark.proof
def test_a_table_may_have_as_many_columns_as_there_can_be(tables: Scene) -> None:
    tables.execute(
        "INSERT INTO wide (id, title, c0, c1597) VALUES (1, 'wide', 1, 2), (2, 'wider', NULL, 4)",
        "UPDATE wide SET c1596 = 7",
        "UPDATE wide SET c1597 = 8, id = 3 WHERE id = 1",
        "ALTER TABLE wide REPLICA IDENTITY FULL",
        "UPDATE wide SET c1 = 9, title = 'not indexed as such'",
        "DELETE FROM wide WHERE id = 2",
    )

    tables.follows("wide")


def test_stored_generated_columns_are_followed_where_they_are_sent(tables: Scene) -> None:
    tables.execute(
        "INSERT INTO computed VALUES (1, 3), (2, 7)",
        "UPDATE computed SET n = 9 WHERE id = 1",
        "UPDATE computed SET id = 5 WHERE id = 2",
        "DELETE FROM computed WHERE id = 1",
    )

    tables.follows("computed")


def test_a_table_that_inherits_is_followed(tables: Scene) -> None:
    tables.execute(
        "INSERT INTO parent VALUES (1, 'of the parent')",
        "INSERT INTO child VALUES (2, 'of the child', 'x')",
        "UPDATE parent SET title = title || '!'",
    )

    tables.follows("child")


def test_truncate_empties_every_table_that_it_names_or_reaches(tables: Scene) -> None:
    rows = (
        "INSERT INTO orders SELECT i, 'order ' || i FROM generate_series(1, 5) i",
        "INSERT INTO lines SELECT i, 'line ' || i, 1 + i % 5 FROM generate_series(1, 9) i",
        "INSERT INTO counted (title) SELECT 'counted ' || i FROM generate_series(1, 4) i",
    )
    tables.execute(*rows, "TRUNCATE orders CASCADE")
    tables.follows("orders", "lines", "counted")
    tables.execute(*rows[:2], "TRUNCATE orders, lines, counted RESTART IDENTITY", *rows)
    tables.follows("orders", "lines", "counted")
    tables.at_once("DELETE FROM lines", *rows[1:2], "TRUNCATE lines", *rows[1:2], "DELETE FROM lines WHERE id < 3")
    tables.follows("orders", "lines", "counted")
    tables.at_once("TRUNCATE counted RESTART IDENTITY", rows[2], "TRUNCATE ONLY counted")
    tables.follows("orders", "lines", "counted")


def test_tables_that_cannot_be_followed_are_refused_and_once_they_can_be_the_start_succeeds(
    make_scene: MakeScene, server_version: int
) -> None:
    refusals = {
        "missing": ("SELECT", "there is no table public.missing"),
        "unlogged": ("CREATE UNLOGGED TABLE unlogged (id int PRIMARY KEY, title text)", "unlogged SET LOGGED"),
        "seen": ("CREATE VIEW seen AS SELECT 1 AS id, 'x' AS title", "public.seen is a view"),
        "keyless": ("CREATE TABLE keyless (id int, title text)", "ALTER TABLE public.keyless ADD PRIMARY KEY"),
        "parent": (
            "CREATE TABLE parent (id int PRIMARY KEY, title text)",
            "public.parent is inherited from by public.child",
        ),
        "virtual": (
            "CREATE TABLE virtual (id int PRIMARY KEY, title text GENERATED ALWAYS AS ('x')"
            f" {'VIRTUAL' if server_version >= 180000 else 'STORED'})",
            "virtual generated column" if server_version >= 180000 else "no generated column is sent",
        ),
    }
    scene = make_scene(
        [*(create for create, _ in refusals.values()), "CREATE TABLE child () INHERITS (parent)"],
        {name: Followed(name) for name in refusals},
        started=False,
    )

    refused = scene.command("run")

    assert refused.returncode == 2
    told = " ".join(refused.stderr.split())
    for _, sign in refusals.values():
        assert sign in told
    scene.execute("DROP VIEW seen", "DROP TABLE unlogged, keyless, parent, virtual CASCADE")
    for name in refusals:
        scene.execute(
            f"CREATE TABLE {name} (id int PRIMARY KEY, title text)", f"INSERT INTO {name} VALUES (1, 'is there now')"
        )
    scene.pipeline.start()
    scene.pipeline.live()
    scene.follows()


def test_a_temporary_table_of_the_same_name_is_another_table(tables: Scene) -> None:
    with psycopg.connect(tables.source.dsn, autocommit=True) as session:
        session.execute("CREATE TEMP TABLE plain (id int PRIMARY KEY, title text, n int)")
        session.execute("INSERT INTO plain VALUES (77, 'temporary', 1)")
        session.execute("INSERT INTO public.plain VALUES (78, 'permanent', 1) ON CONFLICT DO NOTHING")

    tables.follows("plain")


def test_an_index_whose_view_has_another_name_now_keeps_it_and_who_may_read_it(make_scene: MakeScene) -> None:
    scene = make_scene(
        ["CREATE TABLE notes (id int PRIMARY KEY, title text)", "INSERT INTO notes VALUES (1, 'one')"],
        {"notes": Followed("notes", view="public.before")},
    )
    target = scene.pipeline.target
    target.execute("GRANT SELECT ON before TO PUBLIC")
    target.execute("CREATE VIEW built_on AS SELECT id FROM before")
    target.execute("CREATE SCHEMA elsewhere")
    for view in ("elsewhere.after", "public.at_last"):
        scene.pipeline.stop(scene.pipeline.processes[-1])
        scene.reconfigured(partial(re.sub, r'view = ".*"', f'view = "{view}"'))
        scene.pipeline.start()
        scene.execute("INSERT INTO notes SELECT max(id) + 1, 'more' FROM notes")
        scene.follows("notes")

        views = target.execute(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE relkind = 'v'"
            " AND obj_description(c.oid, 'pg_class') LIKE 'cdcsync index notes: %'"
        ).fetchall()
        assert views == [(view.removeprefix("public."),)]
        assert target.execute("SELECT has_table_privilege('pg_monitor', %s, 'SELECT')", [view]).fetchone() == (True,)
    assert target.execute("SELECT count(*) FROM built_on").fetchone() == (3,)
    assert "relations_missing" not in {event["event"] for event in scene.pipeline.events()}


def test_search_indexes_that_a_changed_configuration_asks_for_are_built_and_nobody_dropped_them(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [
            statement
            for name in ("later", "wordless")
            for statement in (
                f"CREATE TABLE {name} (id int PRIMARY KEY, title text)",
                f"INSERT INTO {name} VALUES (1, 'one')",
            )
        ],
        {"later": Followed("later", columns=("title",)), "wordless": Followed("wordless", more='search = ""')},
    )
    indexes = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'cdcsync' AND tablename ~ '^(later|wordless)_chunks'"
    before = scene.pipeline.target.execute(indexes).fetchone()
    assert before is not None
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.reconfigured(lambda text: text.replace('columns = ["title"]', 'columns = ["title"]\nindexed = ["title"]'))
    scene.reconfigured(lambda text: text.replace('search = ""', 'search = "english"'))

    scene.pipeline.start()
    until(lambda: scene.pipeline.times("streaming") == 2, scene.pipeline.tail)

    scene.heals("later", "wordless")
    assert scene.pipeline.target.execute(indexes).fetchone() == (before[0] + 2,)
    assert "relations_missing" not in {event["event"] for event in scene.pipeline.events()}
