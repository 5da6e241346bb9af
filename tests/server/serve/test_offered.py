"""Indexes as callers see them: each its own tenant's rows, and how fresh they are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import anyio.to_thread
import httpx2
import msgspec
import pytest
import structlog
import structlog.testing

from cdcsync.config.serving import Serve, Tenant
from cdcsync.serve import offered
from cdcsync.serve.identity import Principal, new_token
from cdcsync.serve.reader import Reader
from cdcsync.serve.service import Service
from cdcsync.tracing import Tracing
from tests.support.configs import Section
from tests.support.searched import TEXTS, indexed
from tests.support.servers import Database, Server, fresh_database
from tests.support.serving import Office, ask, bearer, office, served, with_tokens
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


class Kind(msgspec.Struct, frozen=True):
    """A type of the tenant's column.

    :ivar mine: how rows 1 to 3 have the one tenant, and `other` how rows 4 to 6 have the other one.
    :ivar claims: how tokens may write the one tenant.
    :ivar nobody: claims that are values of the type, and no tenant's.
    :ivar wrong: claims that are no values of the type.
    """

    type: str
    mine: tuple[str, str, str]
    other: str
    claims: tuple[str | int, ...]
    nobody: tuple[str | int, ...] = ()
    wrong: tuple[str, ...] = ("abc", "")


ID = "5f0c2a1e-8f4b-4c55-9f0e-0a6b1c2d3e4f"
KINDS = {
    "of_integer": Kind("integer", ("1",) * 3, "2", ("1", 1, "01", " 1 "), (3,), ("abc", "", "1.5", "99999999999")),
    "of_bigint": Kind("bigint", ("1",) * 3, "2", ("1", 1, "+1"), (99999999999,), ("abc", "1e3")),
    "of_uuid": Kind("uuid", (ID,) * 3, ID.replace("5", "6"), (ID, ID.upper(), f"{{{ID}}}"), (ID.replace("5", "7"),)),
    "of_money": Kind("numeric(10, 2)", ("1",) * 3, "1.01", ("1", 1, "1.00", "01.0"), ("1.004",)),
    "of_numeric": Kind("numeric", ("1", "1.0", "1.00"), "1.001", ("1", "1.0", "1.000"), (2,)),
    "of_text": Kind("text", ("1",) * 3, "01", ("1", 1), ("1 ", "", "A"), ()),
    "of_varchar": Kind("varchar(5)", ("abcde",) * 3, "abc", ("abcde",), ("abcdef", "ABCDE"), ()),
    # These cut what is too long for them.
    "of_name": Kind("name", ("a" * 63,) * 3, "b", ("a" * 63,), ("c",), ("a" * 64,)),
    "of_letter": Kind('"char"', ("a",) * 3, "b", ("a",), ("c",), ("ab",)),
    "of_boolean": Kind("boolean", ("true",) * 3, "false", ("true", "t", "Yes"), (), ("maybe", "2")),
}
OWN, OTHERS = [1, 2, 3], [4, 5, 6]


@pytest.fixture(scope="module")
def kinds(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """Live indexes, each with a tenant's column of another type."""
    tables, indexes = "", dict[str, Section]()
    for name, kind in KINDS.items():
        tenants = ", ".join(
            f"({at}, '{one}', 'note {at}')" for at, one in enumerate([*kind.mine, *[kind.other] * 3], 1)
        )
        tables += f"CREATE TABLE {name} (id int PRIMARY KEY, tenant {kind.type}, title text);"
        tables += f"INSERT INTO {name} VALUES {tenants};"
        indexes[name] = {"columns": ["tenant"], "indexed": ["tenant"], "search": "english"}
    with (
        fresh_database(server) as database,
        office(server, database, tmp_path_factory.mktemp("kinds"), tables=tables, indexes=indexes) as made,
    ):
        yield made


class Seen(msgspec.Struct, frozen=True):
    """What a caller is answered: statuses, and the rows that are shown."""

    search: int
    found: list[int]
    fetched: list[int]
    by_mcp: list[int]
    examples: list[int]


