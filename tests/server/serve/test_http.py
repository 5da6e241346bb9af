"""The tool server over HTTP: searches and documents, who may see what, limits, bad input, the record."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import jwt
import msgspec
import psycopg
import pytest
import structlog
import structlog.testing
from cryptography.hazmat.primitives.asymmetric import rsa
from psycopg import sql

from cdcsync import config
from cdcsync.embedders import Kind, Vectors, make_embedder
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.errors import EmbedderUnavailable
from cdcsync.serve import limits
from cdcsync.serve.identity import Principal, new_token, revoke_tokens
from cdcsync.serve.service import Service
from tests.support.serving import SEARCH, Office, ask, bearer, served, tenant, with_tokens
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
async def with_pages(tickets: Office) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server that answers pages of one origin."""
    async with served(tickets.serving(anonymous=True, cors_origins=("https://app.example.org",))) as client:
        yield client


# -- answers ----------------------------------------------------------------------------------------------------


async def test_a_search_returns_documents_with_the_ranks_of_both_legs(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        answer = await ask(client, "printer", k=5, headline=True)
        found = answer.json()
    assert answer.status_code == 200
    assert len(found["hits"]) == 5
    best = found["hits"][0]
    assert "printer" in best["content"]
    assert "<b>printer</b>" in best["headline"]
    assert best["text_rank"] is not None
    assert set(best["columns"]) == {"tenant", "status", "opened"}
    assert found["as_of_lsn"]
    assert found["lag_seconds"] >= 0
    assert found["warning"] is None


async def test_a_document_whose_chunks_are_others_has_another_mark(tickets: Office) -> None:
    path, change = "/v1/indexes/tickets/documents/8", "UPDATE cdcsync.tickets_chunks SET content = {} WHERE id = 8"
    async with served(tickets.serving(anonymous=True)) as client:
        before = (await client.get(path)).headers["etag"]
        tickets.database.execute(change.format("content || '.'"))
        try:
            assert (await client.get(path)).headers["etag"] != before
        finally:
            tickets.database.execute(change.format("rtrim(content, '.')"))
        assert (await client.get(path)).headers["etag"] == before


async def test_filters_and_pages(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        wanted = {"status": "open", "id": {"gte": 60}}
        pages = [
            (await ask(client, "printer", k=4, skip=skip, filter=wanted, mode="text")).json()["hits"] for skip in (0, 4)
        ]
    keys = [hit["key"]["id"] for page in pages for hit in page]
    assert len(set(keys)) == len(keys) == 8
    assert all(key >= 60 and key % 2 == 0 for key in keys)


async def test_a_document_has_an_etag_and_is_not_sent_again(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        first = await client.get("/v1/indexes/tickets/documents/7")
        again = await client.get("/v1/indexes/tickets/documents/7", headers={"If-None-Match": first.headers["etag"]})
        gone = [await client.get(f"/v1/indexes/tickets/documents/{key}") for key in ("9999", "seven", "%00")]
    assert first.json()["chunks"] == ["ticket 7: the router of room 7"]
    assert (again.status_code, again.content) == (304, b"")
    assert [answer.status_code for answer in gone] == [404, 404, 404]


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("{}", 304),
        ("W/{}", 304),
        ('"another", W/{}', 304),
        ('"with, a comma",{}', 304),
        ("*", 304),
        ('"another"', 200),
        ("nonsense", 200),
    ],
)
async def test_a_document_that_a_client_has_is_known_by_its_mark(tickets: Office, condition: str, status: int) -> None:
    path = "/v1/indexes/tickets/documents/7"
    async with served(tickets.serving(anonymous=True)) as client:
        etag = (await client.get(path)).headers["etag"]
        again = await client.get(path, headers={"If-None-Match": condition.format(etag)})
    assert (again.status_code, again.headers["etag"]) == (status, etag)


async def test_a_key_is_the_whole_rest_of_the_path(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        answers = [
            await client.get(path)
            for path in (
                "/v1/indexes/tickets/documents/999999/7",
                "/v1/indexes/tickets/documents/999999%2F7",
                "/v1/indexes/tickets/documents/7/",
                "/v1/indexes/tickets%2Fdocuments%2F7",
                "/v1/indexes/tickets/documents/",
            )
        ]
    assert [answer.status_code for answer in answers] == [404] * 5


async def test_an_index_that_cannot_be_read_is_listed_with_its_state_beside_the_others(tickets: Office) -> None:
    indexes = {**tickets.config.indexes, "later": tickets.config.indexes["tickets"]}
    config = msgspec.structs.replace(tickets.serving(anonymous=True), indexes=indexes)
    with structlog.testing.capture_logs() as logs:
        async with served(config) as client:
            await anyio.to_thread.run_sync(until, lambda: any(line.get("index") == "later" for line in logs), "a log")
            logs.clear()
            lists = [(await client.get("/v1/indexes")).json()["indexes"] for _ in range(2)]
            found = await ask(client, "printer")
    for listed in lists:
        assert [(one["name"], one["state"], bool(one["columns"])) for one in listed] == [
            ("tickets", "live", True),
            ("later", "gone", False),
        ]
    assert found.status_code == 200
    assert [line["index"] for line in logs if line["event"] == "index_not_searchable"] == ["later"]


async def test_the_list_tells_what_a_filter_can_name(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        (index,) = (await client.get("/v1/indexes")).json()["indexes"]
    assert index["name"] == "tickets"
    assert {column["name"]: column["type"] for column in index["columns"]} == {
        "tenant": "text",
        "status": "text",
        "opened": "date",
    }
    assert set(index["columns"][1]["examples"]) == {"open", "closed"}


async def test_reading_ones_own_writes_waits_for_the_position(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True, deadline_s=2.0)) as client:
        reached = await ask(client, "printer", after_lsn="0/1")
        beyond = await ask(client, "printer", after_lsn="FFFFFFFF/0")
        wrong = [await ask(client, "printer", after_lsn=lsn) for lsn in ("yesterday", "", 5)]
    assert reached.status_code == 200
    assert (beyond.status_code, beyond.headers["retry-after"]) == (503, "1")
    assert [answer.status_code for answer in wrong] == [422] * 3


@pytest.mark.parametrize(("waiting", "position"), [(8, {"after_lsn": "0/1"}), (4, {})])
async def test_calls_that_wait_for_a_position_keep_others_from_nothing(
    tickets: Office, tokens: Path, waiting: int, position: dict[str, str]
) -> None:
    names = ("t0", "t1", "t2")
    mine, theirs, third = (new_token(tokens, name, {"tenant": name}, None) for name in names)
    config = with_tokens(tickets, tokens, connections=1, waiting=waiting, deadline_s=30.0)
    services: list[Service] = []
    async with served(config, before=services.append) as client, anyio.create_task_group() as tasks:
        (service,) = services
        for token in (mine, theirs):
            for _ in range(2):
                tasks.start_soon(partial(ask, client, "printer", token, after_lsn="FFFFFFFF/0"))

        def all_wait() -> bool:
            accounts = service.limits._accounts
            running = [accounts[f"tenant {name}"].running for name in names if f"tenant {name}" in accounts]
            return running[:2] == [2, 2]

        await anyio.to_thread.run_sync(until, all_wait, "all of them wait")
        answer = await ask(client, "printer", third, **position)
        assert all_wait()  # in vain
        async with service.reader._resources.pool.connection():
            await service.reader.ping()
        tasks.cancel_scope.cancel()
    assert answer.status_code == 200
    assert answer.json()["hits"]


async def test_without_the_model_words_are_searched_and_the_answer_says_so(tickets: Office) -> None:
    class Away:
        async def embed_one(self, text: str) -> object:
            raise EmbedderUnavailable("10.0.0.7 refuses the connection", where="embedders.fake")

        async def open(self) -> None:
            raise EmbedderUnavailable("nobody is at home")

        async def aclose(self) -> None:
            pass

    def without_model(service: Service) -> None:
        away: Any = Away()
        resources = service.reader.index("tickets")._resources
        away.embedder = make_embedder("fake", resources.config.embedders["fake"])
        resources.models._embedders[away.embedder.identity] = away

    with structlog.testing.capture_logs() as logs:
        async with served(tickets.serving(anonymous=True), before=without_model) as client:
            found = (await ask(client, "printer")).json()
            refused = await ask(client, "printer", mode="vector")
    assert found["hits"]
    assert found["warning"] == "searched by words alone: the model is away"  # why is for the operator
    told = [line["error"] for line in logs if line["event"] == "model_away"]
    assert told == ["embedders.fake: 10.0.0.7 refuses the connection"]
    assert refused.status_code == 503


async def test_with_a_configuration_of_another_model_words_are_searched_and_a_search_by_vector_says_what_to_do(
    tickets: Office,
) -> None:
    earlier = msgspec.structs.replace(
        tickets.serving(anonymous=True), embedders={"old": config.HashEmbedder(dimensions=24)}
    )
    with structlog.testing.capture_logs() as logs:
        async with served(earlier) as client:
            found = await ask(client, "printer")
            refused = await ask(client, "printer", mode="vector")
    assert (found.status_code, bool(found.json()["hits"])) == (200, True)
    assert found.json()["warning"] == "searched by words alone: the server cannot use the model"
    assert (refused.status_code, refused.json()["title"]) == (503, "The model cannot be used")
    assert "search by words (mode text)" in refused.json()["fix"]
    told = [line["fix"] for line in logs if line["event"] == "model_away"]
    assert told == ["search with the configuration that the worker runs with, or by words alone"]


async def test_while_a_model_is_loaded_searches_and_readyz_say_that(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_: object) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(HashEmbedder, "open", never)
    async with served(tickets.serving(anonymous=True, deadline_s=1.0)) as client:
        probed = await client.get("/readyz")
        found = await ask(client, "printer")
        refused = await ask(client, "printer", mode="vector")
    assert probed.json()["reasons"] == ["models are being loaded"]
    assert found.json()["warning"] == "searched by words alone: the model is being loaded"
    assert (refused.status_code, refused.json()["title"]) == (503, "The model is being loaded")


async def test_a_mode_that_there_is_not_is_told_with_those_that_there_are(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        refused = await ask(client, "printer", mode="semantic")
    assert refused.status_code == 422
    assert "'semantic'" in refused.json()["detail"]
    assert "it is one of hybrid, vector, text" in refused.json()["detail"]


async def test_many_texts_of_one_caller_keep_the_model_from_no_other(
    tickets: Office, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's time grows with the texts of a call, so that it has no time for many at once."""
    real = HashEmbedder.embed

    async def embed(self: HashEmbedder, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        if len(texts) > 1:
            await anyio.sleep_forever()
        return await real(self, texts, kind=kind)

    monkeypatch.setattr(HashEmbedder, "embed", embed)
    one, two = (new_token(tokens, name, {"tenant": name}, None) for name in ("t1", "t2"))
    texts = [f"{number} {'x' * 900}" for number in range(64)]
    async with served(with_tokens(tickets, tokens)) as client:
        many = await client.post("/v1/embed", json={"index": "tickets", "texts": texts}, headers=bearer(one))
        other = await ask(client, "printer", two)
        nearest = await ask(client, "another printer", two, mode="vector")
    assert (other.json()["warning"], nearest.status_code) == (None, 200)
    assert many.status_code == 200, many.text
    assert len(many.json()["vectors"]) == 64


# -- who may see what -------------------------------------------------------------------------------------------


async def test_unknown_expired_and_revoked_tokens_get_one_answer(tickets: Office, tokens: Path) -> None:
    good = new_token(tokens, "ana", {"tenant": "t1"}, None)
    revoked = new_token(tokens, "ben", {"tenant": "t1"}, None)
    expired = new_token(tokens, "cleo", {"tenant": "t1"}, -1)
    claimless = new_token(tokens, "dora", {}, None)
    async with served(with_tokens(tickets, tokens)) as client:
        before = await ask(client, "printer", revoked)
        revoke_tokens(tokens, "ben")
        answers = [await ask(client, "printer", one) for one in (revoked, expired, "cdcsync_unknown", "x", None)]
        allowed, claim = await ask(client, "printer", good), await ask(client, "printer", claimless)
    assert before.status_code == 200
    assert {(one.status_code, one.content) for one in answers} == {(401, answers[0].content)}
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert (allowed.status_code, claim.status_code) == (200, 403)
    kept = anyio.Path(tokens)
    assert good not in await kept.read_text()
    assert (await kept.stat()).st_mode & 0o077 == 0


async def test_signed_tokens_are_checked_for_key_issuer_audience_and_time(tickets: Office, tmp_path: Path) -> None:
    key, other = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())) | {"kid": "one"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [public]}))
    config = tickets.serving(
        jwks=str(tmp_path / "jwks.json"), issuer="https://id.example", audience="cdcsync", tenant=tenant()
    )
    good = {"sub": "ana", "tenant": "t1", "iss": "https://id.example", "aud": "cdcsync", "exp": time.time() + 60}

    def signed(by: rsa.RSAPrivateKey = key, kid: str = "one", **changes: Any) -> str:
        return jwt.encode({**good, **changes}, by, algorithm="RS256", headers={"kid": kid})

    wrong = [
        signed(by=other),
        signed(kid="two"),
        signed(iss="https://evil.example"),
        signed(aud="another"),
        signed(exp=time.time() - 3600),
        jwt.encode(good, "x" * 64, algorithm="HS256", headers={"kid": "one"}),
        jwt.encode(good, "", algorithm="none", headers={"kid": "one"}),
    ]
    async with served(config) as client:
        allowed = await ask(client, "printer", signed())
        refused = [(await ask(client, "printer", token)).status_code for token in wrong]
    assert allowed.status_code == 200
    assert all(hit["key"]["id"] % 3 == 1 for hit in allowed.json()["hits"])
    assert refused == [401] * len(wrong)


# -- limits -----------------------------------------------------------------------------------------------------


async def test_a_tenant_beyond_its_rate_is_told_when_to_come_back(tickets: Office, tokens: Path) -> None:
    mine, theirs = (new_token(tokens, name, {"tenant": name}, None) for name in ("t1", "t2"))
    async with served(with_tokens(tickets, tokens, requests_per_s=0.01, burst=3)) as client:
        codes = [(await ask(client, "printer", mine, mode="text")).status_code for _ in range(5)]
        limited = await ask(client, "printer", mine)
        other = await ask(client, "printer", theirs)
    assert codes == [200, 200, 200, 429, 429]
    assert int(limited.headers["retry-after"]) > 1
    assert other.status_code == 200


async def test_each_text_that_is_embedded_counts_as_a_call(tickets: Office, tokens: Path) -> None:
    mine, theirs = (new_token(tokens, name, {"tenant": name}, None) for name in ("t1", "t2"))
    async with served(with_tokens(tickets, tokens, requests_per_s=0.01, burst=3)) as client:
        body = {"index": "tickets", "texts": ["a printer", "a login", "an invoice"]}
        answers = [await client.post("/v1/embed", json=body, headers=bearer(mine)) for _ in range(2)]
        codes = [(await ask(client, "printer", token)).status_code for token in (mine, theirs)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert codes == [429, 200]


async def test_a_storm_of_one_tenant_is_shed_and_another_is_answered(
    tickets: Office, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REFUSALS_PER_S", 1_000.0)
    mine, theirs = (new_token(tokens, name, {"tenant": name}, None) for name in ("t1", "t2"))
    config = with_tokens(tickets, tokens, requests_per_s=10**6, burst=10**6, concurrency=2, connections=3)
    codes: list[int] = []
    async with served(config) as client:

        async def storm() -> None:
            codes.append((await ask(client, "printer", mine)).status_code)

        async with anyio.create_task_group() as tasks:
            for _ in range(60):
                tasks.start_soon(storm)
            other = await ask(client, "printer", theirs)
    assert other.status_code == 200
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= 1


@pytest.fixture
def stormy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Service, str], None]:
    """Return how to have a line of refusals of an account, in a moment that lasts."""
    monkeypatch.setattr(limits, "REFUSALS_PER_S", 100.0)
    monkeypatch.setattr(limits, "HELD_S", 0.5)

    def storm(service: Service, account: str) -> None:
        now = anyio.current_time()
        service.limits._now = lambda: now
        for _ in range(limits.CROWD + 2):
            service.limits.held_s(account)

    return storm


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (400, b"{", "application/json"),
        (413, b" " * 2_000, "application/json"),
        (415, b"{}", "text/plain"),
        (422, b'{"query": 7}', "application/json"),
    ],
)
async def test_a_request_that_cannot_be_read_is_a_call_as_any_other(
    tickets: Office, tokens: Path, status: int, content: bytes, kind: str
) -> None:
    token = new_token(tokens, "ana", {"tenant": "t1"}, None)
    config = with_tokens(tickets, tokens, burst=2, requests_per_s=0.01, max_body_bytes=1_000)
    async with served(config) as client:

        async def send(headers: dict[str, str]) -> int:
            headers = {"Content-Type": kind, **headers}
            return (await client.post(SEARCH, content=content, headers=headers)).status_code

        answers = [await send(headers) for headers in ({}, *[bearer(token)] * 3)]
    assert answers == [401, status, status, 429]


