"""Remote embedders against a real server: what they send, and what they make of everything that can come back."""

from __future__ import annotations

from typing import Any

import anyio
import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders import make_embedder
from cdcsync.errors import EmbedderUnavailable, EmbedError, TextRejected
from tests.support.provider import (
    KEY,
    TEXTS,
    FakeProvider,
    Misdeed,
    cut,
    endless,
    expected,
    html,
    slow,
    status,
    wrong_count,
    wrong_dimension,
)

# -- what is sent and read --------------------------------------------------------------------------------------------


async def test_documents_and_queries_get_their_prefixes(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai(document_prefix="passage: ", query_prefix="query: ")

    await embedder.embed(["a"])
    await embedder.embed(["a"], kind="query")

    assert [body["input"] for _, _, body in provider.requests] == [["passage: a"], ["query: a"]]


async def test_texts_are_cut_into_requests_by_count_and_tokens(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai(batch_texts=3)
    vectors = await embedder.embed([f"text {number}" for number in range(7)])
    np.testing.assert_allclose(vectors, expected([f"text {number}" for number in range(7)]), rtol=1e-6)
    assert [len(body["input"]) for _, _, body in provider.requests] == [3, 3, 1]

    small = await make_openai(batch_tokens=40)
    assert small.fitting(["x" * 100, "y" * 40, "z"]) == 1
    assert small.fitting(["x" * 10_000]) == 1
    assert (await small.embed([])).shape == (0, 16)


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


# -- what the provider says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "misdeed",
    [status(500), cut, html, endless, wrong_count, wrong_dimension, slow],
    ids=["500", "cut", "html", "endless", "wrong count", "wrong dimension", "silence"],
)
async def test_a_request_that_gives_nothing_usable_is_one_request_and_an_error(
    make_openai: Any, provider: FakeProvider, misdeed: Misdeed
) -> None:
    embedder = await make_openai(timeout_s=1.0)
    provider.misdeeds.append(misdeed)

    with pytest.raises(EmbedError) as failure:
        await embedder.embed(TEXTS)

    assert type(failure.value) is EmbedError
    assert not any(text in str(failure.value) for text in TEXTS)
    assert len(provider.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "not allowed: the first text"}},
        {"detail": [{"msg": "String not valid: a text that is much longer than the message", "input": "x"}]},
        {"error": "word of the day: tiny", "error_type": "validation"},
    ],
)
async def test_messages_do_not_quote_the_text(make_openai: Any, provider: FakeProvider, body: Any) -> None:
    embedder = await make_openai()
    await embedder.embed(["a"])
    provider.misdeeds.append(status(400, body))

    with pytest.raises(TextRejected) as refusal:
        await embedder.embed(["the first text", "so: a text that is much longer than the message, and goes on", "tiny"])
    assert "not shown" in str(refusal.value)


async def test_a_cancelled_request_leaves_the_embedder_usable(make_openai: Any, provider: FakeProvider) -> None:
    embedder = await make_openai(concurrency=1)
    provider.misdeeds.append(slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(embedder.embed, TEXTS)
        while not provider.requests:  # noqa: ASYNC110 - the server is a thread
            await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()

    np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)


# -- gateways ---------------------------------------------------------------------------------------------------------


async def test_headers_query_and_bodies_are_sent_and_only_the_bodies_are_part_of_the_identity(
    make_openai: Any, provider: FakeProvider
) -> None:
    gateway = {"headers": {"api-key": KEY, "X-Team": "search"}, "query": {"api-version": "2024-10-21"}}
    bodies = {"document_body": {"input_type": "document"}, "query_body": {"input_type": "query"}}
    plain, behind, typed = await make_openai(), await make_openai(**gateway), await make_openai(**gateway, **bodies)

    await typed.embed(["a"])
    await typed.embed(["b"], kind="query")

    (path, headers, document), (_, _, query) = provider.requests
    assert path == "/v1/embeddings?api-version=2024-10-21"
    assert (headers["api-key"], headers["x-team"]) == (KEY, "search")
    assert (document["input_type"], query["input_type"]) == ("document", "query")
    assert plain.identity == behind.identity != typed.identity