async def seen(client: httpx2.AsyncClient, index: str, token: str) -> Seen:
    """Ask every tool."""
    path, headers = f"/v1/indexes/{index}", bearer(token)
    answer = await client.post(f"{path}/search", json={"query": "note", "k": 50}, headers=headers)
    statuses, by_mcp = [], []
    for key in (*OWN, *OTHERS):
        statuses.append((await client.get(f"{path}/documents/{key}", headers=headers)).status_code)
        arguments = {"index": index, "key": {"id": key}}
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "fetch", "arguments": arguments}}
        accept = {"Accept": "application/json, text/event-stream"}
        fetched = (await client.post("/mcp", json=call, headers={**headers, **accept})).json()["result"]
        if not fetched.get("isError"):
            by_mcp.append(fetched["structuredContent"]["key"]["id"])
    (listed,) = (await client.get("/v1/indexes", headers=headers)).json()["indexes"]
    found = sorted(hit["key"]["id"] for hit in answer.json().get("hits", ()))
    return Seen(answer.status_code, found, statuses, by_mcp, listed["key"][0]["examples"])


def of_kind(kinds: Office, tokens: Path, index: str, *, held: bool) -> Any:
    """Return the configuration of a server of one index, which row-level security holds to its tenants or not."""
    more = {"indexes": (index,), "requests_per_s": 10**6, "burst": 10**6}
    config = with_tokens(kinds, tokens, role=kinds.reader if held else None, **more)
    if held:
        return config
    return msgspec.structs.replace(config, serve=msgspec.structs.replace(config.serve, dsn=kinds.database.dsn))


@contextlib.asynccontextmanager
async def told(config: Any) -> AsyncIterator[tuple[httpx2.AsyncClient, list[Any]]]:
    """Serve, and yield a client and the log."""
    with structlog.testing.capture_logs() as logs:
        async with served(config) as client:
            yield client, logs


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("held", [True, False], ids=["with a role", "without one"])
@pytest.mark.parametrize("index", KINDS)
async def test_every_tool_finds_the_same_rows_for_a_claim_however_it_is_written(
    kinds: Office, tokens: Path, index: str, held: bool
) -> None:
    kind = KINDS[index]
    async with told(of_kind(kinds, tokens, index, held=held)) as (client, logs):
        for claim in kind.claims:
            token = new_token(tokens, "ana", {"tenant": claim}, None)
            own = Seen(200, OWN, [200] * 3 + [404] * 3, OWN, OWN)
            assert await seen(client, index, token) == own, claim
        for claim in kind.nobody:
            token = new_token(tokens, "ben", {"tenant": claim}, None)
            assert await seen(client, index, token) == Seen(200, [], [404] * 6, [], []), claim
        assert [line for line in logs if line["event"] == "claim_not_a_value"] == []
        for number, claim in enumerate(kind.wrong, 1):
            token = new_token(tokens, "cleo", {"tenant": claim}, None)
            assert await seen(client, index, token) == Seen(403, [], [403] * 6, [], []), claim
            assert len([line for line in logs if line["event"] == "claim_not_a_value"]) == number
            refused = await client.post(f"/v1/indexes/{index}/search", json={"query": "note"}, headers=bearer(token))
            assert refused.json() == {
                "title": "Not allowed",
                "status": 403,
                "detail": f"the token's tenant is none that the index {index} can have",
                "fix": "ask for a token with another one",
            }


@pytest.mark.proof_from(4)
@pytest.mark.parametrize("index", KINDS)
async def test_the_policy_alone_finds_the_same_rows(kinds: Office, tokens: Path, index: str) -> None:
    def without_filter(service: Service) -> None:
        service.reader.index(index).visible.filter = lambda who, spec, wanted: dict(wanted)  # type: ignore[method-assign]

    kind = KINDS[index]
    async with served(of_kind(kinds, tokens, index, held=True), before=without_filter) as client:
        for claim in (*kind.claims, *kind.nobody):
            token = new_token(tokens, "ana", {"tenant": claim}, None)
            assert (await seen(client, index, token)).found == (OWN if claim in kind.claims else []), claim


