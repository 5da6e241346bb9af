"""Servers of text-embeddings-inference: their limits, and that they serve what is configured."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.tei import TeiEmbedder
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from tests.support.provider import FakeProvider


def expected(texts: list[str]) -> Any:
    return HashEmbedder("h", config.HashEmbedder(dimensions=16)).vectors(texts)


@pytest.fixture
async def make_tei(provider: FakeProvider) -> AsyncIterator[Callable[..., TeiEmbedder]]:
    made = []

    def unopened(**settings: Any) -> TeiEmbedder:
        options = {"base_url": provider.tei_url, "model": "hashing", "dimensions": 16, **settings}
        made.append(TeiEmbedder("served", config.TeiEmbedder(**options)))
        return made[-1]

    yield unopened
    for embedder in made:
        await embedder.aclose()


async def test_tei_embeds_within_the_servers_limits(
    make_tei: Callable[..., TeiEmbedder], provider: FakeProvider
) -> None:
    embedder = make_tei()
    texts = [f"text {number}" for number in range(40)]
    await embedder.open()
    await embedder.open()

    np.testing.assert_allclose(await embedder.embed(texts), expected(texts), rtol=1e-6)

    assert [path for path, _, _ in provider.requests] == ["/info", "/embed", "/embed"]
    assert provider.requests[1][2] == {"inputs": texts[:32], "normalize": True, "truncate": False}
    assert embedder.identity == "tei:hashing:16:any revision:normalized"


@pytest.mark.parametrize("most", [0, -1, None])
async def test_a_limit_that_tei_cannot_mean_is_none(
    make_tei: Callable[..., TeiEmbedder], provider: FakeProvider, most: int | None
) -> None:
    provider.info["max_client_batch_size"] = most
    embedder = make_tei()
    await embedder.open()
    assert len(await embedder.embed(["one", "two", "three"])) == 3
    assert [path for path, _, _ in provider.requests] == ["/info", "/embed"]


@pytest.mark.parametrize(
    ("settings", "info", "problem"),
    [
        ({"model": "other"}, {}, "the server has the model hashing, other is configured"),
        ({"revision": "def"}, {}, "the server has revision abc123, def is configured"),
        ({}, {"model_type": {"reranker": {}}}, "makes no embeddings"),
        ({"max_input_tokens": 1000}, {}, "the model reads 512 tokens, max_input_tokens is 1000"),
        ({}, {"model_id": None}, "is not that of text-embeddings-inference"),
    ],
)
async def test_tei_refuses_a_server_that_serves_something_else(
    make_tei: Callable[..., TeiEmbedder],
    provider: FakeProvider,
    settings: dict[str, Any],
    info: dict[str, Any],
    problem: str,
) -> None:
    provider.info.update(info)
    with pytest.raises(EmbedderSetupError, match=problem):
        await make_tei(**settings).open()


async def test_tei_looks_again_at_a_server_that_was_away(
    make_tei: Callable[..., TeiEmbedder], provider: FakeProvider
) -> None:
    embedder = make_tei()
    provider.stop()
    with pytest.raises(EmbedderUnavailable):
        await embedder.open()
    provider.start()
    await embedder.open()
    provider.stop()
    with pytest.raises(EmbedderUnavailable):
        await embedder.embed(["a text"])

    provider.info["model_id"] = "another"
    provider.start()
    with pytest.raises(EmbedderSetupError, match="the server has the model another"):
        await embedder.embed(["a text"])
