"""Embedding by OpenAI's interface: what is sent, and what is read of an answer."""

from __future__ import annotations

from typing import Any

import anyio
import numpy as np
import pytest

from cdcsync.embedders import validate
from tests.support.provider import (
    KEY,
    TEXTS,
    FakeProvider,
    expected,
)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_vectors_come_in_the_order_of_the_texts_in_either_encoding(make_openai: Any, encoding: str) -> None:
    embedder = await make_openai(encoding=encoding)

    vectors = await embedder.embed(TEXTS)

    validate(vectors, 3, 16)
    np.testing.assert_allclose(vectors, expected(TEXTS), rtol=1e-6)


async def test_the_request_is_what_the_interface_asks_for(make_openai: Any, provider: FakeProvider) -> None:
    await (await make_openai(api_key=KEY)).embed(TEXTS)
    await (await make_openai(request_dimensions=True, encoding="base64")).embed(TEXTS)

    (path, headers, body), (_, keyless, more) = provider.requests
    assert path == "/v1/embeddings"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {"model": "hashing", "input": TEXTS}
    assert "authorization" not in keyless
    assert more == {"model": "hashing", "input": TEXTS, "dimensions": 16, "encoding_format": "base64"}


@pytest.mark.parametrize(
    "usage",
    [{"total_tokens": 10**300}, {"total_tokens": 10**400}, {"total_tokens": 1e300}, {"total_tokens": "7"}, 7, [], None],
)
async def test_a_provider_that_counts_wildly_is_not_believed_and_its_vectors_are_taken(
    make_openai: Any, provider: FakeProvider, usage: Any
) -> None:
    embedder = await make_openai(tokens_per_minute=1_000)

    def counts(exchange: Any, texts: list[str]) -> None:
        data = [{"embedding": row} for row in provider.vectors(texts)]
        exchange.answer(200, {"data": data, "usage": usage})

    for _ in range(3):
        provider.misdeeds.append(counts)
        with anyio.fail_after(60):
            np.testing.assert_allclose(await embedder.embed(TEXTS), expected(TEXTS), rtol=1e-6)