async def test_an_index_that_somebody_has_locked_is_listed_without_examples_beside_the_others(kinds: Office) -> None:
    config = kinds.serving(anonymous=True, indexes=("of_text", "of_uuid"))
    with kinds.database.connect() as holder, holder.transaction():
        holder.execute("LOCK TABLE cdcsync.of_text_chunks IN ACCESS EXCLUSIVE MODE")
        async with served(config) as client:
            answer = await client.get("/v1/indexes")
    assert answer.status_code == 200
    locked, other = answer.json()["indexes"]
    assert [(one["name"], one["examples"]) for one in (*locked["key"], *locked["columns"])] == [
        ("id", []),
        ("tenant", []),
    ]
    assert (locked["state"], bool(locked["as_of_lsn"])) == ("live", True)
    assert other["key"][0]["examples"] == OWN


@pytest.mark.parametrize("index", ["of_integer", "of_uuid"])
async def test_examples_of_a_tenant_are_found_by_the_index_on_its_column(
    kinds: Office, tokens: Path, index: str
) -> None:
    def scans() -> int:
        with kinds.database.connect() as connection:
            row = connection.execute(
                "SELECT sum(s.idx_scan)::int FROM pg_stat_user_indexes AS s JOIN pg_indexes AS i ON i.indexname ="
                " s.indexrelname AND i.schemaname = s.schemaname WHERE s.relname = %s AND i.indexdef LIKE '%%(tenant)'",
                [f"{index}_chunks"],
            ).fetchone()
        assert row is not None
        return int(row[0])

    token = new_token(tokens, "ana", {"tenant": KINDS[index].claims[0]}, None)
    before = scans()
    kinds.database.execute(f"ALTER ROLE {kinds.reader} SET enable_seqscan = off")  # these tables are small
    try:
        async with served(of_kind(kinds, tokens, index, held=True)) as client:
            (listed,) = (await client.get("/v1/indexes", headers=bearer(token))).json()["indexes"]
    finally:
        kinds.database.execute(f"ALTER ROLE {kinds.reader} RESET enable_seqscan")
    assert listed["key"][0]["examples"] == OWN
    await anyio.to_thread.run_sync(until, lambda: scans() > before, "the index to be counted")


NOT_IN_STEP = {
    "paused": "state = 'paused', reason = 'row 7 is too long', paused_at = now()",
    "no longer followed": "unfollowed_at = now()",
    "being built": "state = 'building'",
}


@pytest.mark.parametrize("said", [*NOT_IN_STEP, "being completed"])
async def test_the_position_of_an_index_that_is_not_kept_in_step_is_null_and_the_answer_says_why(
    kinds: Office, said: str
) -> None:
    names = ("of_text", "of_uuid")
    execute = kinds.database.execute
    async with served(kinds.serving(anonymous=True, indexes=names, deadline_s=2.0)) as client:
        try:
            if said in NOT_IN_STEP:
                execute(f"UPDATE cdcsync.indexes SET {NOT_IN_STEP[said]} WHERE name = 'of_text'")
            else:
                execute(
                    "INSERT INTO cdcsync.backfills (index_name, kind, state) VALUES ('of_text', 'resync', 'running')"
                )
            found, beside = [
                (await client.post(f"/v1/indexes/{name}/search", json={"query": "note"})).json() for name in names
            ]
            wanted = {"query": "note", "after_lsn": "FFFFFFFF/0"}
            refused = await client.post("/v1/indexes/of_text/search", json=wanted)
            listed = (await client.get("/v1/indexes")).json()["indexes"]
        finally:
            execute(
                "UPDATE cdcsync.indexes SET state = 'live', reason = NULL, paused_at = NULL, unfollowed_at = NULL"
                " WHERE name = 'of_text'; DELETE FROM cdcsync.backfills WHERE state = 'running'"
            )
    for answer in (found, listed[0]):
        assert (answer["as_of_lsn"], answer["lag_seconds"]) == (None, None)
        assert f"the index 'of_text' is {said}" in answer["warning"]
        assert answer["warning"].count("of_text") == 1
        assert "row 7" not in answer["warning"]
    assert len(found["hits"]) == 6
    assert (refused.status_code, refused.json()["detail"]) == (503, listed[0]["warning"])
    for answer in (beside, listed[1]):
        assert answer["as_of_lsn"]
        assert answer["lag_seconds"] >= 0
        assert answer["warning"] is None


