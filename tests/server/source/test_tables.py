"""Reading source tables: page by page in the key's own order, by key, and rendered as the stream renders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import psycopg
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SetupError
from cdcsync.flows.audit.digests import source_digests
from cdcsync.model.rows import Key, Shape
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.many import source_table as source_table_of
from cdcsync.source.related import LookUps
from cdcsync.source.tables import SourceTable
from tests.support.preflight import configured, examined
from tests.support.relations import rows
from tests.support.tables import create_types, pages, source_table

if TYPE_CHECKING:
    from tests.support.preflight import Role
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_role_needs_to_read_only_what_the_index_and_the_row_filter_ask_for(
    lone_database: Database, role: Role
) -> None:
    lone_database.execute("CREATE TABLE t (id int PRIMARY KEY, body text, n int, secret text)")
    lone_database.execute("ALTER TABLE t ALTER body SET STORAGE EXTERNAL")
    lone_database.execute("INSERT INTO t SELECT i, repeat('x', 3000), i, 'secret' FROM generate_series(1, 9) i")
    lone_database.execute(f"GRANT SELECT (id, body, n) ON t TO {role.name}")
    table = source_table({"id": "integer"}, ["body"], "(n > 2)")
    keys: list[Key] = [("2",), ("3",), ("4",)]

    async with await connect(role.dsn, "source") as connection:
        assert [[row[0] for row in page] for page in await pages(table, connection, 4, "n < 9")] == [
            ["3", "4", "5", "6"],
            ["7", "8"],
        ]
        assert {row[0] for row in (await table.by_keys(connection, keys)).rows} == {"3", "4"}
        assert (await table.absent(connection, keys))[1] == [("2",)]
        assert await table.count(connection, "n < 5") == 2
        assert await table.fitting(connection, None, 4, 7_000, "n < 9") == 2
        assert await table.fitting_keys(connection, keys, 4_000) == 2


# -- pages -----------------------------------------------------------------------------------------------------------

KEYS: dict[str, tuple[dict[str, str], str, str]] = {
    # the key's columns; how the table is defined; and what it is filled by
    "bigint": ({"id": "bigint"}, "id bigint PRIMARY KEY", "SELECT (n - 20) * 1e15 FROM generate_series(1, 40) n"),
    "composite": (
        {"b": "text", "a": "integer"},
        "a int, b text, PRIMARY KEY (b, a)",
        "SELECT n % 5, chr(60 + n % 7 * 6) FROM generate_series(1, 35) n",
    ),
    "text": (
        {"id": "text"},
        "id text PRIMARY KEY",
        "SELECT * FROM unnest(ARRAY['', ' ', 'a', 'A', 'ä', 'Z', 'z', 'a b', 'ab', 'a-b', '_', '日本', E'\\t',"
        " '\\N', '%s','''', '10', '9', E'\\U0001F99C', 'é', E'e\\u0301'])",
    ),
    "text of another collation": (
        {"id": "text"},
        "id text COLLATE cdcsync_test PRIMARY KEY",
        "SELECT * FROM unnest(ARRAY['a', 'A', 'b', 'B', 'ä', 'Z', 'z', '_', 'a b', 'ab', 'a-b', '1', '', 'Ab', 'aB'])",
    ),
    "uuid": ({"id": "uuid"}, "id uuid PRIMARY KEY", "SELECT gen_random_uuid() FROM generate_series(1, 40)"),
    "numeric": (
        {"id": "numeric"},
        "id numeric PRIMARY KEY",
        "SELECT * FROM unnest('{1.0,1.10,-0.5,1e20,1e-20,NaN,Infinity,-Infinity,0.00,10,9}'::numeric[])",
    ),
    "double precision": (
        {"id": "double precision"},
        "id float8 PRIMARY KEY",
        "SELECT * FROM unnest('{0.1,0.30000000000000004,0.3,NaN,-Infinity,Infinity,-0,1e-320,1e308}'::float8[])",
    ),
    "character(3)": (
        {"id": "character(3)"},
        "id char(3) PRIMARY KEY",
        'SELECT * FROM unnest(\'{a,ab,abc,""," a",B}\'::text[])',
    ),
    "character varying": (
        {"id": "character varying(5)"},
        "id varchar(5) PRIMARY KEY",
        'SELECT * FROM unnest(\'{a,ab,"a ","",B}\'::text[])',
    ),
    "enum": (
        {"id": 'public."Mood"'},
        'id "Mood" PRIMARY KEY',
        'SELECT * FROM unnest(enum_range(NULL::public."Mood"))',
    ),
    "domain over citext": (
        {"id": "public.label", "n": "integer"},
        "id label, n int, PRIMARY KEY (id, n)",
        "SELECT chr(65 + n % 6 + n % 2 * 32), n FROM generate_series(1, 20) n",
    ),
    "citext": (
        {"id": "public.citext"},
        "id citext PRIMARY KEY",
        "SELECT * FROM unnest('{a,B,c,D,e,F,_,Z,z1}'::text[])",
    ),
    "ltree": (
        {"id": "public.ltree"},
        "id ltree PRIMARY KEY",
        "SELECT * FROM unnest('{a,a.b,a_b,b,A,a.b.c,aa}'::public.ltree[])",
    ),
    "times": (
        {"at": "timestamp with time zone", "day": "date", "took": "interval"},
        "at timestamptz, day date, took interval, PRIMARY KEY (at, day, took)",
        "SELECT at, day, took"
        " FROM unnest('{-infinity,0044-03-15 00:00 BC,2024-01-01 12:00:00.000001+05,infinity}'::timestamptz[]) at,"
        " unnest('{infinity,2024-02-29}'::date[]) day, unnest('{1 mon,-1 day,00:00:01}'::interval[]) took",
    ),
    "bytes, bits and arrays": (
        {"a": "bytea", "b": "bit(2)", "c": "integer[]"},
        "a bytea, b bit(2), c int[], PRIMARY KEY (a, b, c)",
        "SELECT a, b, c FROM unnest(ARRAY['\\x', '\\x00', '\\xff00']::bytea[]) a, unnest('{00,10}'::bit(2)[]) b,"
        " (VALUES ('{}'::int[]), ('{1,2}'), ('{1,NULL}')) v(c)",
    ),
    "addresses, ranges and rows": (
        {"a": "inet", "b": "int4range", "c": "public.pair"},
        "a inet, b int4range, c pair, PRIMARY KEY (a, b, c)",
        "SELECT a, b, c FROM unnest('{10.0.0.1,10.0.0.0/8,::1}'::inet[]) a,"
        ' unnest(\'{empty,"[1,2)","(,1)"}\'::int4range[]) b,'
        " (VALUES ('(1,\"a b\")'::public.pair), ('(,)'), ('(1,)')) v(c)",
    ),
}


async def test_pages_follow_the_servers_own_order_whatever_the_key(
    database: Database, source_session: Connection
) -> None:
    create_types(database)
    for name, (key, definition, values) in KEYS.items():
        database.execute(f"CREATE TABLE t ({definition}, payload int)")
        columns = ", ".join(key) if name != "composite" else "a, b"
        database.execute(f"INSERT INTO t ({columns}) {values} ON CONFLICT DO NOTHING")
        listed = ", ".join(key)
        rendered = ", ".join(f"pg_catalog.concat({column})" for column in key)
        expected = await rows(source_session, f"SELECT {rendered} FROM public.t ORDER BY {listed}")
        table = source_table(key)

        for limit in (1, 3, len(expected), len(expected) + 1):
            found = await pages(table, source_session, limit)
            assert (name, [row for page in found for row in page]) == (name, expected)
        by_key = await table.by_keys(source_session, [tuple(str(value) for value in row) for row in expected])
        assert (name, sorted(by_key.rows)) == (name, sorted(expected))
        for at in (0, len(expected) // 2, len(expected) - 1):
            bound = await table.up_to(source_session, tuple(str(value) for value in expected[at]))
            found = await pages(table, source_session, 5, bound)
            assert (name, [row for page in found for row in page]) == (name, expected[: at + 1])
        database.execute("DROP TABLE t")


async def test_every_page_is_found_through_the_index(database: Database, source_session: Connection) -> None:
    """A page that scanned the table would make a backfill take the square of its time."""
    create_types(database)
    database.execute("CREATE TABLE t (a citext, b int, c text, PRIMARY KEY (a, b, c))")
    database.execute("INSERT INTO t SELECT 'k' || n / 10, n % 10, n FROM generate_series(1, 5000) n")
    database.execute("VACUUM ANALYZE t")
    table = source_table({"a": "public.citext", "b": "integer", "c": "text"})
    await source_session.execute("SELECT pg_stat_force_next_flush()")
    before = await rows(source_session, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 't'")

    page = await table.page(source_session, ("k400", "5", "4005"), 10)
    found = await table.by_keys(source_session, [("K7", "3", "73")])
    _, absent = await table.absent(source_session, [("K7", "3", "73"), ("k7", "3", "73"), ("k7", "3", "74")])

    await source_session.execute("SELECT pg_stat_force_next_flush()")
    assert page.rows[:5] == [("k400", str(n), f"400{n}") for n in range(6, 10)] + [("k401", "0", "4010")]
    assert found.rows == [("k7", "3", "73")]
    assert absent == [("K7", "3", "73"), ("k7", "3", "74")]
    assert await rows(source_session, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 't'") == before


async def test_a_page_costs_its_own_rows_however_many_share_the_first_column_of_the_key(
    database: Database, source_session: Connection
) -> None:
    create_types(database)
    database.execute("CREATE TABLE t (a citext, b int, PRIMARY KEY (a, b))")
    database.execute("INSERT INTO t SELECT 'k', n FROM generate_series(1, 5000) n")
    database.execute("VACUUM ANALYZE t")
    table = source_table({"a": "public.citext", "b": "integer"})
    fetched = "SELECT sum(idx_tup_read)::int::text FROM pg_stat_user_indexes WHERE relname = 't'"
    await source_session.execute("SELECT pg_stat_force_next_flush()")
    ((before,),) = await rows(source_session, fetched)

    page = await table.page(source_session, ("K", "4000"), 10)

    await source_session.execute("SELECT pg_stat_force_next_flush()")
    ((after,),) = await rows(source_session, fetched)
    assert page.rows == [("k", str(n)) for n in range(4001, 4011)]
    assert int(after) - int(before) < 50


async def test_rows_come_with_all_their_columns_in_the_shapes_order(
    database: Database, source_session: Connection
) -> None:
    database.execute('CREATE TABLE t (body text, id int PRIMARY KEY, "100 %s" int, "Ünï ""x""" text, k0 int)')
    database.execute("INSERT INTO t VALUES ('b', 1, 2, NULL, 3), ('', 2, NULL, 'x', 4)")
    shape = Shape("i", QualifiedName("public", "t"), ("id",), ("100 %s", 'Ünï "x"'), ("body", "k0", "100 %s"))
    table = SourceTable(shape, ("integer",))
    first, second = ("1", "2", None, "b", "3", "2"), ("2", None, "x", "", "4", None)

    assert (await table.page(source_session, None, 10)).rows == [first, second]
    assert (await table.page(source_session, ("1",), 10)).rows == [second]
    assert (await table.by_keys(source_session, [("2",), ("3",)])).rows == [second]
    assert await table.count(source_session) == 2


