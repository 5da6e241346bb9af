"""Keys of every type: the key of a hit fetches its document over HTTP and MCP as it was told, and no other one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import pytest

from cdcsync.config import Config
from cdcsync.config.serving import Serve
from tests.support.configs import Section, configuration
from tests.support.serving import served
from tests.support.workers import Pipeline

if TYPE_CHECKING:
    import httpx2

    from tests.support.servers import Server

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TYPES = """
CREATE EXTENSION ltree; CREATE EXTENSION hstore; CREATE EXTENSION citext;
CREATE TYPE mood AS ENUM ('calm', 'not, "calm"');
CREATE DOMAIN label AS varchar(20);
CREATE DOMAIN labels AS text[];
CREATE TYPE pair AS (a int, b text);
CREATE TYPE floatrange AS RANGE (subtype = float8)
"""

KEYS: dict[str, tuple[str, ...]] = {
    "smallint": ("-1", "32767"),
    "integer": ("0", "-2147483648"),
    "bigint": ("9223372036854775807", "9007199254740993"),
    "oid": ("4294967295",),
    "numeric": ("1.50", "NaN", "Infinity", "0.1000000000000000000000001", "1e40", "-0.0000001"),
    "real": ("0.1", "NaN", "1e-20"),
    "double precision": ("0.1", "Infinity", "-0.30000000000000004", "1e300"),
    "boolean": ("true", "false"),
    "text": (
        *("", " ", "a,b", "a/b", "/", "100%", "%41", "+", "?x#y", "a\nb\tc\r", "naïve – 😀", '"', "\\", "{a}"),
        *("null", "[1]", "1", "..x", "true", "'"),
    ),
    "varchar(9)": ("a", "a b"),
    "char(3)": ("a", "abc"),
    '"char"': ("a", ","),
    "name": ("a", "A b"),
    "citext": ("a", "Bé"),
    "uuid": ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",),
    "date": ("2026-01-31", "infinity", "-infinity", "0044-03-15 BC", "20000-01-01"),
    "timestamp": ("2026-01-31 10:00:00.000001", "infinity", "-infinity", "0044-03-15 12:00:00 BC"),
    "timestamptz": ("2026-01-31 10:00:00.5+02", "-infinity", "infinity", "20000-01-01 00:00:00+00"),
    "time": ("10:00:00.000001", "24:00:00"),
    "timetz": ("10:00:00+02", "10:00:00-03:30:15", "24:00:00+00"),
    "interval": ("1 mon", "-1 days", "49:00:00", "3 years 00:00:00.000001"),
    "bytea": ("\\x", "\\x00ff2c22"),
    "bit(3)": ("101", "000"),
    "bit varying": ("", "1", "1010101"),
    "inet": ("10.0.0.1", "10.0.0.1/24", "::1", "fe80::/10", "::ffff:1.2.3.4"),
    "cidr": ("10.0.0.0/8", "2001:db8::/32"),
    "macaddr": ("08:00:2b:01:02:03",),
    "money": ("1.00", "-12345.67"),
    "pg_lsn": ("0/16B3748",),
    "tsvector": ("'a':1 'b c':2",),
    "jsonb": (
        *(
            '"a"',
            '"1"',
            "1",
            "1.50",
            "true",
            "null",
            '"null"',
            '{"a": null}',
            "[null]",
            "[]",
            '"[]"',
            '{"b": [1, "ü"]}',
        ),
        *('{"n": 1e400}', '"{\\"n\\": 1e400}"', '"\\"{\\\\\\"n\\\\\\": 1e400}\\""', '""', "[" * 120 + "]" * 120),
    ),
    "jsonb[]": (
        *("{}", "{NULL}", '{"null"}', '{"null",NULL}', '{"\\"null\\""}', '{"[1, 2]"}', "{{1,2}}", "{1,2}"),
        *('{"\\"1\\""}', '{"{\\"a\\": null}"}', '{"[null]"}', "{{NULL}}", '{"{\\"n\\": 1e400}"}'),
    ),
    "int[]": ("{}", "{1,NULL}", "{NULL}", "{{1,2},{3,NULL}}", "[2:3]={1,2}", "{1,2}", "[0:0][1:1]={{1}}"),
    "text[]": ("{}", "{NULL}", '{"NULL"}', '{"null"}', '{"","a,b","\\"","\\\\","{}"}', '{"a\nb"}', "[2:2]={a}", "{a}"),
    "boolean[]": ("{t,f,NULL}",),
    "float8[]": ("{NaN,0.1}",),
    "numeric[]": ("{1.50,NaN}",),
    "date[]": ("{infinity,2026-01-31}",),
    "timestamptz[]": ("{infinity,2026-01-31 10:00:00+00}",),
    "interval[]": ("{1 mon}",),
    "bytea[]": ('{"\\\\x00ff",NULL}',),
    "uuid[]": ("{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}",),
    "inet[]": ("{10.0.0.1/24,::1}",),
    "int4range[]": ('{"[1,5)",NULL,empty}',),
    "mood[]": ('{calm,NULL,"not, \\"calm\\""}',),
    "pair[]": ('{"(1,a)","(,)"}',),
    "int4range": ("[1,5)", "empty", "(,5)", "(,)"),
    "numrange": ("(1.5,2.50]",),
    "daterange": ("[2026-01-01,infinity)",),
    "tstzrange": ("[2026-01-01 00:00:00+00,infinity)",),
    "floatrange": ("[1.5,2.5)",),
    "int4multirange": ("{}", "{[1,2),[5,9)}"),
    "mood": ("calm", 'not, "calm"'),
    "label": ("a", "a/b"),
    "labels": ("{a,NULL}",),
    "pair": ("(1,a)", "(,)", '(1,"a, ""b""")', "(1,null)"),
    "ltree": ("a.b_1", ""),
    "hstore": ('"a"=>"1"', '"a"=>NULL', '"a"=>"NULL"'),
}
"""Values that are keys, by the type of the only column of the key, as PostgreSQL reads them."""

