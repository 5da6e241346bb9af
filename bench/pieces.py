"""What `bench/judged.py --chunks` cuts and embeds with: other ways to cut documents, and one model for many indexes.

The ways are functions as `chunking.chunks` names them (docs/chunking.md): `each_equal_254` makes pieces of equal size,
each with the title, of up to 254 tokens. A document is a title, an empty line and a body. Sizes are tokens of MiniLM's
tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from cdcsync.config import Chunking, SentenceTransformersEmbedder
from cdcsync.documents.chunks import Chunker, make_chunker
from cdcsync.documents.chunks.lengths import Lengths
from cdcsync.documents.functions import ChunksOfDocument
from cdcsync.embedders import Kind, make_embedder

SECTION = SentenceTransformersEmbedder(model="sentence-transformers/all-MiniLM-L6-v2")

STEP = 4
"""The accuracy of equal sizes, in tokens."""

Cut = Callable[[str, int], list[str]]
"""Cuts a text into pieces of at most so many tokens."""


class Remembering:
    """MiniLM, which is asked for each text once, however many indexes have it."""

    def __init__(self) -> None:
        self._model = make_embedder("model", SECTION)
        self._known: dict[str, Any] = {}
        self.identity = f"remembered {self._model.identity}"
        self.dimensions = self._model.dimensions
        self.max_input_tokens = self._model.max_input_tokens
        self.tokenizer_json = self._model.tokenizer_json

    async def open(self) -> None:
        """Load the model."""
        await self._model.open()

    async def aclose(self) -> None:
        """Let go of the model."""
        await self._model.aclose()

    async def embed(self, texts: Sequence[str], *, kind: Kind) -> list[Any]:
        """Return the vectors, those of texts that were there before from memory."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, await self._model.embed(new, kind=kind), strict=True))
        return [self._known[text] for text in texts]


@lru_cache(1)
def _tokenizer() -> str | None:
    return make_embedder("model", SECTION).tokenizer_json


@lru_cache(None)
def _chunker(capacity: int) -> Chunker:
    return make_chunker(Chunking(max_tokens=capacity), _tokenizer(), capacity)


@lru_cache(1)
def _lengths() -> Lengths:
    return Lengths(_tokenizer())


def _tokens(text: str) -> int:
    return _lengths().of([text])[0]


def _cut(text: str, capacity: int) -> list[str]:
    return [chunk.text for chunk in _chunker(capacity).split(text)]


def _equally(text: str, capacity: int) -> list[str]:
    """Return as few pieces as ever, each as small as their number allows."""
    pieces = _cut(text, capacity)
    if len(pieces) < 2:
        return pieces
    for smaller in range(max(STEP, _tokens(text) // len(pieces)), capacity, STEP):
        if len(smaller_pieces := _cut(text, smaller)) == len(pieces):
            return smaller_pieces
    return pieces


def _without(fewest: int) -> Cut:
    """Return what cuts as always, and leaves out pieces of fewer tokens unless there are no others."""

    def cut(text: str, capacity: int) -> list[str]:
        pieces = _cut(text, capacity)
        return [piece for piece in pieces if _tokens(piece) >= fewest] or pieces

    return cut


def _in_first(cut: Cut, capacity: int) -> ChunksOfDocument:
    """Return a function that leaves the title where it is."""
    return lambda document: cut(document, capacity)


def _in_each(cut: Cut, capacity: int) -> ChunksOfDocument:
    """Return a function that puts the title before each piece."""

    def pieces(document: str) -> list[str]:
        title, _, body = document.partition("\n\n")
        if not body:
            return [document]
        room = max(capacity // 2, capacity - _tokens(f"{title}: "))
        return [f"{title}: {piece}" for piece in cut(body, room)]

    return pieces


first_equal_254, each_equal_254 = _in_first(_equally, 254), _in_each(_equally, 254)
first_equal_128, each_equal_128 = _in_first(_equally, 128), _in_each(_equally, 128)
first_without_32_254, each_without_32_254 = _in_first(_without(32), 254), _in_each(_without(32), 254)
first_without_64_254, each_without_64_254 = _in_first(_without(64), 254), _in_each(_without(64), 254)
first_without_64_128, each_without_64_128 = _in_first(_without(64), 128), _in_each(_without(64), 128)
