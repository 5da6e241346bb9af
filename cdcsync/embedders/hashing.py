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
from array import array
from collections.abc import Sequence
from itertools import chain
from threading import Lock

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from cdcsync import config
from cdcsync.embedders.protocol import Distance, Kind, Vectors

VERSION = 1
"""Part of the identity: raise it with any change to what vectors come out."""

TRIGRAM_EIGHTHS = 3
"""What a trigram weighs, in eighths of a word's weight. A word of seven letters then counts half for itself and half
for its trigrams. Exact in binary, see above."""

WORDS_REMEMBERED = 131_072
"""Words whose components are kept: nearly all words of running text, in some 26 MB. With more, all are forgotten."""

COMPONENTS_REMEMBERED = 8 * WORDS_REMEMBERED
"""Components that are kept, as many as so many words of usual length have. Digests and identifiers are longer, and no
two of them are alike: without this bound, 131,072 of them take two to three times as much."""

THREAD_TEXTS = 32
"""From this many texts on, work moves to a thread: it then takes long enough for the event loop to notice."""

_WORD = re.compile(r"\w+")
_Integers = npt.NDArray[np.int32]

_TRIGRAM_SEED = 0x5EED
"""Where the trigrams' checksums start: the trigram `the` is not to share its component with the word `the`."""


class _Words(dict[str, int]):
    """The number of each word that was seen, and its components: nearly all words of a text were in texts before it.

    A word that is asked for and not known is learned. Its components lie side by side: from `starts[number]` on,
    `counts[number]` of them. Calls of several threads take turns.
    """

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._turn = Lock()
        self.clear()

    def clear(self) -> None:
        """Forget all words."""
        super().clear()
        self._counts, self._starts, self._places, self._eighths = array("i"), array("i"), array("i"), array("b")

    def __missing__(self, word: str) -> int:
        padded = f"^{word}$"
        hashes = [zlib.crc32(word.encode())]
        hashes += [zlib.crc32(padded[at : at + 3].encode(), _TRIGRAM_SEED) for at in range(len(word))]
        self._starts.append(len(self._places))
        self._counts.append(len(hashes))
        self._places.extend([each % self._dimensions for each in hashes])
        self._eighths.append(8 if hashes[0] >> 31 else -8)
        self._eighths.extend([TRIGRAM_EIGHTHS if each >> 31 else -TRIGRAM_EIGHTHS for each in hashes[1:]])
        self[word] = number = len(self)
        return number

    def components(self, words: Sequence[str]) -> tuple[_Integers, _Integers, npt.NDArray[np.float64]]:
        """Return how many components each word has, and the places and weights of all of them, in the words' order."""
        with self._turn:
            numbers = np.fromiter(map(self.__getitem__, words), np.int64, len(words))
            counts = np.frombuffer(self._counts, np.int32)[numbers]
            starts = np.frombuffer(self._starts, np.int32)[numbers]
            lie = np.repeat(starts - (np.cumsum(counts) - counts), counts)
            lie += np.arange(len(lie))
            found = counts, np.frombuffer(self._places, np.int32)[lie], np.frombuffer(self._eighths, np.int8)[lie] / 8
            if len(self) > WORDS_REMEMBERED or len(self._places) > COMPONENTS_REMEMBERED:
                self.clear()
            return found


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
        self._words = _Words(settings.dimensions)

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
        words = [_WORD.findall(text.lower()) for text in texts]
        counts, places, weights = self._words.components(list(chain.from_iterable(words)))
        rows = np.repeat(np.arange(len(texts)) * self.dimensions, [len(each) for each in words])
        sums = np.bincount(np.repeat(rows, counts) + places, weights, minlength=len(texts) * self.dimensions).reshape(
            len(texts), self.dimensions
        )
        norms = np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
        for row in np.flatnonzero(norms == 0).tolist():
            # No words, or words that cancel out: a vector all the same, and the same one for the same text.
            sums[row, zlib.crc32(texts[row].encode()) % self.dimensions] = norms[row] = 1.0
        vectors: Vectors = (sums / norms).astype(np.float32)
        return vectors
