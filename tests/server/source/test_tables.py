"""Reading source tables: page by page in the key's own order, by key, and rendered as the stream renders."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SetupError
from cdcsync.model.rows import Key, Row, Shape
from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.model.visibility import Snapshot
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import XLogData
from cdcsync.pgoutput.messages import Insert, Message
from cdcsync.postgres.conditions import check_filter
from cdcsync.postgres.sessions import Connection, connect, speaking_of
from cdcsync.source.slot import SlotConnection
from cdcsync.source.tables import SourceTable, emit_mark
from tests.support.relations import rows

if TYPE_CHECKING:
    from tests.support.preflight import Role
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def source(database: Database) -> AsyncIterator[Connection]:
    """A session as backfills have it."""
    connection = await connect(database.dsn, "source")
    yield connection
    await connection.close()


def source_table(
    key: dict[str, str], carried: Sequence[str] = (), row_filter: str | None = None, *, name: str = "t"
) -> SourceTable:
    shape = Shape("index", QualifiedName("public", name), tuple(key), tuple(carried), ())
    return SourceTable(shape, tuple(key.values()), row_filter)


async def pages(table: SourceTable, connection: Connection, limit: int, where: str | None = None) -> list[list[Row]]:
    """Read the whole table, page after page, as a backfill does."""
    after: Key | None = None
    found = []
    while True:
        page = await table.page(connection, after, limit, where)
        found.append(page.rows)
        if len(page.rows) < limit:
            return found
        after = table.shape.key_of(page.rows[-1])


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


def prepare(database: Database) -> None:
    """Create the types that the tables here use."""
    with database.connect() as connection:
        connection.execute("CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION hstore")
        try:
            connection.execute("CREATE COLLATION cdcsync_test (provider = icu, locale = 'und')")
        except psycopg.errors.FeatureNotSupported:
            connection.execute('CREATE COLLATION cdcsync_test FROM "C"')
        connection.execute("CREATE TYPE \"Mood\" AS ENUM ('ok', 'Happy', 'a b', 'sad')")
        connection.execute("CREATE TYPE pair AS (first int, second text)")
        connection.execute("CREATE DOMAIN label AS citext")


async def test_pages_follow_the_servers_own_order_whatever_the_key(database: Database, source: Connection) -> None:
    prepare(database)
    for name, (key, definition, values) in KEYS.items():
        database.execute(f"CREATE TABLE t ({definition}, payload int)")
        columns = ", ".join(key) if name != "composite" else "a, b"
        database.execute(f"INSERT INTO t ({columns}) {values} ON CONFLICT DO NOTHING")
        listed = ", ".join(key)
        rendered = ", ".join(f"pg_catalog.concat({column})" for column in key)
        expected = await rows(source, f"SELECT {rendered} FROM public.t ORDER BY {listed}")
        table = source_table(key)

        for limit in (1, 3, len(expected), len(expected) + 1):
            found = await pages(table, source, limit)
            assert (name, [row for page in found for row in page]) == (name, expected)
        by_key = await table.by_keys(source, [tuple(str(value) for value in row) for row in expected])
        assert (name, sorted(by_key.rows)) == (name, sorted(expected))
        for at in (0, len(expected) // 2, len(expected) - 1):
            bound = await table.up_to(source, tuple(str(value) for value in expected[at]))
            found = await pages(table, source, 5, bound)
            assert (name, [row for page in found for row in page]) == (name, expected[: at + 1])
        database.execute("DROP TABLE t")


async def test_every_page_is_found_through_the_index(database: Database, source: Connection) -> None:
    """A page that scanned the table would make a backfill take the square of its time."""
    prepare(database)
    database.execute("CREATE TABLE t (a citext, b int, c text, PRIMARY KEY (a, b, c))")
    database.execute("INSERT INTO t SELECT 'k' || n / 10, n % 10, n FROM generate_series(1, 5000) n")
    database.execute("VACUUM ANALYZE t")
    table = source_table({"a": "public.citext", "b": "integer", "c": "text"})
    await source.execute("SELECT pg_stat_force_next_flush()")
    before = await rows(source, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 't'")

    page = await table.page(source, ("k400", "5", "4005"), 10)
    found = await table.by_keys(source, [("K7", "3", "73")])
    _, absent = await table.absent(source, [("K7", "3", "73"), ("k7", "3", "73"), ("k7", "3", "74")])

    await source.execute("SELECT pg_stat_force_next_flush()")
    assert page.rows[:5] == [("k400", str(n), f"400{n}") for n in range(6, 10)] + [("k401", "0", "4010")]
    assert found.rows == [("k7", "3", "73")]
    assert absent == [("K7", "3", "73"), ("k7", "3", "74")]
    assert await rows(source, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 't'") == before


async def test_rows_come_with_all_their_columns_in_the_shapes_order(database: Database, source: Connection) -> None:
    database.execute('CREATE TABLE t (body text, id int PRIMARY KEY, "100 %s" int, "Ünï ""x""" text, k0 int)')
    database.execute("INSERT INTO t VALUES ('b', 1, 2, NULL, 3), ('', 2, NULL, 'x', 4)")
    shape = Shape("i", QualifiedName("public", "t"), ("id",), ("100 %s", 'Ünï "x"'), ("body", "k0", "100 %s"))
    table = SourceTable(shape, ("integer",))
    first, second = ("1", "2", None, "b", "3", "2"), ("2", None, "x", "", "4", None)

    assert (await table.page(source, None, 10)).rows == [first, second]
    assert (await table.page(source, ("1",), 10)).rows == [second]
    assert (await table.by_keys(source, [("2",), ("3",)])).rows == [second]
    assert await table.count(source) == 2


