"""Indexes as callers see them: each its own tenant's rows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import structlog
import structlog.testing
from psycopg import conninfo

from cdcsync.config.serving import Tenant
from cdcsync.serve.identity import new_token
from cdcsync.serve.reader import UNHELD, Reader
from cdcsync.serve.service import Service
from cdcsync.tracing import Tracing
from tests.support.serving import Office, ask, bearer, served, with_tokens

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


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


@pytest.mark.parametrize("logs_in_as", ["the role", "another role", "the owner"])
async def test_a_server_that_row_level_security_does_not_concern_says_so(
    tickets: Office, tokens: Path, logs_in_as: str
) -> None:
    serve = with_tokens(tickets, tokens, role="somebody_else" if logs_in_as == "another role" else tickets.reader).serve
    if logs_in_as == "the owner":
        owner = conninfo.conninfo_to_dict(tickets.database.dsn)["user"]
        serve = msgspec.structs.replace(serve, dsn=tickets.database.dsn, role=owner)
    reader = Reader(msgspec.structs.replace(tickets.config, serve=serve), Tracing())
    with structlog.testing.capture_logs() as logs:
        await reader.load()
    await reader.aclose()
    told = [(line["index"], line["fix"]) for line in logs if line["event"] == "tenants_not_held"]
    assert told == ([] if logs_in_as == "the role" else [("tickets", UNHELD)])


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