async def test_a_document_is_of_what_the_index_is_made_of_now(database: Database) -> None:
    async with indexed(database) as (index, config):
        config = msgspec.structs.replace(config, serve=Serve(listen="127.0.0.1:0", anonymous=True, audit_days=0))
        run = index.connection.execute

        async with served(config) as client:

            async def fetched() -> tuple[int, Any]:
                answer = await client.get("/v1/indexes/articles/documents/1")
                return answer.status_code, answer.json().get("columns")

            assert await fetched() == (200, {"tenant": 1})
            # Other chunks took the place of these, whose tables are gone.
            for relation in ("chunks", "backlog", "vectors_1"):
                await run(f'ALTER TABLE cdcsync.articles_{relation} RENAME TO "articles~2_{relation}"'.encode())
            await run("UPDATE cdcsync.indexes SET stem = 'articles~2'")
            assert await fetched() == (200, {"tenant": 1})
            await run('ALTER TABLE cdcsync."articles~2_chunks" DROP COLUMN tenant CASCADE')
            await run("UPDATE cdcsync.indexes SET columns = '{}'")
            assert await fetched() == (200, {})
            (listed,) = (await client.get("/v1/indexes")).json()["indexes"]
            assert (listed["state"], listed["columns"]) == ("live", [])
            await run('DROP TABLE cdcsync."articles~2_chunks" CASCADE')
            assert (await fetched())[0] == 503