async def test_keys_may_have_any_names(database: Database, source: Connection) -> None:
    database.execute(
        'CREATE TABLE t ("key %" int, "a ""b"" {c}" text, place int, PRIMARY KEY ("key %", "a ""b"" {c}"))'
    )
    database.execute("INSERT INTO t VALUES (1, 'x', 0), (1, 'y', 0), (2, 'x', 0)")
    table = source_table({"key %": "integer", 'a "b" {c}': "text"})
    assert await pages(table, source, 2) == [[("1", "x"), ("1", "y")], [("2", "x")]]
    assert (await table.by_keys(source, [("1", "y")])).rows == [("1", "y")]
    assert (await table.absent(source, [("1", "y"), ("3", "y")]))[1] == [("3", "y")]


SPELLINGS = {
    "public.citext": (["ABC", "x"], ["abc", "ABC", "X"]),
    "numeric": (["1.0", "2"], ["1.000", "1.0", "2.0", "3"]),
    "double precision": (["0", "5"], ["-0", "0", "5"]),
    "character(4)": (["a", "b"], ["a   ", "a", "c   "]),
    "text": (["a"], ["a", "A"]),
}
"""By type, what the source has and what the index has: equal to the source's type, and not written alike."""


@pytest.mark.parametrize("type_", SPELLINGS)
async def test_a_key_that_the_source_writes_otherwise_is_absent_as_it_is_written(
    database: Database, source: Connection, type_: str
) -> None:
    here, asked = SPELLINGS[type_]
    database.execute("CREATE EXTENSION IF NOT EXISTS citext SCHEMA public")
    database.execute(f"CREATE TABLE t (id {type_} PRIMARY KEY)")
    database.execute(f"INSERT INTO t SELECT unnest(%s::text[])::{type_}", [here])
    page = await source_table({"id": type_}).page(source, None, 10)
    written = {str(row[0]) for row in page.rows}

    snapshot, absent = await source_table({"id": type_}).absent(source, [(key,) for key in asked])

    assert absent == [(key,) for key in asked if key not in written]
    assert isinstance(snapshot, Snapshot)
    assert (await source_table({"id": type_}).absent(source, []))[1] == []


IMPOSSIBLE = {
    "integer": (["1", "2"], ["1", "one", "2", "99999999999", "3"], ["1", "2"]),
    "uuid": (["00000000-0000-0000-0000-000000000001"], ["7", "00000000-0000-0000-0000-000000000001"], None),
    "public.mood": (["ok"], ["ok", "sad"], ["ok"]),
    "public.low": (["3"], ["3", "30", "x"], ["3"]),
    "date": (["2026-01-02"], ["2026-01-02", "17", ""], ["2026-01-02"]),
}
"""By type, what the source has, what the index has from when the key was of another type, and what of that is there."""