async def test_calls_of_a_storm_are_refused_before_they_are_read(
    tickets: Office, tokens: Path, stormy: Callable[[Service, str], None]
) -> None:
    mine, theirs = (new_token(tokens, name, {"tenant": name}, None) for name in ("t1", "t2"))
    config = with_tokens(tickets, tokens, requests_per_s=0.001, burst=1)
    tickets.database.execute("TRUNCATE cdcsync.calls")
    async with served(config, before=lambda service: stormy(service, "tenant t1")) as client:
        allowed = await ask(client, "printer", mine)
        malformed = await client.post(SEARCH, content=b"{", headers=bearer(mine))
        listed = await client.get("/v1/indexes", headers=bearer(mine))
        agent = await client.post("/mcp", content=b"{", headers=bearer(mine))
        other = await client.post(SEARCH, content=b"{", headers=bearer(theirs))
        probes = [(await client.get(path)).status_code for path in ("/livez", "/readyz", "/metrics", "/")]
    assert [one.status_code for one in (allowed, malformed, listed, agent, other)] == [200, 429, 429, 429, 400]
    assert malformed.json()["detail"] == "more than 0.001 calls a second"
    assert int(malformed.headers["retry-after"]) > 1
    assert "content-security-policy" in malformed.headers
    assert probes == [200] * 4
    query = "SELECT tool, index_name FROM cdcsync.calls WHERE subject = 't1' AND outcome = 'limited' ORDER BY at"
    refused = [("search", "tickets"), ("list_indexes", None), ("mcp", None)]
    await anyio.to_thread.run_sync(until, lambda: tickets.database.execute(query) == refused, "records of the refused")