async def test_of_a_document_no_more_is_read_than_an_answer_may_hold(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = TEXTS["1"]
    async with indexed(database) as (_, config):
        config = msgspec.structs.replace(config, serve=Serve(listen="127.0.0.1:0", anonymous=True, audit_days=0))
        services: list[Service] = []
        async with served(config, before=services.append) as client:
            index, anybody = services[0].reader.index("articles"), Principal("anonymous")
            for most, chunks in ((1, [first]), (len(first), [first]), (len(first) + 1, [first, second])):
                document = await index.document(anybody, ["1"], cut_bytes=most)
                assert (document.chunks, document.left_out) == (chunks, 2 - len(chunks))
            whole = await client.get("/v1/indexes/articles/documents/1")
            assert (whole.json()["chunks"], whole.json()["left_out"]) == ([first, second], 0)
            monkeypatch.setattr(offered, "DOCUMENT_BYTES", len(first))
            refused = await client.get("/v1/indexes/articles/documents/1")
            assert (refused.status_code, refused.json()["title"]) == (422, "The document is too large")
            assert (await client.get("/v1/indexes/articles/documents/2")).status_code == 200


@pytest.mark.parametrize(
    ("type_", "wrong"),
    [("regclass", "no such table"), ("integer", "one"), ("tsquery", "a b"), ("inet", "300.0.0.1"), ("jsonb", "{")],
)
async def test_what_is_no_value_of_a_type_is_a_callers_mistake_whatever_its_input_function_calls_it(
    database: Database, type_: str, wrong: str
) -> None:
    key = {"id": type_} if type_ == "regclass" else None
    async with indexed(database, carried={"of": type_}, key=key, filled=False) as (_, config):
        config = msgspec.structs.replace(config, serve=Serve(listen="127.0.0.1:0", anonymous=True, audit_days=0))
        async with served(config) as client:
            for value in (wrong, {"in": [wrong]}):
                body = {"query": "cat", "mode": "text", "filter": {"of": value}}
                answer = await client.post("/v1/indexes/articles/search", json=body)
                assert answer.status_code == 422
                assert re.match(rf"The column is of the type {re.escape(type_)}[.:]", answer.json()["fix"])
            fetched = await client.get(f"/v1/indexes/articles/documents/{quote(wrong, safe='')}")
            assert fetched.status_code == 404


async def test_a_tenant_finds_its_own_rows_and_never_sees_the_column(tickets: Office, tokens: Path) -> None:
    token = new_token(tokens, "ana", {"tenant": "t1"}, None)
    async with served(with_tokens(tickets, tokens)) as client:
        found = (await ask(client, "printer", token, k=50)).json()["hits"]
        named, absent = [await ask(client, "printer", token, filter={one: "t2"}) for one in ("tenant", "nothing")]
        own, other = [await client.get(f"/v1/indexes/tickets/documents/{key}", headers=bearer(token)) for key in (4, 5)]
        (index,) = (await client.get("/v1/indexes", headers=bearer(token))).json()["indexes"]
    assert found
    assert all(hit["key"]["id"] % 3 == 1 for hit in found)
    assert all("tenant" not in hit["columns"] for hit in found)
    assert (named.status_code, absent.status_code) == (422, 422)
    assert named.json()["detail"] == "the filter names a column that the index does not have: tenant"
    assert named.json()["fix"] == absent.json()["fix"] == "the columns are id, opened, status"
    assert (own.status_code, other.status_code) == (200, 404)
    assert "tenant" not in [column["name"] for column in index["columns"]]


async def test_nothing_is_shown_while_the_index_does_not_have_the_bound_column_yet(
    tickets: Office, tokens: Path
) -> None:
    """The configuration binds a column that no worker has added to the index so far."""
    token = new_token(tokens, "ana", {"tenant": "t1"}, None)
    config = tickets.serving(tokens_file=str(tokens), tenant=Tenant(column="room"))
    async with served(config) as client:
        answers = [
            await ask(client, "printer", token),
            *[await client.get(f"/v1/indexes/tickets/documents/{key}", headers=bearer(token)) for key in (4, 9999)],
        ]
    assert {(one.status_code, one.json()["detail"]) for one in answers} == {
        (403, "the index tickets is not divided by tenants")
    }


@pytest.mark.parametrize("tenant", [Tenant(column=None), Tenant(column="tenant")])
async def test_a_server_whose_callers_are_of_no_tenant_has_none_to_hold(tickets: Office, tenant: Tenant) -> None:
    serve = msgspec.structs.replace(tickets.serving(anonymous=True).serve, tenant=tenant)
    reader = Reader(msgspec.structs.replace(tickets.config, serve=serve), Tracing())
    assert (await reader.index("tickets").exposure() == []) == (tenant.column is None)
    await reader.aclose()


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
async def test_the_database_holds_the_tenant_even_if_our_filter_is_gone(
    tickets: Office, tokens: Path, mode: str
) -> None:
    token = new_token(tokens, "ana", {"tenant": "t1"}, None)

    def without_filter(service: Service) -> None:
        visible = service.reader.index("tickets").visible
        visible.filter = lambda who, spec, wanted: dict(wanted)  # type: ignore[method-assign]

    async with served(with_tokens(tickets, tokens), before=without_filter) as client:
        found = (await ask(client, "printer", token, k=50, mode=mode)).json()["hits"]
    assert found
    assert {hit["key"]["id"] % 3 for hit in found} == {1}


async def test_sessions_of_the_pool_do_not_carry_a_tenant_over(tickets: Office, tokens: Path) -> None:
    mine, theirs = (new_token(tokens, name, {"tenant": name}, None) for name in ("t1", "t2"))
    async with served(with_tokens(tickets, tokens, connections=1)) as client:
        for token, rest in [(mine, 1), (theirs, 2)] * 3:
            found = (await ask(client, "room", token, k=50)).json()["hits"]
            assert {hit["key"]["id"] % 3 for hit in found} == {rest}


async def test_what_somebody_raises_in_sql_is_logged_by_its_kind_alone(tickets: Office, tokens: Path) -> None:
    """A policy's function tells the row that it is about."""
    raises = "BEGIN RAISE EXCEPTION 'nobody reads %', title USING HINT = 'ask for ' || title; END"
    tickets.database.execute(
        f"CREATE FUNCTION refuse(title text) RETURNS boolean LANGUAGE plpgsql AS $${raises}$$;"
        " CREATE POLICY refuse ON cdcsync.tickets_chunks AS RESTRICTIVE USING (refuse(content))"
    )
    token = new_token(tokens, "ana", {"tenant": "t1"}, None)
    try:
        async with served(with_tokens(tickets, tokens, role=tickets.reader)) as client:
            with structlog.testing.capture_logs() as lines:
                answers = [
                    await ask(client, "printer", token),
                    await client.get("/v1/indexes/tickets/documents/4", headers=bearer(token)),
                    await client.get("/v1/indexes", headers=bearer(token)),
                ]
    finally:
        tickets.database.execute("DROP FUNCTION refuse CASCADE")
    assert [one.status_code for one in answers[:2]] == [503, 503]
    assert {line["error"] for line in lines if line["event"] == "call_failed"} == {
        "index tickets: RaiseException (P0001)"
    }
    assert "nobody reads" not in str(lines)
    assert "ask for" not in str(lines)