async def test_keys_may_have_any_names(database: Database, source_session: Connection) -> None:
    database.execute(
        'CREATE TABLE t ("key %" int, "a ""b"" {c}" text, place int, PRIMARY KEY ("key %", "a ""b"" {c}"))'
    )
    database.execute("INSERT INTO t VALUES (1, 'x', 0), (1, 'y', 0), (2, 'x', 0)")
    table = source_table({"key %": "integer", 'a "b" {c}': "text"})
    assert await pages(table, source_session, 2) == [[("1", "x"), ("1", "y")], [("2", "x")]]
    assert (await table.by_keys(source_session, [("1", "y")])).rows == [("1", "y")]
    assert (await table.absent(source_session, [("1", "y"), ("3", "y")]))[1] == [("3", "y")]


# -- which rows ------------------------------------------------------------------------------------------------------


async def test_the_publications_row_filter_applies_to_every_read(
    database: Database, source_session: Connection
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, k0 int, title text, place int)")
    database.execute(
        "INSERT INTO t SELECT n, n, CASE WHEN n % 2 = 0 THEN '100% even' ELSE 'odd' END, n"
        " FROM generate_series(1, 10) n"
    )
    database.execute(
        "CREATE PUBLICATION p FOR TABLE t WHERE ((k0 % 5) < 3 AND title LIKE '%even' AND place > 0)"
        " WITH (publish = insert)"
    )
    # As the catalog says it, which is where the worker takes it from; names in it are those of other things here, too.
    ((row_filter,),) = await rows(source_session, "SELECT rowfilter FROM pg_publication_tables")
    table = source_table({"id": "integer"}, row_filter=str(row_filter))

    assert await pages(table, source_session, 2) == [[("2",), ("6",)], [("10",)]]
    assert sorted((await table.by_keys(source_session, [("2",), ("4",), ("1",), ("6",)])).rows) == [("2",), ("6",)]
    assert (await table.absent(source_session, [("2",), ("4",)]))[1] == [("4",)]
    assert await table.count(source_session) == 3
    assert await table.count(source_session, "id > 2 OR title = '%s'") == 2


