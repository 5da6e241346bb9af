"""Remote embedders against a real server: what they send, and what they make of everything that can come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders import make_embedder, validate
from cdcsync.embedders import provider as provider_module
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.openai import OpenAIEmbedder
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from tests.support.provider import (
    FakeProvider,
    Misdeed,
    cut,
    cut_in_the_middle,
    endless,
    html,
    raw,
    slow,
    status,
    wrong_count,
    wrong_dimension,
)

TEXTS = ["the first text", "Zürich und 東京", "a third one"]
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_module, "FIRST_RETRY_S", 0.001)


@pytest.fixture
async def make(provider: FakeProvider) -> AsyncIterator[Callable[..., OpenAIEmbedder]]:
    """Makes open embedders that ask the fake provider."""
    made = []

    async def opened(**settings: Any) -> OpenAIEmbedder:
        options = {"base_url": provider.url, "model": "hashing", "dimensions": provider.dimensions, **settings}
        embedder = OpenAIEmbedder("fake", config.OpenAIEmbedder(**options))
        await embedder.open()
        made.append(embedder)
        return embedder

    yield opened  # type: ignore[misc]
    for embedder in made:
        await embedder.aclose()


def expected(texts: list[str]) -> Any:
    return HashEmbedder("h", config.HashEmbedder(dimensions=16)).vectors(texts)


# -- what is sent and read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_vectors_come_in_the_order_of_the_texts_in_either_encoding(make: Any, encoding: str) -> None:
    embedder = await make(encoding=encoding)

    vectors = await embedder.embed(TEXTS)

    validate(vectors, 3, 16)
    np.testing.assert_allclose(vectors, expected(TEXTS), rtol=1e-6)


async def test_the_request_is_what_the_interface_asks_for(make: Any, provider: FakeProvider) -> None:
    await (await make(api_key=KEY)).embed(TEXTS)
    await (await make(request_dimensions=True, encoding="base64")).embed(TEXTS)

    (path, headers, body), (_, keyless, more) = provider.requests
    assert path == "/v1/embeddings"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {"model": "hashing", "input": TEXTS}
    assert "authorization" not in keyless
    assert more == {"model": "hashing", "input": TEXTS, "dimensions": 16, "encoding_format": "base64"}


async def test_documents_and_queries_get_their_prefixes(make: Any, provider: FakeProvider) -> None:
    embedder = await make(document_prefix="passage: ", query_prefix="query: ")

    await embedder.embed(["a"])
    await embedder.embed(["a"], kind="query")

    assert [body["input"] for _, _, body in provider.requests] == [["passage: a"], ["query: a"]]


async def test_texts_are_cut_into_requests_by_count_and_tokens(make: Any, provider: FakeProvider) -> None:
    embedder = await make(batch_texts=3)
    vectors = await embedder.embed([f"text {number}" for number in range(7)])
    np.testing.assert_allclose(vectors, expected([f"text {number}" for number in range(7)]), rtol=1e-6)
    assert [len(body["input"]) for _, _, body in provider.requests] == [3, 3, 1]

    small = await make(batch_tokens=40)
    assert small.fitting(["x" * 100, "y" * 40, "z"]) == 1
    assert small.fitting(["x" * 10_000]) == 1
    assert (await small.embed([])).shape == (0, 16)


async def test_connections_are_kept_and_shared(make: Any, provider: FakeProvider) -> None:
    embedder = await make(concurrency=2)

    for _ in range(5):
        await embedder.embed(["a"])
    assert provider.connections == 1
    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(embedder.embed, TEXTS)

    assert provider.connections == 2
    assert provider.most_at_once <= 2


async def test_the_key_may_be_in_a_file_and_change_there(make: Any, provider: FakeProvider, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first\n")
    embedder = await make(api_key_file=str(file))

    await embedder.embed(["a"])
    file.write_text("second\n")
    await embedder.embed(["a"])

    assert [headers["authorization"] for _, headers, _ in provider.requests] == ["Bearer first", "Bearer second"]
    file.write_text("two words")
    with pytest.raises(EmbedderSetupError, match="holds no key"):
        await embedder.embed(["a"])
    file.unlink()
    with pytest.raises(EmbedderSetupError, match="cannot be read") as missing:
        await make(api_key_file=str(file))
    assert missing.value.where == "embedders.fake.api_key_file"


def test_the_identity_says_what_decides_the_vectors_and_not_where_they_come_from() -> None:
    def identity(**settings: Any) -> str:
        return make_embedder("x", config.OpenAIEmbedder(model="m", dimensions=8, **settings)).identity

    assert identity() == "openai:m:8" == identity(base_url="http://10.0.0.1/v1", api_key=KEY, encoding="base64")
    assert identity(request_dimensions=True) == "openai:m:8:cut"
    assert len({identity(), identity(query_prefix="q"), identity(document_prefix="q")}) == 3


async def test_an_embedder_that_is_not_open_says_so() -> None:
    embedder = make_embedder("x", config.OpenAIEmbedder(model="m", dimensions=8))
    with pytest.raises(EmbedderUnavailable, match="not open"):
        await embedder.embed(["a"])


# -- what passes by itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misdeed",
    [
        status(500),
        status(502),
        status(503, retry_after_ms="1"),
        cut,
        cut_in_the_middle,
        status(429, retry_after_ms="1"),
    ],
    ids=["500", "502", "503", "429", "cut", "cut in the middle"],
)
async def test_a_query_is_tried_again_as_a_person_waits_for_it(
    make: Any, provider: FakeProvider, misdeed: Misdeed
) -> None:
    embedder = await make()
    await embedder.embed(["a"])
    provider.misdeeds.append(misdeed)

    vectors = await embedder.embed(TEXTS, kind="query")

    np.testing.assert_allclose(vectors, expected(TEXTS), rtol=1e-6)
    assert len(provider.requests) == 3


async def test_being_told_to_wait_costs_no_attempt(make: Any, provider: FakeProvider) -> None:
    embedder = await make()
    provider.misdeeds.extend([status(429, retry_after_ms="1")] * 5)

    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)
    assert len(provider.requests) == 6


async def test_a_provider_that_asks_for_no_wait_for_ever_is_not_asked_for_ever(
    make: Any, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "PATIENCE_S", 0.5)
    embedder = await make()
    provider.always = status(503, retry_after="0")

    with pytest.raises(EmbedderUnavailable):
        await embedder.embed(TEXTS)
    assert len(provider.requests) <= 10


async def test_a_wait_longer_than_our_patience_is_the_callers(make: Any, provider: FakeProvider) -> None:
    embedder = await make()
    provider.misdeeds.append(status(429, retry_after="1800"))

    with pytest.raises(EmbedderUnavailable) as told:
        await embedder.embed(TEXTS)
    assert told.value.retry_after_s == 1800
    with pytest.raises(EmbedderUnavailable, match="rate limit") as again:
        await embedder.embed(TEXTS)

    assert again.value.retry_after_s == pytest.approx(1800, abs=60)
    assert len(provider.requests) == 1


async def test_rate_limit_headers_are_heeded_before_they_become_429s(make: Any, provider: FakeProvider) -> None:
    embedder = await make()
    provider.headers = {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "10m0s"}
    await embedder.embed(TEXTS)

    with pytest.raises(EmbedderUnavailable, match="rate limit"):
        await embedder.embed(TEXTS)
    assert len(provider.requests) == 1


async def test_our_own_budget_is_kept(make: Any, provider: FakeProvider) -> None:
    embedder = await make(requests_per_minute=6)
    await embedder.embed(TEXTS)
    with anyio.move_on_after(0.05) as waiting:
        await embedder.embed(TEXTS)
    assert waiting.cancelled_caught
    assert len(provider.requests) == 1


# -- what the provider says --------------------------------------------------------------------------------------------


async def test_a_provider_that_is_away_is_an_outage(make: Any, provider: FakeProvider) -> None:
    embedder = await make()
    provider.stop()
    with pytest.raises(EmbedderUnavailable, match="cannot be reached"):
        await embedder.embed(TEXTS)

    provider.start()
    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)


@pytest.mark.parametrize(
    "misdeed",
    [status(500), cut, html, endless, wrong_count, wrong_dimension, slow],
    ids=["500", "cut", "html", "endless", "wrong count", "wrong dimension", "silence"],
)
async def test_a_request_that_gives_nothing_usable_is_one_request_and_an_error(
    make: Any, provider: FakeProvider, misdeed: Misdeed
) -> None:
    embedder = await make(timeout_s=1.0)
    provider.misdeeds.append(misdeed)

    with pytest.raises(EmbedError) as failure:
        await embedder.embed(TEXTS)

    assert type(failure.value) is EmbedError
    assert not any(text in str(failure.value) for text in TEXTS)
    assert len(provider.requests) == 1


@pytest.mark.parametrize("number", [400, 413, 422])
async def test_a_refusal_says_which_status_and_why(make: Any, provider: FakeProvider, number: int) -> None:
    embedder = await make()
    provider.misdeeds.append(status(number, {"error": {"message": "too many tokens", "code": "too_long"}}))

    with pytest.raises(TextRejected, match=f"{number} too_long: too many tokens"):
        await embedder.embed(TEXTS)


@pytest.mark.parametrize("number", [301, 401, 403, 404])
async def test_a_wrong_key_or_address_is_the_operators(make: Any, provider: FakeProvider, number: int) -> None:
    embedder = await make(api_key=KEY)
    provider.always = status(number, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, location="/x")

    with pytest.raises(EmbedderSetupError) as wrong:
        await embedder.embed(TEXTS)

    assert KEY not in f"{wrong.value}{wrong.value.hint}"
    assert len(provider.requests) == 1


HOSTILE = {
    "latin-1": b'{"error": {"message": "caf\xe9"}}',
    "nested": b'{"error": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "nul": b'{"error": {"message": "a\\u0000b\\u001b[31mred"}}',
    "surrogate": b'{"error": {"message": "\\ud800 alone"}}',
    "not json": bytes(range(256)),
    "empty": b"",
    "numbers": b'{"data": [{"embedding": [1e400, 1e300, -1e300]}]}',
    "base64": b'{"data": [{"embedding": "AAA"}, {"embedding": "\xc3\xa4"}]}',
}


@pytest.mark.parametrize("number", [200, 400, 401, 500, 418])
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
async def test_whatever_bytes_come_back_are_an_error_of_ours_in_one_printable_line(
    make: Any, provider: FakeProvider, number: int, body: bytes
) -> None:
    embedder = await make()
    provider.misdeeds.append(status(number, body))

    with pytest.raises((EmbedError, EmbedderSetupError)) as failure:
        await embedder.embed(["a"])
    assert str(failure.value).isprintable()


@pytest.mark.parametrize(
    "asked",
    [
        "Fri, 31 Dec 2099 23:59:59 GMT",
        "9" * 400,
        "1e300",
        "Fri, 31 Dec 99999999999999999999 23:59:59 GMT",
        "-1",
        "soon",
    ],
)
async def test_no_wait_that_a_provider_asks_for_is_longer_than_an_hour(
    make: Any, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(provider_module, "PATIENCE_S", 0.0)
    embedder = await make()
    provider.misdeeds.append(status(429, retry_after=asked))

    with pytest.raises(EmbedderUnavailable) as told:
        await embedder.embed(TEXTS)
    assert 0 < (told.value.retry_after_s or 0) <= 3600


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "not allowed: the first text"}},
        {"detail": [{"msg": "String not valid: a text that is much longer than the message", "input": "x"}]},
        {"error": "word of the day: tiny", "error_type": "validation"},
    ],
)
async def test_messages_do_not_quote_the_text(make: Any, provider: FakeProvider, body: Any) -> None:
    embedder = await make()
    await embedder.embed(["a"])
    provider.misdeeds.append(status(400, body))

    with pytest.raises(TextRejected) as refusal:
        await embedder.embed(["the first text", "so: a text that is much longer than the message, and goes on", "tiny"])
    assert "not shown" in str(refusal.value)


async def test_a_cancelled_request_leaves_the_embedder_usable(make: Any, provider: FakeProvider) -> None:
    embedder = await make(concurrency=1)
    provider.misdeeds.append(slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(embedder.embed, TEXTS)
        while not provider.requests:  # noqa: ASYNC110 - the server is a thread
            await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()

    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)


# -- gateways ---------------------------------------------------------------------------------------------------------


async def test_headers_query_and_bodies_are_sent_and_only_the_bodies_are_part_of_the_identity(
    make: Any, provider: FakeProvider
) -> None:
    gateway = {"headers": {"api-key": KEY, "X-Team": "search"}, "query": {"api-version": "2024-10-21"}}
    bodies = {"document_body": {"input_type": "document"}, "query_body": {"input_type": "query"}}
    plain, behind, typed = await make(), await make(**gateway), await make(**gateway, **bodies)

    await typed.embed(["a"])
    await typed.embed(["b"], kind="query")

    (path, headers, document), (_, _, query) = provider.requests
    assert path == "/v1/embeddings?api-version=2024-10-21"
    assert (headers["api-key"], headers["x-team"]) == (KEY, "search")
    assert (document["input_type"], query["input_type"]) == ("document", "query")
    assert plain.identity == behind.identity != typed.identity


async def test_a_header_is_a_secret_that_no_message_repeats(make: Any, provider: FakeProvider) -> None:
    embedder = await make(headers={"api-key": KEY}, query={"token": "tk-9876543210-abc"})
    for quoted in (KEY, "tk-9876543210-abc"):
        provider.misdeeds.append(status(400, {"error": {"message": f"Incorrect key: {quoted}"}}))
        with pytest.raises(TextRejected, match="not shown"):
            await embedder.embed(["a"])


@pytest.mark.parametrize("what", [KEY, "a text that nobody may see", "ein Text, den niemand sehen d\u00fcrfte"])
async def test_what_is_no_http_is_not_repeated_either(make: Any, provider: FakeProvider, what: str) -> None:
    embedder = await make()
    provider.misdeeds.append(raw(b"HTTP/1.1 200 OK\r\nx: \x00" + what.encode() + b"\r\n\r\n"))

    with pytest.raises(EmbedError, match="the connection broke") as failure:
        await embedder.embed([what])
    shown = str(failure.value)
    assert what[-12:] not in shown
    assert repr(what.encode())[2:-1][-12:] not in shown


@pytest.mark.parametrize(
    "usage",
    [{"total_tokens": 10**300}, {"total_tokens": 10**400}, {"total_tokens": 1e300}, {"total_tokens": "7"}, 7, [], None],
)
async def test_a_provider_that_counts_wildly_is_not_believed_and_its_vectors_are_taken(
    make: Any, provider: FakeProvider, usage: Any
) -> None:
    embedder = await make(tokens_per_minute=1_000)

    def counts(exchange: Any, texts: list[str]) -> None:
        data = [{"embedding": row} for row in provider.vectors(texts)]
        exchange.answer(200, {"data": data, "usage": usage})

    for _ in range(3):
        provider.misdeeds.append(counts)
        with anyio.fail_after(30):
            np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY", "http://ann:s3cret@@:port"),
        ("ALL_PROXY", "socks5://ann:s3cret@127.0.0.1:9"),
        ("ALL_PROXY", "ftp://ann:s3cret@127.0.0.1:9"),
        ("SSL_CERT_FILE", "/nowhere/s3cret"),
    ],
)
async def test_an_environment_that_cannot_be_used_is_the_operators(
    make: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(EmbedderSetupError, match="the environment's settings for HTTP") as wrong:
        await make()
    assert "s3cret" not in f"{wrong.value}{wrong.value.hint}"


async def test_a_proxy_that_is_in_the_way_is_named_by_its_variable(
    make: Any, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://ann:s3cret@127.0.0.1:9")
    embedder = await make()
    with pytest.raises(EmbedderUnavailable) as away:
        await embedder.embed(["a"])
    assert "HTTP_PROXY" in str(away.value.hint)
    assert "s3cret" not in f"{away.value}{away.value.hint}"

    monkeypatch.setenv("HTTP_PROXY", provider.url.removesuffix("/v1").replace("//", "//ann:s3cret@"))
    embedder = await make()
    provider.misdeeds.append(status(407))
    with pytest.raises(EmbedderSetupError, match="407") as refused:
        await embedder.embed(["a"])
    assert "HTTP_PROXY" in str(refused.value.hint)