@pytest.mark.parametrize("soft", [True, False], ids=["told by the server", "found by halves"])
@pytest.mark.parametrize("type_", IMPOSSIBLE)
async def test_a_key_that_is_no_value_of_the_sources_type_is_absent(
    database: Database, source: Connection, monkeypatch: pytest.MonkeyPatch, type_: str, soft: bool
) -> None:
    if not soft:
        monkeypatch.setattr("cdcsync.source.tables.SOFT_ERRORS_VERSION", 10**9)
    here, asked, present = IMPOSSIBLE[type_]
    database.execute("CREATE TYPE mood AS ENUM ('ok'); CREATE DOMAIN low AS int CHECK (VALUE < 10)")
    database.execute(f"CREATE TABLE t (id {type_} PRIMARY KEY, body text)")
    database.execute("ALTER TABLE t ALTER body SET STORAGE EXTERNAL")
    database.execute(f"INSERT INTO t SELECT id::{type_}, repeat('x', 5000) FROM unnest(%s::text[]) AS id", [here])
    table = source_table({"id": type_}, ["body"])
    keys: list[Key] = [(key,) for key in asked]

    assert (await table.absent(source, keys))[1] == [(key,) for key in asked if key not in (present or here)]
    assert sorted(str(row[0]) for row in (await table.by_keys(source, keys)).rows) == here[: len(present or here)]
    assert await table.fitting_keys(source, keys, 100_000) == len(keys)
    assert (await table.absent(source, [("no value",)]))[1] == [("no value",)]


# -- which rows ------------------------------------------------------------------------------------------------------


async def test_the_publications_row_filter_applies_to_every_read(database: Database, source: Connection) -> None:
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
    ((row_filter,),) = await rows(source, "SELECT rowfilter FROM pg_publication_tables")
    table = source_table({"id": "integer"}, row_filter=str(row_filter))

    assert await pages(table, source, 2) == [[("2",), ("6",)], [("10",)]]
    assert sorted((await table.by_keys(source, [("2",), ("4",), ("1",), ("6",)])).rows) == [("2",), ("6",)]
    assert (await table.absent(source, [("2",), ("4",)]))[1] == [("4",)]
    assert await table.count(source) == 3
    assert await table.count(source, "id > 2 OR title = '%s'") == 2


async def test_a_replays_condition_narrows_what_is_read(database: Database, source: Connection) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO t SELECT n, 'title ' || n || '%' FROM generate_series(1, 10) n")
    table = source_table({"id": "integer"}, row_filter="(id <> 4)")
    where = "id % 2 = 0 AND title LIKE '%\\%' OR id = 1"
    assert await pages(table, source, 2, where) == [[("1",), ("2",)], [("6",), ("8",)], [("10",)]]
    assert await table.count(source, where) == 5


@pytest.mark.parametrize("where", ["true; DROP TABLE t", "true -- all", "true /* all"])
def test_what_could_not_be_one_condition_is_refused(where: str) -> None:
    with pytest.raises(SetupError, match="more than one expression"):
        check_filter(where)


async def test_a_condition_that_is_wrong_leaves_the_session_usable(database: Database, source: Connection) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    database.execute("CREATE SEQUENCE s; INSERT INTO t VALUES (1)")
    table = source_table({"id": "integer"})
    with pytest.raises(psycopg.errors.UndefinedColumn):
        await table.page(source, None, 10, "nosuch = 1")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        await table.page(source, None, 10, "nextval('public.s') > 0")
    assert (await table.page(source, None, 10)).rows == [("1",)]


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
    database: Database, source: Connection, policies: str
) -> None:
    await source.execute(f"SET SESSION AUTHORIZATION {policies}".encode())
    table = source_table({"id": "integer"})
    for read in (table.page(source, None, 10), table.by_keys(source, [("1",)]), table.absent(source, [("1",)])):
        with pytest.raises(SetupError, match="row-level security") as refused, speaking_of("source", where="t"):
            await read
        assert refused.value.hint


