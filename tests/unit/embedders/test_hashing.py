"""Feature hashing: the same vectors everywhere, and similar texts near each other."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import anyio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync import config
from cdcsync.embedders import make_embedder, validate
from cdcsync.embedders.hashing import COMPONENTS_REMEMBERED, WORDS_REMEMBERED, HashEmbedder

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)

DIGEST = """
import hashlib
from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
texts = ["The quick brown fox", "", "Zürich, 東京!", "fox fox fox " * 500]
print(hashlib.sha256(HashEmbedder("h", config.HashEmbedder(dimensions=96)).vectors(texts).tobytes()).hexdigest())
"""


def embedder(dimensions: int = 256) -> HashEmbedder:
    return HashEmbedder("h", config.HashEmbedder(dimensions=dimensions))


def similarity(one: str, other: str) -> float:
    first, second = embedder().vectors([one, other])
    return float(first @ second)


def test_it_describes_itself() -> None:
    made = make_embedder("fast", config.HashEmbedder(dimensions=64))

    assert (made.name, made.dimensions, made.distance) == ("fast", 64, "cosine")
    assert made.tokenizer_json is None
    assert made.max_input_tokens is None
    assert made.identity == "hash:1:64"


@pytest.mark.parametrize("seed", ["0", "1"])
def test_vectors_are_the_same_bits_in_every_process(seed: str) -> None:
    """They are stored and compared across restarts: another digest means that `VERSION` must go up."""
    run = subprocess.run(
        [sys.executable, "-c", DIGEST], env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."}, capture_output=True, check=True
    )

    assert run.stdout.decode().strip() == "cdb974aede2747c0f591d2451abb1537473f3576efa6eac5232936700d0c7f57"


@given(st.lists(TEXTS, max_size=8), st.sampled_from([1, 7, 256]))
def test_every_text_has_a_unit_vector_of_its_own(texts: list[str], dimensions: int) -> None:
    vectors = embedder(dimensions).vectors(texts)

    validate(vectors, len(texts), dimensions)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        assert np.array_equal(embedder(dimensions).vectors([text])[0], vector)


def test_texts_with_the_same_words_are_alike() -> None:
    assert similarity("the quick brown fox", "FOX, quick! the brown") == pytest.approx(1)


def test_similar_words_are_nearer_than_different_ones() -> None:
    near = similarity("replicating slots", "replication slot")
    assert near > 0.25
    assert near > similarity("replicating slots", "banana bread") + 0.25


def test_shared_words_bring_texts_nearer() -> None:
    query = "logical replication slot"
    assert similarity(query, "a slot of logical decoding") > similarity(query, "a recipe for bread") + 0.2


def test_texts_without_words_differ_by_their_characters() -> None:
    dots, dashes = embedder().vectors(["...", "---"])

    assert not np.array_equal(dots, dashes)


async def test_documents_and_queries_few_and_many_give_the_same_vectors() -> None:
    made = embedder()
    texts = [f"text number {number}" for number in range(200)]
    await made.open()

    many = await made.embed(texts)
    assert many.shape == (200, 256)
    assert np.array_equal(many[:3], await made.embed(texts[:3], kind="query"))
    assert (await made.embed([])).shape == (0, 256)

    await made.aclose()
    assert np.array_equal(many, await made.embed(texts))


async def test_a_latency_keeps_each_call_waiting() -> None:
    slow = HashEmbedder("h", config.HashEmbedder(latency_ms=60_000))

    with anyio.move_on_after(0) as scope:
        await slow.embed(["text"])

    assert scope.cancelled_caught


def test_threads_that_learn_words_at_the_same_time_get_their_own_vectors() -> None:
    texts = [
        [f"text {thread} of round {number}, word{number * thread}" for number in range(200)] for thread in range(6)
    ]
    made = embedder(64)
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda some: [made.vectors([text])[0] for text in some], texts))
    finally:
        sys.setswitchinterval(0.005)

    for some, vectors in zip(texts, together, strict=True):
        assert np.array_equal(embedder(64).vectors(some), vectors)


@pytest.mark.parametrize(("width", "fit"), [(1, WORDS_REMEMBERED), (64, COMPONENTS_REMEMBERED // 65)])
def test_memory_for_words_is_bounded_however_long_they_are(width: int, fit: int) -> None:
    made = embedder(8)
    for start in range(0, fit + fit // 4, 1024):
        made.vectors([" ".join(f"{number:0{width}x}" for number in range(start, start + 1024))])

    assert 0 < len(made._words) <= fit
