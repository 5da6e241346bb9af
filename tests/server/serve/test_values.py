"""Values that Python or JSON cannot hold: hits, documents and examples have them as text, which finds the row again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import pytest

import cdcsync
from cdcsync.cli.search import find, parse_filters
from cdcsync.config import Config
from cdcsync.config.serving import Serve
from tests.support.configs import configuration
from tests.support.serving import served
from tests.support.workers import Pipeline

if TYPE_CHECKING:
    import httpx2

    from tests.support.servers import Server

pytestmark = [pytest.mark.server, pytest.mark.anyio]

VALUES: tuple[tuple[str, str, Any, Any], ...] = (
    # type, value, as Python has it, as JSON has it; None: any value of the type that is not text
    ("date", "infinity", "infinity", "infinity"),
    ("date", "0044-03-15 BC", "0044-03-15 BC", "0044-03-15 BC"),
    ("date", "20000-01-01", "20000-01-01", "20000-01-01"),
    ("timestamp", "-infinity", "-infinity", "-infinity"),
    ("timestamptz", "infinity", "infinity", "infinity"),
    ("timestamptz", "20000-01-01 00:00:00+00", None, None),
    ("time", "24:00:00", "24:00:00", "24:00:00"),
    ("timetz", "24:00:00+02", "24:00:00+02", "24:00:00+02"),
    ("interval", "infinity", "infinity", "infinity"),
    ("interval", "-infinity", "-infinity", "-infinity"),
    ("interval", "3 years 2 mons", "3 years 2 mons", "3 years 2 mons"),
    ("interval", "3000000 years", "3000000 years", "3000000 years"),
    ("interval", "-1 days", None, "-1 days"),
    ("interval", "49:00:00", None, "49:00:00"),
    ("date[]", "{infinity,2026-01-01}", None, ["infinity", "2026-01-01"]),
    ("interval[]", "{1 mon}", ["1 mon"], ["1 mon"]),
    ("daterange", "[2026-01-01,infinity)", None, "[2026-01-01,infinity)"),
    ("tstzrange", "[2026-01-01 00:00:00+00,infinity)", None, None),
    ("bytea", "\\x000013ff", b"\0\0\x13\xff", "\\x000013ff"),
    ("float8", "NaN", None, "NaN"),
    ("float8", "-Infinity", float("-inf"), "-Infinity"),
    ("float4", "Infinity", float("inf"), "Infinity"),
    ("numeric", "NaN", None, "NaN"),
    ("float8[]", "{NaN,1}", None, ["NaN", 1]),
    ("jsonb", '{"n": 1e5000}', f'{{"n": 1{"0" * 5000}}}', f'{{"n": 1{"0" * 5000}}}'),
    ("json", '{"n": 1e400}', '{"n": 1e400}', '{"n": 1e400}'),
    ("jsonb", '{"a": [1, null]}', {"a": [1, None]}, {"a": [1, None]}),
    ("json", '{"emoji": "\\ud83d"}', '{"emoji": "\\ud83d"}', '{"emoji": "\\ud83d"}'),
    ("json", '{"\\uDE00": 1}', '{"\\uDE00": 1}', '{"\\uDE00": 1}'),
    ("json", '[[{"a": ["\\ude00\\ud83d"]}]]', '[[{"a": ["\\ude00\\ud83d"]}]]', '[[{"a": ["\\ude00\\ud83d"]}]]'),
    ("json", '"\\ud83d"', '"\\ud83d"', '"\\ud83d"'),
    ("json[]", r'{"{\"a\": \"\\ud83d\"}","[1]"}', ['{"a": "\\ud83d"}', [1]], ['{"a": "\\ud83d"}', [1]]),
    ("json", '["\\ud83d\\ude00", "\\\\ud83d"]', ["\U0001f600", "\\ud83d"], ["\U0001f600", "\\ud83d"]),
    ("json", "[" * 300 + "]" * 300, "[" * 300 + "]" * 300, "[" * 300 + "]" * 300),
    ("jsonb", '{"a": ' * 900 + "1" + "}" * 900, '{"a": ' * 900 + "1" + "}" * 900, '{"a": ' * 900 + "1" + "}" * 900),
    ("text[]", r'{"{a,b}","q\"uote","back\\slash","","NULL"}', ["{a,b}", 'q"uote', "back\\slash", "", "NULL"], None),
    ("jsonb", f"[{', '.join(['[]'] * 300)}]", [[]] * 300, [[]] * 300),
)

TYPES = tuple(dict.fromkeys(type_ for type_, *_ in VALUES))

TITLE = "title text DEFAULT 'the printer'"

AS_A_COMMAND: dict[str, Any] = {
    **{"k": 10, "mode": "text", "where": None, "per_document": True, "skip": 0, "explain": False}
}

KEYS = (("\\x00ff", "infinity", "-1 days"), ("\\x", "0044-03-15 12:00:00 BC", "3 years 2 mons"))


def column(type_: str) -> str:
    return type_.replace("[]", "s")


@pytest.fixture(scope="module")
def odd(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A live index with a row of each value, one by a key of such values, and one of plain rows."""
    from tests.support.servers import fresh_database

    with fresh_database(server) as database:
        columns = ", ".join(f'"{column(one)}" {one}' for one in TYPES)
        database.execute(f"CREATE TABLE odd (id int PRIMARY KEY, {TITLE}, {columns})")
        for number, (type_, value, *_) in enumerate(VALUES, 1):
            statement = f'INSERT INTO odd (id, "{column(type_)}") VALUES (%s, %s::text::{type_})'
            database.execute(statement, [number, value])
        database.execute(
            f"CREATE TABLE keyed ({TITLE}, bin bytea, at timestamp, long interval, PRIMARY KEY (bin, at, long))"
        )
        for key in KEYS:
            database.execute("INSERT INTO keyed (bin, at, long) VALUES (%s::text::bytea, %s, %s)", list(key))
        database.execute(f"CREATE TABLE plain (id int PRIMARY KEY, {TITLE}); INSERT INTO plain VALUES (1)")
        indexes: dict[str, dict[str, object]] = {
            "odd": {"text": "{title}", "columns": [column(one) for one in TYPES], "search": "english"},
            "keyed": {"text": "{title}", "search": "english"},
            "plain": {"text": "{title}", "search": "english"},
        }
        pipeline = Pipeline(tmp_path_factory.mktemp("odd"), configuration(database.dsn, indexes=indexes))
        try:
            worker = pipeline.start()
            pipeline.live()
            pipeline.in_step()
            pipeline.stop(worker)
            serve = Serve(listen="127.0.0.1:0", dsn=database.dsn, anonymous=True)
            yield msgspec.structs.replace(pipeline.config, serve=serve)
        finally:
            pipeline.source.close()
            pipeline.target.close()