# -- snapshots -------------------------------------------------------------------------------------------------------


async def test_a_column_may_change_its_type_between_two_pages(database: Database, source: Connection) -> None:
    """As many pages are read before as it takes the driver to keep a plan."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
    database.execute("INSERT INTO t VALUES (1, 2)")
    table = source_table({"id": "integer"}, ("n",))
    for _ in range(10):
        assert (await table.page(source, ("0",), 10)).rows == [("1", "2")]
    database.execute("ALTER TABLE t ALTER n TYPE numeric(5, 2)")
    assert (await table.page(source, ("0",), 10)).rows == [("1", "2.00")]


# -- estimates -------------------------------------------------------------------------------------------------------


async def test_the_estimate_is_the_planners_also_over_partitions(database: Database, source: Connection) -> None:
    database.execute('CREATE SCHEMA "My %"; CREATE TABLE "My %"."Tab.le" (id int PRIMARY KEY)')
    database.execute("CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    database.execute("CREATE TABLE high PARTITION OF parted FOR VALUES FROM (10) TO (100) PARTITION BY RANGE (id)")
    database.execute("CREATE TABLE higher PARTITION OF high FOR VALUES FROM (10) TO (100)")
    shape = Shape("i", QualifiedName("My %", "Tab.le"), ("id",), (), ())
    tables = [SourceTable(shape, ("integer",)), source_table({"id": "integer"}, name="parted")]

    assert [await table.estimate(source) for table in tables] == [0, 0]
    for name in ('"My %"."Tab.le"', "parted"):
        database.execute(f"INSERT INTO {name} SELECT n FROM generate_series(1, 50) n")
        database.execute(f"ANALYZE {name}")
    assert [await table.estimate(source) for table in tables] == [50, 50]
    assert [await table.count(source) for table in tables] == [50, 50]
    assert [await table.expected(source) for table in tables] == [50, 50]
    assert all([0 < await table.expected(source, "id <= 10") < 50 for table in tables])
    assert [len(await pages(table, source, 20)) for table in tables] == [3, 3]


# -- the stream renders the same -------------------------------------------------------------------------------------

ZOO: dict[str, tuple[str, ...]] = {
    "boolean": ("true", "false"),
    "character(5)": ("'ab'", "''"),
    "character varying(5)": ("'ab  '",),
    '"char"': ("'x'", "'\\377'::\"char\""),
    "name": ("'a'",),
    "text": ("''", "E'tab\\t, \\\\N\\n'", "'日本 🦜'"),
    "smallint": ("-32768",),
    "bigint": ("9223372036854775807",),
    "real": ("0.1", "1e20", "'NaN'", "3.4028235e38"),
    "double precision": ("0.1", "1/3.0", "1e-320", "'-Infinity'", "-0.0"),
    "numeric": ("1.500", "1e30", "'NaN'", "-0.000"),
    "numeric(10,2)": ("1", "-1234.5"),
    "money": ("1234567.891", "-0.5"),
    "date": ("'2024-02-29'", "'infinity'", "'0044-03-15 BC'", "'20240-01-01'"),
    "time": ("'12:00:00.5'",),
    "timetz": ("'12:00:00+05:30'",),
    "timestamp": ("'2024-02-29 12:00:00.123456'", "'0044-03-15 BC'", "'-infinity'"),
    "timestamptz": ("'2024-02-29 12:00:00+05'", "'infinity'", "'1883-11-18 12:00:00 America/New_York'"),
    "interval": ("'1 year 2 mons -3 days 04:05:06.789'", "'-1 sec'", "'0'", "'infinity'"),
    "bytea": ("'\\xdeadbeef'", "'\\x'", "'plain'"),
    "uuid": ("'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",),
    "json": ('\'{"a":  1, "a": 2}\'', "'null'"),
    "jsonb": ('\'{"b":  1.50, "a": [1e2, "\\u00e9"]}\'',),
    "jsonpath": ("'$.a[*] ? (@ > 1)'",),
    "point": ("'(1,0.1)'",),
    "box": ("'(1,1),(0,0)'",),
    "circle": ("'<(1,2),3>'",),
    "inet": ("'10.0.0.1/8'", "'::ffff:1.2.3.4'"),
    "cidr": ("'10.0.0.0/8'",),
    "macaddr8": ("'08:00:2b:01:02:03:04:05'",),
    "bit(3)": ("B'101'",),
    "bit varying": ("B''",),
    "integer[]": ("'{1,NULL,3}'", "'[0:1]={1,2}'", "'{{1,2},{3,4}}'"),
    "text[]": ("ARRAY['a,b', '\"', '\\', NULL, 'NULL', '', ' ']",),
    "timestamptz[]": ("ARRAY['2024-01-01 00:00+00'::timestamptz]",),
    "int4range": ("'[1,5]'", "'empty'", "'(,)'"),
    "tstzrange": ("'[2024-01-01 00:00+00, 2024-01-02 00:00+02)'",),
    "datemultirange": ("'{[2024-01-01,2024-01-05],[2024-02-01,)}'",),
    "tsvector": ("'a:1A fat:2 cat'",),
    "tsquery": ("'fat & (rat | cat:AB)'",),
    "oid": ("4294967295",),
    "regclass": ("'pg_class'", "'public.zoo'"),
    "regtype": ("'public.\"Mood\"'",),
    "pg_lsn": ("'16/B374D848'",),
    "xid8": ("'18446744073709551615'",),
    '"Mood"': ("'a b'",),
    "label": ("'A'",),
    "pair": ("ROW(1, 'two, \"three\"')", "ROW(NULL, '')"),
    "pair[]": ("ARRAY[ROW(1, 'a b')::pair, NULL]",),
    "citext": ("'Ab'",),
    "hstore": ("'b=>NULL, a=>\"1\"'",),
    "ltree": ("'a.b'",),
    "vector(3)": ("'[0.1,2,3e-10]'",),
    "halfvec(2)": ("'[0.1,65504]'",),
    "xml": ("'<?xml version=\"1.0\"?><a/>'", "'text'"),
}


async def received(slot: SlotConnection) -> AsyncIterator[tuple[XLogData, Any]]:
    """Yield the stream's messages."""
    while True:
        frame = await slot.receive(30)
        assert frame is not None, "the stream is silent"
        if isinstance(frame, XLogData):
            yield frame, decode(frame.payload)