async def test_calls_without_a_known_token_are_held_back_and_others_are_answered(
    tickets: Office, tokens: Path, stormy: Callable[[Service, str], None]
) -> None:
    good = new_token(tokens, "ana", {"tenant": "t1"}, None)
    held: list[float] = []

    def storm(service: Service) -> None:
        stormy(service, limits.STRANGERS)
        line = service.limits.held_s

        def noted(account: str) -> float:
            held.append(line(account))
            return held[-1]

        service.limits.held_s = noted  # type: ignore[method-assign]

    async with served(with_tokens(tickets, tokens), before=storm) as client:
        known = await ask(client, "printer", good)
        strangers = [await client.post(path, content=b"{", headers=bearer("unknown")) for path in (SEARCH, "/mcp")]
    assert (known.status_code, [one.status_code for one in strangers]) == (200, [401, 401])
    assert len(held) == 2
    assert min(held) > 0


@pytest.mark.parametrize("path", [SEARCH, "/v1/embed", "/mcp"])
@pytest.mark.parametrize("sent", [0, 1_000, 60_000])
async def test_a_stranger_is_refused_before_its_request_is_read_and_the_connection_goes_on(
    tickets: Office, tokens: Path, path: str, sent: int
) -> None:
    known = new_token(tokens, "ana", {"tenant": "t1"}, None)
    size = 60_000
    async with served(with_tokens(tickets, tokens)) as client, await anyio.connect_tcp(*_address(client)) as stream:

        async def send(method: str, token: str, length: int) -> None:
            head = f"{method} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}"
            await stream.send(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode())

        async def status() -> int:
            answer = b""
            with anyio.fail_after(10):
                while b"\r\n\r\n" not in answer:
                    answer += await stream.receive()
                head, _, body = answer.partition(b"\r\n\r\n")
                length = int(next(line.split(b":")[1] for line in head.split(b"\r\n") if b"content-length" in line))
                while len(body) < length:
                    body += await stream.receive()
            assert len(body) == length
            return int(head.split()[1])

        await send(f"POST {path}", "unknown", size)
        await stream.send(b"x" * sent)
        assert await status() == 401
        await stream.send(b"x" * (size - sent))
        await send("GET /v1/indexes", known, 0)
        assert await status() == 200


