"""Values of source tables are read as the stream renders them, and marks come through it in their place."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from cdcsync.model.transactions import MARK_PREFIX
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import XLogData
from cdcsync.pgoutput.messages import Insert, Message
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.marks import emit_mark
from cdcsync.source.slot import SlotConnection
from tests.support.tables import create_types, source_table

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

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
    database: Database, source_session: Connection, open_slot: Callable[[], Awaitable[SlotConnection]]
) -> None:
    create_types(database)
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


async def test_a_mark_arrives_after_all_that_was_committed_before_it(
    database: Database, source_session: Connection, open_slot: Callable[[], Awaitable[SlotConnection]]
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t")
    slot = await open_slot()
    content = f"page:{random.random()} 日本"

    database.execute("INSERT INTO t VALUES (1)")
    await emit_mark(source_session, content)
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