TABLES = [f"k{number}" for number in range(len(KEYS))]


@pytest.fixture(scope="module")
def keyed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A live index for each type, and one with a key of several columns."""
    from tests.support.servers import fresh_database

    with fresh_database(server) as database:
        database.execute(TYPES)
        title = "title text DEFAULT 'the printer'"
        for table, (type_, values) in zip(TABLES, KEYS.items(), strict=True):
            database.execute(f"CREATE TABLE {table} (id {type_} PRIMARY KEY, {title})")
            for value in values:
                database.execute(f"INSERT INTO {table} VALUES (%s::text::{type_})", [value])
        database.execute(
            f"CREATE TABLE several (words text, ints int[], facts jsonb, {title}, PRIMARY KEY (facts, words, ints))"
        )
        for row in ((",", "{1,NULL}", '{"a": ","}'), ("", "{}", "null"), ("null", "{}", '"null"')):
            database.execute("INSERT INTO several VALUES (%s::text, %s::text::int[], %s::text::jsonb)", list(row))
        section: Section = {"text": "{title}", "search": "english"}
        indexes = dict.fromkeys([*TABLES, "several"], section)
        pipeline = Pipeline(tmp_path_factory.mktemp("keyed"), configuration(database.dsn, indexes=indexes))
        try:
            worker = pipeline.start()
            pipeline.live()
            pipeline.in_step()
            pipeline.stop(worker)
            serve = Serve(
                listen="127.0.0.1:0", dsn=database.dsn, anonymous=True, requests_per_s=1000, burst=1000, concurrency=50
            )
            yield msgspec.structs.replace(pipeline.config, serve=serve)
        finally:
            pipeline.source.close()
            pipeline.target.close()


def in_a_path(value: Any, type_: str) -> str:
    """Write a value of a key into a path, as docs/serve.md says."""
    text = value if isinstance(value, str) and type_ != "jsonb" else json.dumps(value)
    return quote(text, safe="")


@pytest.mark.proof
async def test_the_key_of_a_hit_fetches_its_document_and_no_other(keyed: Config) -> None:
    # One test of all types: each process that has one of several would load all indexes.
    cases: dict[str, tuple[str, tuple[str, ...], int]] = {
        **{type_: (table, (type_,), len(values)) for table, (type_, values) in zip(TABLES, KEYS.items(), strict=True)},
        "several columns": ("several", ("jsonb", "text", "int[]"), 3),
    }
    wrong = {}
    async with served(keyed) as client:
        for name, case in cases.items():
            try:
                await fetches(client, *case)
            except AssertionError as error:  # a type that fails does not hide the others
                wrong[name] = str(error)
    assert wrong == {}


async def fetches(client: httpx2.AsyncClient, table: str, types: tuple[str, ...], rows: int) -> None:
    answer = await client.post(f"/v1/indexes/{table}/search", json={"query": "printer", "k": 50})
    keys = [hit["key"] for hit in answer.json()["hits"]]
    by_tool = await called(client, "search", index=table, query="printer", k=50)
    assert [hit["key"] for hit in by_tool["structuredContent"]["hits"]] == keys
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == rows
    for key in keys:
        path = ",".join(in_a_path(value, type_) for value, type_ in zip(key.values(), types, strict=True))
        document = await client.get(f"/v1/indexes/{table}/documents/{path}")
        assert (document.status_code, document.json().get("key")) == (200, key), path
        fetched = await called(client, "fetch", index=table, key=key)
        assert fetched.get("structuredContent", fetched).get("key") == key, fetched


@pytest.mark.proof
async def test_another_key_fetches_nothing(keyed: Config) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"words": None}, "none of them null"),
        ({"ints": None}, "none of them null"),
        ({"facts": None}, "no document of this key"),
        ({"ints": [[1], [2]]}, "no document of this key"),
        ({"ints": "{"}, "no document of this key"),
    ]
    key = {"facts": {"a": ","}, "words": ",", "ints": [1, None]}
    async with served(keyed) as client:
        for change, told in changes:
            answer = await called(client, "fetch", index="several", key=key | change)
            assert told in answer["content"][0]["text"], change


async def called(client: httpx2.AsyncClient, tool: str, **arguments: Any) -> Any:
    """Call a tool of MCP; returns its result."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    answer = await client.post("/mcp", json=call, headers={"Accept": "application/json, text/event-stream"})
    return answer.json()["result"]