OF_THREE = """
    CREATE TABLE t (id int PRIMARY KEY, title text);
    CREATE TABLE tagged (t_id int, tag_id int, PRIMARY KEY (t_id, tag_id));
    CREATE TABLE tags (no int PRIMARY KEY, name text);
    ALTER TABLE tagged REPLICA IDENTITY FULL; ALTER TABLE tags REPLICA IDENTITY FULL;
    INSERT INTO t VALUES (1, 'good'), (2, 'bad'); INSERT INTO tagged VALUES (1, 1); INSERT INTO tags VALUES (1, 'own');
"""
CHILDREN = """
    CREATE TABLE t_child () INHERITS (t); CREATE TABLE tagged_child () INHERITS (tagged);
    CREATE TABLE tags_child () INHERITS (tags);
    INSERT INTO t_child VALUES (1, 'good'), (2, 'good'), (3, 'good');
    INSERT INTO tagged_child VALUES (1, 1), (1, 2), (2, 1), (3, 1); INSERT INTO tags_child VALUES (1, 'x'), (2, 'y');
"""
MANY_TABLES = "CREATE SCHEMA a; CREATE TABLE a.t (id int PRIMARY KEY, title text); INSERT INTO a.t VALUES (1, 'good')"
MANY_CHILDREN = "CREATE TABLE t_child () INHERITS (a.t); INSERT INTO t_child VALUES (1, 'good'), (2, 'good')"


