"""Feature hashing: vectors without a model, for tests and benchmarks.

A text's vector is the sum of its words' vectors. A word's is one signed component for the word and a smaller one for
each of its character trigrams, so that texts with the same or similar words are near each other. It knows no meaning.

All components are multiples of an eighth and stay small, so every sum is exact in binary floating point, whatever the
order of the additions; square root and division round in one way only. Vectors are therefore the same bits on every
machine and in every process. (Versions of Python differ in the characters that they know as letters, the newest ones.)

Source: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009 (signed hashing).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import chain

import anyio
import anyio.to_thread
import numpy as np

from cdcsync import config
from cdcsync.embedders.protocol import Distance, Kind, Vectors

VERSION = 1
"""Part of the identity: raise it with any change to what vectors come out."""

TRIGRAM_WEIGHT = 3 / 8
"""A word of seven letters then counts half for itself and half for its trigrams. Exact in binary, see above."""

WORDS_REMEMBERED = 32_768
"""Words whose components are kept: nearly all words of running text, in some 20 MB."""

THREAD_TEXTS = 32
"""From this many texts on, work moves to a thread: it then takes long enough for the event loop to notice."""

_WORD = re.compile(r"\w+")
_TRIGRAM_SEED = 0x5EED
"""Where the trigrams' checksums start: the trigram `the` is not to share its component with the word `the`."""


class HashEmbedder:
    """Embeds by feature hashing; `float32[n, dimensions]`, L2-normalised."""

    distance: Distance = "cosine"
    tokenizer_json: str | None = None
    max_input_tokens: int | None = None
    origin = "feature hashing"
    concurrency = 1

    def __init__(self, name: str, settings: config.HashEmbedder) -> None:
        self.name = name
        self.dimensions = settings.dimensions
        self.identity = f"hash:{VERSION}:{settings.dimensions}"
        self._latency_s = settings.latency_ms / 1000
        self._words: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {}

    async def open(self) -> None:
        """Do nothing: there is nothing to load."""

    def fitting(self, texts: Sequence[str]) -> int:
        """Return the number of texts: there is no limit."""
        return len(texts)

    async def aclose(self) -> None:
        """Forget the words."""
        self._words.clear()

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors; documents and queries are treated alike."""
        if self._latency_s:
            await anyio.sleep(self._latency_s)
        if len(texts) < THREAD_TEXTS:
            return self.vectors(texts)
        return await anyio.to_thread.run_sync(self.vectors, texts)

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors, `float32[n, dimensions]`, without waiting."""
        known = self._words
        places: list[tuple[int, ...]] = []
        weights: list[tuple[float, ...]] = []
        counts = []
        for text in texts:
            count = 0
            for word in _WORD.findall(text.lower()):
                components = known.get(word) or self._learn(word)
                places.append(components[0])
                weights.append(components[1])
                count += len(components[0])
            counts.append(count)
        rows = np.repeat(np.arange(len(texts)) * self.dimensions, counts)
        total = len(rows)
        flat = np.bincount(
            rows + np.fromiter(chain.from_iterable(places), np.int64, total),
            np.fromiter(chain.from_iterable(weights), np.float64, total),
            minlength=len(texts) * self.dimensions,
        )
        sums = flat.reshape(len(texts), self.dimensions)
        norms = np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
        for row in np.flatnonzero(norms == 0).tolist():
            # No words, or words that cancel out: a vector all the same, and the same one for the same text.
            sums[row, zlib.crc32(texts[row].encode()) % self.dimensions] = norms[row] = 1.0
        vectors: Vectors = (sums / norms).astype(np.float32)
        return vectors

    def _learn(self, word: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return a word's components, places and weights, and remember them."""
        padded = f"^{word}$"
        hashes = [zlib.crc32(word.encode())]
        hashes += [zlib.crc32(padded[at : at + 3].encode(), _TRIGRAM_SEED) for at in range(len(padded) - 2)]
        signs = [1.0 if checksum >> 31 else -1.0 for checksum in hashes]
        components = (
            tuple(checksum % self.dimensions for checksum in hashes),
            (signs[0], *(sign * TRIGRAM_WEIGHT for sign in signs[1:])),
        )
        if len(self._words) >= WORDS_REMEMBERED:
            self._words.clear()
        self._words[word] = components
        return components