def _address(client: httpx2.AsyncClient) -> tuple[str, int]:
    assert client.base_url.port is not None
    return client.base_url.host, client.base_url.port


async def test_a_days_budget_of_text_ends(tickets: Office, tokens: Path) -> None:
    token = new_token(tokens, "ana", {"tenant": "t1"}, None)
    async with served(with_tokens(tickets, tokens, tokens_per_day=20)) as client:
        first, second = await ask(client, "printer", token), await ask(client, "printer", token)
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["title"] == "The day's budget is used up"


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 413),
        (b"[" * 10_000, 422),
        (b"\xff\xfe", 400),
        (b"[]", 422),
        (b'{"query": 1}', 422),
        (b'{"query": "a", "limit": 3}', 422),
        (b'{"query": "a", "k": 0}', 422),
        (b'{"query": "a", "k": -1}', 422),
        (b'{"query": "a", "k": 1000000000}', 422),
        (b'{"query": "a", "skip": -1}', 422),
        (b'{"query": "a", "mode": "magic"}', 422),
        (b'{"query": "a\\u0000b"}', 422),
        (b'{"query": "a\\ud800b"}', 400),
        (b'{"query": "a", "vector": []}', 422),
        (b'{"query": "a", "vector": [1, 2]}', 422),
        (b'{"query": "a", "vector": ["1"]}', 422),
        (b'{"query": "a", "vector": [NaN]}', 400),
        (b'{"query": "a", "vector": [' + b"1e39," * 15 + b"1]}", 422),
        (b'{"query": "a", "after_lsn": "0/1; SELECT 1"}', 422),
        (b'{"query": "a\\u0000b", "after_lsn": "0/1"}', 422),
        (b'{"query": "a", "filter": {"opened": {"gte": {"gte": 1}}}}', 422),
        (b'{"query": "a", "filter": {"opened": ' + b"[" * 500 + b"]" * 500 + b"}}", 422),
        (b'{"query": "a", "filter": {"id": ["1", "x\' OR 1=1"]}}', 422),
        (b'{"query": "' + b"a" * 1_000_000 + b'"}', 413),
        (b'{"query": "a", "filter": {"nothing": 3}}', 422),
        (b'{"query": "a", "filter": {"opened": "soon"}}', 422),
        (b'{"query": "a", "filter": {"id": {"between": 3}}}', 422),
        (b'{"query": "a", "filter": {"status": "\\u0000"}}', 422),
        (b'{"query": "a", "filter": {"status": {"contains": ' + b"[" * 500 + b"]" * 500 + b"}}}", 422),
        (b'{"query": "a", "filter": {"status) OR true --": "x"}}', 422),
        (b'{"query": "' + b"a" * 10_000 + b'"}', 422),
    ],
)
async def test_what_cannot_be_answered_says_what_to_change(tickets: Office, body: bytes, status: int) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        answer = await client.post(SEARCH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json()) >= {"title", "status", "detail"}