@pytest.fixture
async def open_slot(database: Database) -> AsyncIterator[Callable[[], Awaitable[SlotConnection]]]:
    """Creates a slot of the publication `p` and streams from it."""
    opened: list[SlotConnection] = []

    async def open_() -> SlotConnection:
        slot = await SlotConnection.connect(database.dsn)
        opened.append(slot)
        begin = await slot.create_slot(database.name)
        await slot.start(database.name, ["p"], begin, streaming=False)
        return slot

    yield open_
    for slot in opened:
        await slot.aclose()


async def test_values_are_rendered_exactly_as_the_stream_renders_them(
    database: Database, source: Connection, open_slot: Callable[[], Awaitable[SlotConnection]]
) -> None:
    prepare(database)
    zoo = dict(ZOO)
    with database.connect() as connection:
        try:
            connection.execute("SELECT '<a/>'::xml")
        except psycopg.errors.FeatureNotSupported:
            del zoo["xml"]
        # Where both kinds of session log in, every setting that output functions read is other than ours.
        for setting in (
            "datestyle = 'SQL, DMY'",
            "intervalstyle = 'sql_standard'",
            "extra_float_digits = 0",
            "bytea_output = 'escape'",
            "timezone = 'Asia/Kathmandu'",
            "search_path = public, pg_catalog",
            "xmlbinary = 'hex'",
        ):
            connection.execute(f"ALTER DATABASE {database.name} SET {setting}".encode())
        columns = {f"c{at}": type_ for at, type_ in enumerate(zoo)}
        defined = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
        connection.execute(f"CREATE TABLE zoo (id int PRIMARY KEY, {defined})".encode())
        connection.execute("ALTER TABLE zoo REPLICA IDENTITY FULL; CREATE PUBLICATION p FOR TABLE zoo")
    source_ = await connect(database.dsn, "source")
    slot = await open_slot()
    with database.connect() as connection:
        for number in range(max(map(len, zoo.values()))):
            values = ", ".join(f"({(images * 9)[number]})::{type_}" for type_, images in zoo.items())
            connection.execute(f"INSERT INTO zoo SELECT {number}, {values}".encode())
        connection.execute("INSERT INTO zoo VALUES (-1)")
        count = number + 2

    streamed = {}
    async for _, message in received(slot):
        if isinstance(message, Insert):
            streamed[message.new[0]] = dict(zip(["key", *zoo], message.new, strict=True))
        if len(streamed) == count:
            break
    table = source_table({"id": "integer"}, tuple(columns), name="zoo")
    read = {row[0]: dict(zip(["key", *zoo], row, strict=True)) for row in (await table.page(source_, None, 100)).rows}
    await source_.close()

    assert read == streamed
    assert read["0"]["timestamptz"] == "2024-02-29 07:00:00+00"
    assert read["0"]["regclass"] == "pg_class"
    assert read["1"]["regclass"] == "public.zoo"