@pytest.mark.parametrize(
    ("tables", "lines", "children"),
    [
        (
            OF_THREE,
            """table = "t"
            text = "{title} {tags}"
            where = "title LIKE 'good%'"
            [indexes.t.related.tags]
            table = "tags"
            via = { table = "tagged", on = { t_id = "id" } }
            on = { no = "tag_id" }
            text = "{name}"
            where = "name <> ''"
            """,
            CHILDREN,
        ),
        (MANY_TABLES, """tables = ["*.t"]\ntext = "{title}"\nwhere = "title LIKE 'good%'"\n""", MANY_CHILDREN),
    ],
    ids=["of several tables", "of many equal ones"],
)
async def test_the_rows_of_tables_that_inherit_are_not_the_tables_own_however_it_is_read(
    database: Database, source_session: Connection, tables: str, lines: str, children: str
) -> None:
    database.execute(tables)
    # The embedder's line would stand in the section of the relation.
    (spec,) = (await examined(configured(database.dsn, t=f'embedder = "hash"\n{lines}'))).specs
    table = source_table_of(spec)
    keys: list[Key] = [(*prefix, str(at)) for prefix in ([("a.t",)] if spec.shape.many else [()]) for at in (1, 2, 3)]

    async def read() -> list[object]:
        look_ups = LookUps(spec.shape, spec.links, spec.facts)
        return [
            (await table.page(source_session, None, 9)).rows,
            (await table.page(source_session, None, 9, "id < 9")).rows,
            sorted((await table.by_keys(source_session, keys)).rows),
            (await table.absent(source_session, keys))[1],
            await table.count(source_session),
            (await source_digests(source_session, spec, None, 9)).by_key,
            (await source_digests(source_session, spec, None, 9, keys=keys)).by_key,
            [(await look_ups.keys(source_session, link, [("1",), ("2",)], 9))[1] for link in spec.links],
        ]

    before = await read()
    database.execute(children)

    assert await read() == before