@pytest.mark.parametrize(("text", "status"), [("a\\u0000b", 422), ("a\\ud800b", 400)])
async def test_texts_with_a_character_that_no_text_can_hold_are_refused_and_count_as_one_call(
    tickets: Office, tokens: Path, text: str, status: int
) -> None:
    headers = {"Content-Type": "application/json", **bearer(new_token(tokens, "app", {"tenant": "t1"}, None))}
    wrong = f'{{"index": "tickets", "texts": ["router", "{text}", "printer"]}}'.encode()
    async with served(with_tokens(tickets, tokens, requests_per_s=0.01, burst=5)) as client:
        answers = [await client.post("/v1/embed", content=wrong, headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [status] * 4
    assert answers[0].headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "text", ["'; DROP TABLE tickets; --", "\\", "%s %(x)s {x}", "a" * 3_999, "-printer", "   ", ""]
)
async def test_any_text_is_a_query(tickets: Office, text: str) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        codes = [(await ask(client, text, mode=mode)).status_code for mode in ("hybrid", "text")]
        values = (await ask(client, "printer", filter={"status": text})).status_code
    assert (codes, values) == ([200, 200], 200)


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000", "\u00a0\x1c"])
async def test_a_blank_query_finds_nothing(tickets: Office, text: str, mode: str) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        answer = await ask(client, text, mode=mode)
    assert (answer.status_code, answer.json()["hits"]) == (200, [])


QUERY = b'{"query": "a"}'


async def test_unknown_indexes_paths_and_methods_are_problems(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        answers = [
            await client.post("/v1/indexes/nothing/search", json={"query": "a"}),
            await client.get("/v1/indexes/../../etc/passwd"),
            await client.get("/v2"),
            await client.get(SEARCH),
            await client.post(SEARCH, content=b"query=a", headers={"Content-Type": "text/plain"}),
            await client.post(SEARCH, content=gzip.compress(QUERY), headers={"Content-Encoding": "gzip"}),
            await client.get("/v1/indexes/tickets/documents/9999"),
            await client.post("/v1/embed", json={"index": "tickets", "texts": []}),
        ]
        plain = await client.post(SEARCH, content=QUERY, headers={"Content-Encoding": "Identity"})
    assert [one.status_code for one in answers] == [404, 404, 404, 405, 415, 415, 404, 422]
    assert all(one.headers["content-type"] == "application/problem+json" for one in answers)
    assert all(one.json()["fix"] for one in answers)
    assert "compression" in answers[5].json()["fix"]
    assert plain.status_code == 200


@pytest.mark.parametrize("depth", [10_000, 100_000])
@pytest.mark.parametrize("of", ["{}", '{{"query": {}}}', '{{"query": "a", "filter": {{"id": {}}}}}'])
async def test_lists_in_lists_without_an_end_are_a_problem(tickets: Office, of: str, depth: int) -> None:
    body = of.format("[" * depth + "]" * depth).encode()
    async with served(tickets.serving(anonymous=True, max_body_bytes=10**6)) as client:
        answer = await client.post(SEARCH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


async def test_six_characters_that_only_look_like_an_escape_are_a_text(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        answers = [
            await ask(client, text, filter={column: text})
            for text, column in (("\\u0000", "status"), ("a\0", "status"))
        ]
        document = await client.get("/v1/indexes/tickets/documents/%5Cu0000")
    assert [answer.status_code for answer in answers] == [200, 422]
    assert document.status_code == 404


SENT = ("Authorization", "Content-Type", "If-None-Match", "traceparent", "tracestate")
SENT_BY_MCP = ("MCP-Protocol-Version", "Mcp-Session-Id", "Last-Event-ID", "Mcp-Method", "Mcp-Name")


@pytest.mark.proof_from(12)
@pytest.mark.parametrize("origin", ["https://app.example.org", "https://elsewhere.example.org"])
@pytest.mark.parametrize(
    ("path", "method", "header"),
    [
        *((SEARCH, "POST", header) for header in SENT),
        *(("/mcp", method, header) for method in ("POST", "GET") for header in SENT + SENT_BY_MCP),
    ],
)
async def test_a_page_of_a_known_origin_may_send_the_headers_of_the_api_and_of_mcp(
    with_pages: httpx2.AsyncClient, origin: str, path: str, method: str, header: str
) -> None:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": f"content-type,{header.lower()}",
    }
    answer = await with_pages.options(path, headers=asked)
    known = origin == "https://app.example.org"
    assert (answer.status_code == 200, "access-control-allow-origin" in answer.headers) == (known, known)
    if known:
        assert answer.headers["access-control-allow-origin"] == origin
        assert header.lower() in answer.headers["access-control-allow-headers"].lower()


CALL_OF_SEARCH = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "search", "arguments": {"index": "tickets", "query": "printer", "mode": "text"}},
}


@pytest.mark.parametrize(
    ("path", "body", "waits_for"),
    [
        (SEARCH, {"query": "a", "after_lsn": "FFFFFFFF/0"}, "a position"),
        (SEARCH, {"query": "printer", "mode": "text"}, "a transaction"),
        ("/mcp", CALL_OF_SEARCH, "a transaction"),
    ],
)
async def test_the_statement_of_a_client_that_left_is_cancelled(
    tickets: Office, path: str, body: dict[str, Any], waits_for: str
) -> None:
    config = tickets.serving(anonymous=True, deadline_s=120.0)
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdcsync serve' AND state = 'active'"
        " AND (query LIKE '%wait_for%' OR wait_event_type = 'Lock')"
    )
    async with served(config) as client:

        async def statements(count: int) -> None:
            counted = partial(until, lambda: tickets.database.execute(running) == [(count,)], f"{count} statements")
            await anyio.to_thread.run_sync(counted)

        with psycopg.connect(tickets.database.dsn) as other:
            if waits_for == "a transaction":
                other.execute("LOCK TABLE cdcsync.tickets_chunks")
            async with anyio.create_task_group() as tasks:
                accepted = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18"}
                tasks.start_soon(partial(client.post, path, json=body, headers=accepted, timeout=120))
                await statements(1)
                tasks.cancel_scope.cancel()
            await statements(0)


