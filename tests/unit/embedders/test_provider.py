"""Requests to a provider: keys, pacing, retries, and whose fault a failure is."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from cdcsync.embedders import provider as provider_module
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from tests.support.provider import (
    KEY,
    TEXTS,
    FakeProvider,
    Misdeed,
    cut,
    cut_in_the_middle,
    expected,
    raw,
    status,
)


async def test_connections_are_kept_and_shared(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai(concurrency=2)

    for _ in range(5):
        await embedder.embed(["a"])
    assert provider.connections == 1
    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(embedder.embed, TEXTS)

    assert provider.connections == 2
    assert provider.most_at_once <= 2


async def test_the_key_may_be_in_a_file_and_change_there(
    make_openai: Any, provider: FakeProvider, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("first\n")
    embedder = await make_openai(api_key_file=str(file))

    await embedder.embed(["a"])
    file.write_text("second\n")
    await embedder.embed(["a"])

    assert [headers["authorization"] for _, headers, _ in provider.requests] == ["Bearer first", "Bearer second"]
    file.write_text("two words")
    with pytest.raises(EmbedderSetupError, match="holds no key"):
        await embedder.embed(["a"])
    file.unlink()
    with pytest.raises(EmbedderSetupError, match="cannot be read") as missing:
        await make_openai(api_key_file=str(file))
    assert missing.value.where == "embedders.fake.api_key_file"


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
    make_openai: Any, provider: FakeProvider, misdeed: Misdeed
) -> None:
    embedder = await make_openai()
    await embedder.embed(["a"])
    provider.misdeeds.append(misdeed)

    vectors = await embedder.embed(TEXTS, kind="query")

    np.testing.assert_allclose(vectors, expected(TEXTS), rtol=1e-6)
    assert len(provider.requests) == 3


async def test_being_told_to_wait_costs_no_attempt(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai()
    provider.misdeeds.extend([status(429, retry_after_ms="1")] * 5)

    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)
    assert len(provider.requests) == 6


async def test_a_provider_that_asks_for_no_wait_for_ever_is_not_asked_for_ever(
    make_openai: Any, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "PATIENCE_S", 0.5)
    embedder = await make_openai()
    provider.always = status(503, retry_after="0")

    with pytest.raises(EmbedderUnavailable):
        await embedder.embed(TEXTS)
    assert len(provider.requests) <= 10


async def test_a_wait_longer_than_our_patience_is_the_callers(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai()
    provider.misdeeds.append(status(429, retry_after="1800"))

    with pytest.raises(EmbedderUnavailable) as told:
        await embedder.embed(TEXTS)
    assert told.value.retry_after_s == 1800
    with pytest.raises(EmbedderUnavailable, match="rate limit") as again:
        await embedder.embed(TEXTS)

    assert again.value.retry_after_s == pytest.approx(1800, abs=60)
    assert len(provider.requests) == 1


async def test_rate_limit_headers_are_heeded_before_they_become_429s(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai()
    provider.headers = {"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "10m0s"}
    await embedder.embed(TEXTS)

    with pytest.raises(EmbedderUnavailable, match="rate limit"):
        await embedder.embed(TEXTS)
    assert len(provider.requests) == 1


async def test_our_own_budget_is_kept(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai(requests_per_minute=6)
    await embedder.embed(TEXTS)
    with anyio.move_on_after(0.05) as waiting:
        await embedder.embed(TEXTS)
    assert waiting.cancelled_caught
    assert len(provider.requests) == 1


async def test_a_provider_that_is_away_is_an_outage(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai()
    provider.stop()
    with pytest.raises(EmbedderUnavailable, match="cannot be reached"):
        await embedder.embed(TEXTS)

    provider.start()
    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)


@pytest.mark.parametrize("number", [400, 413, 422])
async def test_a_refusal_says_which_status_and_why(make_openai: Any, provider: FakeProvider, number: int) -> None:
    embedder = await make_openai()
    provider.misdeeds.append(status(number, {"error": {"message": "too many tokens", "code": "too_long"}}))

    with pytest.raises(TextRejected, match=f"{number} too_long: too many tokens"):
        await embedder.embed(TEXTS)


@pytest.mark.parametrize("number", [301, 401, 403, 404])
async def test_a_wrong_key_or_address_is_the_operators(make_openai: Any, provider: FakeProvider, number: int) -> None:
    embedder = await make_openai(api_key=KEY)
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
    make_openai: Any, provider: FakeProvider, number: int, body: bytes
) -> None:
    embedder = await make_openai()
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
    make_openai: Any, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(provider_module, "PATIENCE_S", 0.0)
    embedder = await make_openai()
    provider.misdeeds.append(status(429, retry_after=asked))

    with pytest.raises(EmbedderUnavailable) as told:
        await embedder.embed(TEXTS)
    assert 0 < (told.value.retry_after_s or 0) <= 3600


async def test_a_header_is_a_secret_that_no_message_repeats(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai(headers={"api-key": KEY}, query={"token": "tk-9876543210-abc"})
    for quoted in (KEY, "tk-9876543210-abc"):
        provider.misdeeds.append(status(400, {"error": {"message": f"Incorrect key: {quoted}"}}))
        with pytest.raises(TextRejected, match="not shown"):
            await embedder.embed(["a"])


@pytest.mark.parametrize("what", [KEY, "a text that nobody may see", "ein Text, den niemand sehen d\u00fcrfte"])
async def test_what_is_no_http_is_not_repeated_either(make_openai: Any, provider: FakeProvider, what: str) -> None:
    embedder = await make_openai()
    provider.misdeeds.append(raw(b"HTTP/1.1 200 OK\r\nx: \x00" + what.encode() + b"\r\n\r\n"))

    with pytest.raises(EmbedError, match="the connection broke") as failure:
        await embedder.embed([what])
    shown = str(failure.value)
    assert what[-12:] not in shown
    assert repr(what.encode())[2:-1][-12:] not in shown


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
    make_openai: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(EmbedderSetupError, match="the environment's settings for HTTP") as wrong:
        await make_openai()
    assert "s3cret" not in f"{wrong.value}{wrong.value.hint}"


async def test_a_proxy_that_is_in_the_way_is_named_by_its_variable(
    make_openai: Any, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://ann:s3cret@127.0.0.1:9")
    embedder = await make_openai()
    with pytest.raises(EmbedderUnavailable) as away:
        await embedder.embed(["a"])
    assert "HTTP_PROXY" in str(away.value.hint)
    assert "s3cret" not in f"{away.value}{away.value.hint}"

    monkeypatch.setenv("HTTP_PROXY", provider.url.removesuffix("/v1").replace("//", "//ann:s3cret@"))
    embedder = await make_openai()
    provider.misdeeds.append(status(407))
    with pytest.raises(EmbedderSetupError, match="407") as refused:
        await embedder.embed(["a"])
    assert "HTTP_PROXY" in str(refused.value.hint)


BLANKS = b" " * 20_000_000
BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "gzip": ("gzip", lambda: gzip.compress(BLANKS), "larger than"),
    "gzip of gzip": ("gzip, gzip", lambda: gzip.compress(gzip.compress(BLANKS)), "in a way that was not asked for"),
    "deflate": ("deflate", lambda: zlib.compress(BLANKS), "in a way that was not asked for"),
    "another": ("zstd", lambda: b"(\xb5/\xfd", "in a way that was not asked for"),
    "not compressed at all": ("gzip", lambda: b'{"data": []}', "not compressed as it says"),
}


@pytest.mark.parametrize("number", [200, 500])
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_small_answer_that_stands_for_a_huge_one_is_not_unpacked(
    make_openai: Any, provider: FakeProvider, bomb: str, number: int
) -> None:
    coding, body, problem = BOMBS[bomb]
    embedder = await make_openai()
    provider.misdeeds.append(status(number, body(), content_encoding=coding))
    tracemalloc.start()
    try:
        with pytest.raises(EmbedError, match=problem):
            await embedder.embed(["a"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(BLANKS) / 4


async def test_no_cookie_of_a_provider_is_kept(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai()
    for at in range(3):
        provider.headers = {"set_cookie": f"session{at}={'x' * 4_000}; Path=/; Max-Age=99999"}
        await embedder.embed([f"text {at}"])
    assert all("cookie" not in headers for _, headers, _ in provider.requests)


async def test_a_compressed_answer_is_read(make_openai: Any, provider: FakeProvider) -> None:
    def answer(exchange: Any, texts: list[str]) -> None:
        data = [{"index": at, "embedding": row} for at, row in enumerate(provider.vectors(texts))]
        exchange.answer(200, gzip.compress(json.dumps({"data": data}).encode()), content_encoding="gzip")

    provider.misdeeds.append(answer)
    assert np.allclose(await (await make_openai(encoding="float")).embed(TEXTS), expected(TEXTS))
    assert provider.requests[-1][1]["accept-encoding"] == "gzip"