# -- marks -----------------------------------------------------------------------------------------------------------


async def test_a_mark_arrives_after_all_that_was_committed_before_it(
    database: Database, source: Connection, open_slot: Callable[[], Awaitable[SlotConnection]]
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t")
    slot = await open_slot()
    content = f"page:{random.random()} 日本"

    database.execute("INSERT INTO t VALUES (1)")
    await emit_mark(source, content)
    database.execute("INSERT INTO t VALUES (2)")

    seen = []
    async for _, message in received(slot):
        if isinstance(message, Insert):
            seen.append(message.new[0])
        elif isinstance(message, Message):
            assert (message.prefix, message.content.decode()) == (MARK_PREFIX, content)
            seen.append("mark")
        if "2" in seen:
            break
    assert seen == ["1", "mark", "2"]


async def test_a_page_of_large_rows_is_as_many_as_fit_and_no_value_is_read_to_know(source: Connection) -> None:
    await source.execute("CREATE TABLE public.t (id int PRIMARY KEY, body text, size int)")
    await source.execute("INSERT INTO public.t SELECT i, 'small', 0 FROM generate_series(1, 20) AS i")
    shape = Shape("index", QualifiedName("public", "t"), ("id",), ("size",), ("body",))
    table = SourceTable(shape, ("int",))
    assert await table.fitting(source, None, 10, 1) == 10, "without large values no row can be large"

    # Compressed to next to nothing where it is stored: its size is that of what is read.
    await source.execute("UPDATE public.t SET body = repeat('large ', 100000) WHERE id > 5")
    await source.execute(
        "UPDATE public.t SET body = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 9999) AS i)"
        " WHERE id = 3"
    )

    assert await table.fitting(source, None, 10, 2_000_000) == 7
    assert await table.fitting(source, ("5",), 10, 2_000_000) == 3
    assert await table.fitting(source, ("5",), 10, 1) == 1
    assert await table.fitting(source, ("5",), 2, 2_000_000) == 2
    assert await table.fitting(source, ("20",), 10, 1) == 10
    assert await table.fitting(source, None, 10, 2_000_000, "id <> 6 AND id <> 7") == 7
    keys = [("7",), ("99",), ("1",), ("8",), ("9",), ("10",)]
    assert await table.fitting_keys(source, keys, 2_000_000) == 5
    assert await table.fitting_keys(source, keys, 1) == 1
    assert await table.fitting_keys(source, [("99",)], 1) == 1


async def test_a_condition_that_writes_is_refused_wherever_rows_are_read_or_counted(
    database: Database, source: Connection
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
        table.count(source),
        table.fitting(source, None, 10, 1),
        table.fitting_keys(source, [("1",), ("2",)], 1),
        table.page(source, None, 10),
        table.by_keys(source, [("1",)]),
        table.absent(source, [("1",)]),
    ):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await read
    assert database.execute("SELECT count(*) FROM log") == [(0,)]
