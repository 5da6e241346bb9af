"""The tools for agents, as the SDK's own client sees them: over HTTP, over stdio, by the older protocol."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import msgspec
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from psycopg import conninfo

import cdcsync
from cdcsync import logs
from cdcsync.config import Config
from cdcsync.config.serving import Serve
from cdcsync.serve.identity import new_token
from cdcsync.serve.openapi import describe
from cdcsync.target.ddl.filters import FILTER_OPERATORS
from tests import ROOT
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.serving import Office, served, tenant
from tests.support.workers import Pipeline

pytestmark = [pytest.mark.server, pytest.mark.anyio]

Protocol = Literal["auto", "legacy"]


@asynccontextmanager
async def agent(config: Config, token: str | None = None, mode: Protocol = "auto") -> AsyncIterator[Client]:
    """Connect over HTTP, as an agent would."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with served(config) as plain, httpx2.AsyncClient(headers=headers, timeout=30) as http:
        transport = streamable_http_client(f"{plain.base_url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


async def called(client: Client, tool: str, **arguments: Any) -> Any:
    """Call a tool that succeeds, and return its structured answer."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that fails, and return what it tells the agent."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return " ".join(getattr(part, "text", "") for part in result.content)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_an_agent_finds_its_way_from_the_list_to_a_document(tickets: Office, mode: Protocol) -> None:
    async with agent(tickets.serving(anonymous=True), mode=mode) as client:
        (index,) = (await called(client, "list_indexes"))["indexes"]
        found = await called(
            client, "search", index=index["name"], query="printer", k=3, filter={"status": "open"}, mode="text"
        )
        best = found["hits"][0]
        document = await called(client, "fetch", index=index["name"], key=best["key"])
    assert len(found["hits"]) == 3
    assert "printer" in best["content"]
    assert document["chunks"] == [best["content"]]
    assert "not instructions" in found["note"]


async def test_tools_say_that_they_only_read(tickets: Office) -> None:
    async with agent(tickets.serving(anonymous=True)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"list_indexes", "search", "fetch"}
    for tool in tools.values():
        assert tool.annotations is not None
        assert (tool.annotations.read_only_hint, tool.annotations.destructive_hint) == (True, False)
    assert "context" not in tools["search"].input_schema["properties"]
    told = [
        tools["search"].input_schema["properties"]["filter"]["description"],
        describe(tickets.config.serve)["components"]["schemas"]["SearchRequest"]["properties"]["filter"]["description"],
        str(cdcsync.Index.search.__doc__),
        (ROOT / "docs" / "searching.md").read_text(encoding="utf-8"),
    ]
    assert all(re.search(rf"\b{one}\b", text) for one in FILTER_OPERATORS for text in told)
    described = tools["search"].input_schema["properties"]["filter"]["description"]
    assert (
        described
        == describe(tickets.config.serve)["components"]["schemas"]["SearchRequest"]["properties"]["filter"][
            "description"
        ]
    )
    assert all(re.search(rf"\b{operator}\b", described) for operator in FILTER_OPERATORS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"index": "nothing", "query": "a"}, "There are: tickets"),
        ({"index": "tickets", "query": "a", "k": 0}, "1 to 50"),
        ({"index": "tickets", "query": "a", "filter": {"author": "ana"}}, "The columns are"),
        ({"index": "tickets", "query": "a", "filter": {"opened": {"between": 1}}}, "The operators are"),
        ({"index": "tickets", "query": "a", "filter": {"opened": "soon"}}, "opened"),
        ({"index": "tickets", "query": "a", "filter": {"opened": json.loads("[" * 50 + "]" * 50)}}, "too deep"),
        ({"index": "tickets", "query": "a", "filter": {"opened": json.loads("[" * 150 + "]" * 150)}}, "too deep"),
        ({"index": "tickets"}, "query is required"),
        ({"index": "tickets", "query": "a\0b"}, "no text can hold. Send the query as a text, without NUL"),
        ({"index": "tickets", "query": "a", "filter": {"status": "\0"}}, "no text can hold. Give values by column"),
        ({"index": "tickets", "query": 7}, "query must be a text"),
        ({"index": "tickets", "query": "a", "k": "many"}, "k must be a whole number"),
        ({"index": "tickets", "query": "a", "filter": "open"}, "filter must be an object"),
        ({"index": "tickets", "query": "a", "mode": "both"}, "mode must be 'hybrid', 'vector' or 'text'"),
        ({"index": "tickets", "query": "a", "limit": 3}, "There are: index, query, k, filter, mode, skip"),
    ],
)
async def test_a_wrong_call_is_told_what_to_change(tickets: Office, arguments: dict[str, Any], told: str) -> None:
    async with agent(tickets.serving(anonymous=True)) as client:
        said = await refusal(client, "search", **arguments)
    assert told in said
    assert "pydantic" not in said
    assert "validation error" not in said


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
async def test_a_blank_query_finds_nothing(tickets: Office, mode: str) -> None:
    async with agent(tickets.serving(anonymous=True)) as client:
        found = [await called(client, "search", index="tickets", query=text, mode=mode) for text in ("", " ", "\u3000")]
    assert [one["hits"] for one in found] == [[], [], []]


async def test_answers_keep_to_a_budget_and_say_what_was_left_out(tickets: Office) -> None:
    async with agent(tickets.serving(anonymous=True, answer_tokens=100)) as client:
        found = await called(client, "search", index="tickets", query="room", k=50)
    assert 1 <= len(found["hits"]) < 50
    assert found["left_out"] == 50 - len(found["hits"])


INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
SPOKEN = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "search.example.org"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "elsewhere.example.org"}, 403),
        ({"Origin": "https://app.example.org"}, 200),
        ({"Origin": "http://localhost:6274"}, 200),
        ({"Host": "search.example.org", "Origin": "http://search.example.org"}, 200),
        ({"Origin": "https://elsewhere.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[nonsense"}, 403),
    ],
)
async def test_hosts_and_origins_of_the_configuration_are_answered(
    tickets: Office, headers: dict[str, str], status: int
) -> None:
    config = tickets.serving(anonymous=True, hosts=("search.example.org",), cors_origins=("https://app.example.org",))
    async with served(config) as plain:
        answer = await plain.post("/mcp", json=INITIALIZE, headers={**SPOKEN, **headers})
    assert answer.status_code == status


async def test_a_message_is_bounded_as_every_request_is(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True, max_body_bytes=2_000)) as plain:
        answers = [
            await plain.post("/mcp", json={**INITIALIZE, "more": "a" * size}, headers=SPOKEN) for size in (10, 3_000)
        ]
    assert [answer.status_code for answer in answers] == [200, 413]


MODERN = "2026-07-28"
"""A version of the protocol that has no sessions, whose messages another part of the SDK reads."""


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("arguments", ['"query": "a", "filter": {{"id": {}}}', '"query": {}'])
async def test_lists_in_lists_without_an_end_are_refused(tickets: Office, arguments: str, modern: bool) -> None:
    nested = arguments.format("[" * 100_000 + "]" * 100_000)
    body = (
        '{"jsonrpc": "2.0", "id": 1, "method": "tools/call",'
        f' "params": {{"name": "search", "arguments": {{"index": "tickets", {nested}}}}}}}'
    )
    headers = SPOKEN | ({"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call"} if modern else {})
    async with served(tickets.serving(anonymous=True, max_body_bytes=10**6)) as plain:
        answer = await plain.post("/mcp", content=body.encode(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32700)


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_there_is_no_stream_to_listen_to_and_no_session_to_end(tickets: Office, method: str) -> None:
    async with served(tickets.serving(anonymous=True)) as plain:
        answer = await plain.request(method, "/mcp", headers=SPOKEN)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_nothing_is_offered_to_listen_for(tickets: Office) -> None:
    async with agent(tickets.serving(anonymous=True)) as client:
        assert client.server_capabilities.tools is not None
        assert not client.server_capabilities.tools.list_changed
        with pytest.raises(MCPError, match="Method not found"):
            async with client.listen(tools_list_changed=True):
                pass


async def test_an_agent_sees_its_tenant_alone(tickets: Office, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    token = new_token(tokens, "agent", {"tenant": "t2"}, None)
    config = tickets.serving(tokens_file=str(tokens), tenant=tenant())
    async with agent(config, token) as client:
        found = await called(client, "search", index="tickets", query="printer", k=50)
        hidden = await refusal(client, "fetch", index="tickets", key={"id": 4})
    assert {hit["key"]["id"] % 3 for hit in found["hits"]} == {2}
    assert "no document" in hidden
    async with served(config) as plain:
        stranger = await plain.post("/mcp", json={})
    assert (stranger.status_code, stranger.headers["www-authenticate"]) == (401, "Bearer")


async def test_keys_of_several_columns_go_by_name_and_a_tenant_among_them_is_the_callers(
    database: Database, make_pipeline: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    database.execute(
        "CREATE TABLE notes (tenant text, id int, title text, PRIMARY KEY (tenant, id));"
        " INSERT INTO notes SELECT 't' || t, i, format('note %s of t%s', i, t)"
        " FROM generate_series(1, 2) AS t, generate_series(1, 3) AS i"
    )
    pipeline = make_pipeline(configuration(database.dsn, indexes={"notes": {"search": "english"}}))
    worker = pipeline.start()
    pipeline.live()
    pipeline.stop(worker)
    path = tmp_path / "tokens.json"
    token = new_token(path, "ana", {"tenant": "t1"}, None)
    for_all = Serve(listen="127.0.0.1:0", dsn=database.dsn, anonymous=True)
    for_tenants = Serve(listen="127.0.0.1:0", dsn=database.dsn, tokens_file=str(path), tenant=tenant())
    async with agent(msgspec.structs.replace(pipeline.config, serve=for_all)) as client:
        found = await called(client, "fetch", index="notes", key={"id": 2, "tenant": "t2"})
        assert found["chunks"] == ["note 2 of t2"]
        assert "the key has the columns tenant, id" in await refusal(
            client, "fetch", index="notes", key={"id": 2, "owner": "t2"}
        )
    async with agent(msgspec.structs.replace(pipeline.config, serve=for_tenants), token) as client:
        hit = (await called(client, "search", index="notes", query="note 3"))["hits"][0]
        assert hit["key"] == {"id": 3}
        assert (await called(client, "fetch", index="notes", key=hit["key"]))["chunks"] == ["note 3 of t1"]
        refused = [
            await refusal(client, "fetch", index="notes", key=key) for key in ({"id": 3, "tenant": "t2"}, {"no": 3})
        ]
    assert all(one.endswith("the key has the columns id. Give a value for each, none of them null.") for one in refused)


def never_answered_by(silent: socket.socket, dsn: str, **settings: int) -> str:
    """Return a DSN that leads to a server which takes connections and says nothing."""
    return conninfo.make_conninfo(dsn, host="127.0.0.1", port=silent.getsockname()[1], **settings)


def over_stdio(tickets: Office, directory: Path, token: str | None = None, **serve: Any) -> StdioServerParameters:
    """Return how a client starts the server, with these lines in its section."""
    text = (tickets.directory / "cdcsync.toml").read_text()
    path = directory / "cdcsync.toml"
    lines = "".join(f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in serve.items())
    path.write_text(text.replace("[serve]\n", f"[serve]\n{lines}"))
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "cdcsync", "serve", "--stdio", "-c", str(path)],
        env={"CDCSYNC_TOKEN": token} if token else {},
    )


async def test_over_standard_input_and_output_the_token_is_in_the_environment(tickets: Office, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    token = new_token(tokens, "desktop", {"tenant": "t1"}, None)
    dsn = conninfo.make_conninfo(tickets.database.dsn, user=tickets.reader, password="reader")
    server = over_stdio(tickets, tmp_path, token, dsn=dsn, tokens_file=str(tokens))
    async with Client(server) as client:
        found = await called(client, "search", index="tickets", query="printer", k=50)
    assert {hit["key"]["id"] % 3 for hit in found["hits"]} == {1}


@pytest.mark.parametrize("token", [None, "cdcsync_unknown"])
async def test_over_standard_input_and_output_a_client_without_a_token_is_told_where_to_put_it(
    tickets: Office, tmp_path: Path, token: str | None
) -> None:
    new_token(tmp_path / "tokens.json", "desktop", {"tenant": "t1"}, None)
    async with Client(over_stdio(tickets, tmp_path, token, tokens_file=str(tmp_path / "tokens.json"))) as client:
        told = await refusal(client, "list_indexes")
    assert told.endswith("Set CDCSYNC_TOKEN in the environment of the program that starts `cdcsync serve --stdio`.")
    assert "Authorization" not in told


async def test_over_standard_input_and_output_a_client_is_answered_before_the_target_is(
    tickets: Office, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # Whoever waits for this server waits for longer than a test may take.
        dsn = never_answered_by(silent, tickets.database.dsn, connect_timeout=3_600)
        tokens = tmp_path / "tokens.json"
        token = new_token(tokens, "desktop", {"tenant": "t1"}, None)
        server = over_stdio(tickets, tmp_path, token, dsn=dsn, tokens_file=str(tokens), deadline_s=1.0)
        async with Client(server) as client:
            assert len((await client.list_tools()).tools) == 3
            assert "ended after 1 s" in await refusal(client, "list_indexes")


async def test_over_standard_input_and_output_the_tools_say_what_an_operator_can_change(
    tickets: Office, tmp_path: Path
) -> None:
    dsn = conninfo.make_conninfo(tickets.database.dsn, dbname="no_such_database")
    tokens = tmp_path / "tokens.json"
    token = new_token(tokens, "desktop", {"tenant": "t1"}, None)
    async with Client(over_stdio(tickets, tmp_path, token, dsn=dsn, tokens_file=str(tokens))) as client:
        told = await refusal(client, "search", index="tickets", query="printer")
    assert "no_such_database" in told
    assert told.endswith("Create it, or correct the database name in the DSN.")


async def test_a_target_that_does_not_answer_is_said_to_be_away_before_the_call_s_deadline(tickets: Office) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = never_answered_by(silent, tickets.database.dsn)
        serve = Serve(listen="127.0.0.1:0", dsn=dsn, anonymous=True, deadline_s=8.0)
        async with agent(msgspec.structs.replace(tickets.config, serve=serve)) as client:
            assert "the database does not answer now" in await refusal(client, "list_indexes")


# -- the page for people who connect agents -------------------------------------------------------------------------

TRANSCRIPT = re.compile(r"```text transcript\n(.*?)```", re.DOTALL)
CALL = re.compile(r"^→ (\w+) (.*)$", re.MULTILINE)
VOLATILE = {"as_of_lsn": "0/1B8F2A0", "lag_seconds": 0.4, "etag": '"3f9ac2…"'}
"""Values that differ each time."""


def shown(value: Any) -> Any:
    """Return an answer as the page shows it."""
    match value:
        case dict():
            return {name: VOLATILE.get(name, shown(one)) for name, one in value.items()}
        case list():
            return [shown(one) for one in value]
        case float():
            return round(value, 4)
        case _:
            return value


async def transcript(client: Client, calls: list[tuple[str, str]]) -> str:
    """Make calls and return them with their answers, as the page shows them."""
    parts: list[str] = []
    for tool, arguments in calls:
        result = await client.call_tool(tool, json.loads(arguments))
        if result.is_error:
            answer = " ".join(getattr(part, "text", "") for part in result.content)
        else:
            answer = json.dumps(shown(result.structured_content), indent=2, ensure_ascii=False)
        parts.append(f"→ {tool} {arguments}\n{'✗' if result.is_error else '←'} {answer}\n")
    return "\n".join(parts)


async def test_the_transcript_on_the_page_is_what_a_client_sees(tickets: Office) -> None:
    page = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
    (block,) = TRANSCRIPT.findall(page)
    async with agent(tickets.serving(anonymous=True)) as client:
        assert await transcript(client, CALL.findall(block)) == block


SENT = "swordfish"

MESSAGES: tuple[Any, ...] = (
    SENT,
    [SENT],
    {"jsonrpc": SENT, "id": 1, "method": "tools/list"},
    {"jsonrpc": "2.0", "id": {"a": SENT}, "method": "tools/list"},
    {"jsonrpc": "2.0", "id": 1, "method": SENT},
    {"jsonrpc": "2.0", "id": 1, "method": {"a": SENT}},
    {"jsonrpc": "2.0", "id": SENT, "error": {"code": SENT, "message": SENT}},
    {"jsonrpc": "2.0", "method": f"notifications/{SENT}", "params": {SENT: SENT}},
    {"jsonrpc": "2.0", "id": 1, "method": "prompts/get", "params": {"name": SENT}},
    {"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": SENT}},
    {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": SENT, "clientInfo": SENT}},
    {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": SENT, "arguments": {}}},
    {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "search", "arguments": SENT}},
    *(
        {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
        for name, arguments in (
            ("search", {"index": "tickets", "query": [SENT]}),
            ("search", {"index": SENT, "query": SENT, "mode": SENT}),
            ("search", {"index": "tickets", "query": f"{SENT}\0", "filter": {"opened": SENT}}),
            ("search", {"index": "tickets", "query": SENT, "filter": {SENT: {SENT: SENT}}}),
            ("fetch", {"index": "tickets", "key": {"id": SENT}}),
            ("fetch", {"index": "tickets", "key": {"id": {SENT: SENT}}}),
        )
    ),
)


@pytest.mark.usefixtures("logging_restored")
async def test_no_log_repeats_what_a_caller_sent(tickets: Office) -> None:
    written = io.StringIO()
    async with served(tickets.serving(anonymous=True)) as client:
        logs.configure("debug", "json", written)
        for message in MESSAGES:
            await client.post("/mcp", json=message, headers={"Accept": "application/json, text/event-stream"})
    assert written.getvalue()
    assert SENT not in written.getvalue()