async def hits(client: httpx2.AsyncClient, index: str, **filter: Any) -> list[dict[str, Any]]:
    answer = await client.post(f"/v1/indexes/{index}/search", json={"query": "printer", "k": 50, "filter": filter})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["hits"])


async def called(client: httpx2.AsyncClient, tool: str, **arguments: Any) -> Any:
    """Call a tool of MCP."""
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}
    answer = await client.post("/mcp", json=call, headers={"Accept": "application/json, text/event-stream"})
    return answer.json()["result"]["structuredContent"]


@pytest.mark.proof_from(12)
@pytest.mark.parametrize(("number", "case"), list(enumerate(VALUES, 1)), ids=lambda one: str(one)[:40])
async def test_a_value_is_found_told_and_found_again(odd: Config, number: int, case: tuple[str, str, Any, Any]) -> None:
    type_, _, in_python, in_json = case
    name = column(type_)
    async with cdcsync.Index.open(odd, "odd") as index:
        (hit,) = await index.search("printer", filter={"id": number})
        assert hit.carried[name] is not None
        assert in_python is None or hit.carried[name] == in_python
        assert len(await index.search("printer", k=100)) == len(VALUES)
    async with served(odd) as client:
        (found,) = await hits(client, "odd", id=number)
        told = found["columns"][name]
        assert told is not None
        assert in_json is None or told == in_json
        document = await client.get(f"/v1/indexes/odd/documents/{number}")
        assert (document.status_code, document.json().get("columns")) == (200, found["columns"])
        by_tool = await called(client, "search", index="odd", query="printer", filter={"id": number})
        assert [one["key"] for one in by_tool["hits"]] == [{"id": number}]
        if not isinstance(told, list | dict) and type_ not in ("json", "jsonb"):
            assert number in [one["key"]["id"] for one in await hits(client, "odd", **{name: told})]
        if isinstance(told, list | dict) and type_ not in ("json", "json[]"):
            wish: dict[str, Any] = {name: {"contains": told}}
            assert number in [one["key"]["id"] for one in await hits(client, "odd", **wish)]
            by_tool = await called(client, "search", index="odd", query="printer", k=50, filter=wish)
            assert number in [one["key"]["id"] for one in by_tool["hits"]]
            async with cdcsync.Index.open(odd, "odd") as index:
                wish = {name: {"contains": hit.carried[name]}}
                assert number in [one.key["id"] for one in await index.search("printer", k=100, filter=wish)]
            written = parse_filters([f"{name}@>{json.dumps(told)}"])
            by_command = await find(odd, ["odd"], "printer", **AS_A_COMMAND | {"k": 100}, filter_=written)
            assert number in [one.hit.key["id"] for one in by_command.found]
        assert await hits(client, "plain")
    answer = await find(odd, ["odd"], "printer", **AS_A_COMMAND, filter_={"id": {"eq": str(number)}})
    assert msgspec.json.decode(msgspec.json.encode(answer.found[0].hit.carried, enc_hook=str)) == found["columns"]


async def test_the_list_of_indexes_names_examples_that_a_filter_takes(odd: Config) -> None:
    async with served(odd) as client:
        listed = {one["name"]: one for one in (await client.get("/v1/indexes")).json()["indexes"]}
        assert {name: one["state"] for name, one in listed.items()} == dict.fromkeys(("odd", "keyed", "plain"), "live")
        examples = {one["name"]: one["examples"] for one in listed["odd"]["columns"]}
        assert examples["bytea"] == ["\\x000013ff"]
        assert examples["json"] == examples["jsonb"] == examples["dates"] == []
        for name, values in examples.items():
            for value in values:
                assert await hits(client, "odd", **{name: value}), (name, value)


@pytest.mark.parametrize("key", KEYS)
async def test_a_document_is_fetched_by_the_key_of_its_hit(odd: Config, key: tuple[str, ...]) -> None:
    async with served(odd) as client:
        (found,) = await hits(client, "keyed", bin=key[0])
        assert tuple(found["key"].values()) == key
        assert await hits(client, "keyed", **found["key"]) == [found]
        path = ",".join(quote(one, safe="") for one in found["key"].values())
        document = await client.get(f"/v1/indexes/keyed/documents/{path}")
        assert (document.status_code, document.json().get("key")) == (200, found["key"])
        assert (await called(client, "fetch", index="keyed", key=found["key"]))["key"] == found["key"]