# -- the record -------------------------------------------------------------------------------------------------


async def test_each_call_is_recorded_without_its_text(tickets: Office, tokens: Path) -> None:
    token = new_token(tokens, "recorded", {"tenant": "t1"}, None)
    trace = "0af7651916cd43dd8448eb211c80319c"
    async with served(with_tokens(tickets, tokens)) as client:
        await client.post(
            SEARCH,
            json={"query": "xyzzy plugh", "filter": {"status": "open"}, "mode": "text"},
            headers={**bearer(token), "traceparent": f"00-{trace}-b7ad6b7169203331-01"},
        )
        await client.post(SEARCH, json={"query": "a", "k": 0}, headers=bearer(token))
    rows = tickets.database.execute(
        "SELECT tenant, tool, index_name, outcome, hits, query, filters, trace_id, query_hash IS NOT NULL"
        " FROM cdcsync.calls WHERE subject = 'recorded' ORDER BY at"
    )
    assert rows == [
        ("t1", "search", "tickets", "ok", 0, None, ["status"], trace, True),
        ("t1", "search", "tickets", "wrong", None, None, [], None, True),
    ]


async def test_metrics_count_by_tool_and_outcome_alone(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True)) as client:
        await ask(client, "xyzzy", mode="text")
        text = (await client.get("/metrics")).text
        ready = await client.get("/readyz")
    assert 'cdcsync_serve_call_seconds_count{outcome="ok",tool="search"} 1.0' in text
    assert 'cdcsync_serve_empty_searches_total{index="tickets"} 1.0' in text
    assert "xyzzy" not in text
    assert ready.status_code == 200