async def test_a_replays_condition_narrows_what_is_read(database: Database, source_session: Connection) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO t SELECT n, 'title ' || n || '%' FROM generate_series(1, 10) n")
    table = source_table({"id": "integer"}, row_filter="(id <> 4)")
    where = "id % 2 = 0 AND title LIKE '%\\%' OR id = 1"
    assert await pages(table, source_session, 2, where) == [[("1",), ("2",)], [("6",), ("8",)], [("10",)]]
    assert await table.count(source_session, where) == 5


async def test_a_condition_that_is_wrong_leaves_the_session_usable(
    database: Database, source_session: Connection
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    database.execute("CREATE SEQUENCE s; INSERT INTO t VALUES (1)")
    table = source_table({"id": "integer"})
    with pytest.raises(psycopg.errors.UndefinedColumn):
        await table.page(source_session, None, 10, "nosuch = 1")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        await table.page(source_session, None, 10, "nextval('public.s') > 0")
    assert (await table.page(source_session, None, 10)).rows == [("1",)]


@pytest.fixture
def policies(database: Database) -> Iterator[str]:
    """A table of which the role `reader` may read all columns, and by its policy only some rows."""
    name = f"reader_{database.name}"
    database.execute("CREATE TABLE t (id int PRIMARY KEY, owner text)")
    database.execute("INSERT INTO t SELECT n, 'someone' FROM generate_series(1, 3) n")
    database.execute(f"CREATE ROLE {name} LOGIN")
    database.execute(f"GRANT SELECT ON t TO {name}")
    database.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY")
    database.execute("CREATE POLICY own ON t USING (owner = current_user)")
    yield name
    database.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_a_policy_that_hides_rows_is_an_error_and_not_missing_rows(
    database: Database, source_session: Connection, policies: str
) -> None:
    await source_session.execute(f"SET SESSION AUTHORIZATION {policies}".encode())
    table = source_table({"id": "integer"})
    for read in (
        table.page(source_session, None, 10),
        table.by_keys(source_session, [("1",)]),
        table.absent(source_session, [("1",)]),
    ):
        with pytest.raises(SetupError, match="row-level security") as refused, speaking_of("source", where="t"):
            await read
        assert refused.value.hint


# -- snapshots -------------------------------------------------------------------------------------------------------


async def test_a_column_may_change_its_type_between_two_pages(database: Database, source_session: Connection) -> None:
    """As many pages are read before as it takes the driver to keep a plan."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
    database.execute("INSERT INTO t VALUES (1, 2)")
    table = source_table({"id": "integer"}, ("n",))
    for _ in range(10):
        assert (await table.page(source_session, ("0",), 10)).rows == [("1", "2")]
    database.execute("ALTER TABLE t ALTER n TYPE numeric(5, 2)")
    assert (await table.page(source_session, ("0",), 10)).rows == [("1", "2.00")]


async def test_a_condition_that_writes_is_refused_wherever_rows_are_read_or_counted(
    database: Database, source_session: Connection
) -> None:
    database.execute(
        "CREATE TABLE log (id int); CREATE TABLE t (id int PRIMARY KEY, body text);"
        "INSERT INTO t SELECT i, string_agg(md5(i::text || j), '') FROM generate_series(1, 3) i,"
        " generate_series(1, 300) j GROUP BY i;"
        "CREATE FUNCTION writing(int) RETURNS boolean LANGUAGE sql AS"
        " 'INSERT INTO public.log VALUES ($1) RETURNING true'"
    )
    table = source_table({"id": "integer"}, ("body",), "public.writing(id)")
    for read in (
        table.count(source_session),
        table.fitting(source_session, None, 10, 1),
        table.fitting_keys(source_session, [("1",), ("2",)], 1),
        table.page(source_session, None, 10),
        table.by_keys(source_session, [("1",)]),
        table.absent(source_session, [("1",)]),
    ):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await read
    assert database.execute("SELECT count(*) FROM log") == [(0,)]