async def test_a_login_that_is_refused_later_is_told_with_its_fix_in_the_log_alone(
    tickets: Office, tokens: Path
) -> None:
    role = sql.Identifier(tickets.reader)
    async with served(with_tokens(tickets, tokens)) as client:
        while not (await client.get("/readyz")).json()["ready"]:  # its start is over then
            pass
        try:
            tickets.database.execute(sql.SQL("ALTER ROLE {} NOLOGIN").format(role))
            ended = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s"
            tickets.database.execute(ended, [tickets.reader])
            with structlog.testing.capture_logs() as logs, anyio.fail_after(60):
                # A session that has just ended is one that does not answer.
                while (told := (await client.get("/readyz")).json()["reasons"]) == ["the target does not answer"]:
                    pass
        finally:
            tickets.database.execute(sql.SQL("ALTER ROLE {} LOGIN").format(role))
    assert told == ["the target refuses this server; the server's log says why, and what to do"]
    (line,) = [line for line in logs if line["event"] == "not_ready" and "log in" in line["error"]][:1]
    assert line["fix"] == f"ALTER ROLE {tickets.reader} LOGIN, or use another role"


async def test_a_caller_of_no_tenant_is_counted_by_its_subject() -> None:
    assert Principal("ana").account != Principal("ben").account
    assert Principal("ana", "t1").account == Principal("ben", "t1").account
