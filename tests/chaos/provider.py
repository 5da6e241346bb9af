"""The provider of embeddings under chaos: its vectors can be computed in SQL, and it remembers what it was asked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable

import msgspec

from cdcsync.embedders.protocol import WORD
from tests.chaos.tables import RETURNING
from tests.support.provider import FakeProvider

DIMENSIONS = 8

VECTOR_SQL = (
    "(SELECT array_agg((get_byte(decode(md5({text}), 'hex'), at) + 1)::real ORDER BY at)"
    f" FROM generate_series(0, {DIMENSIONS - 1}) AS at)"
)
"""The vector of a text as an array: the first bytes of its MD5, each one more, so that none is all zeros."""


class Call(msgspec.Struct, frozen=True):
    """A request that was answered with vectors."""

    at: float
    texts: tuple[str, ...]


class Provider(FakeProvider):
    """A provider whose vectors belong to their texts beyond doubt."""

    def __init__(self) -> None:
        super().__init__(DIMENSIONS)
        self.calls: list[Call] = []

    def vectors(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors, and remember the call."""
        self.calls.append(Call(time.monotonic(), tuple(texts)))
        return [[float(byte + 1) for byte in hashlib.md5(text.encode()).digest()[:DIMENSIONS]] for text in texts]

    def repeated(self, losses: Iterable[float], *, within_s: float) -> list[str]:
        """Return the texts that were embedded again although nothing was lost since.

        :param losses: when something happened that may lose the result of a call under way.
        :param within_s: how long after a call its result may still be lost.
        """
        times = sorted(losses)
        before: dict[str, float] = {}
        found = []
        for call in self.calls:
            for text in call.texts:
                if text == WORD or text.startswith(RETURNING):
                    continue
                last = before.get(text)
                if last is not None and not any(last - within_s <= at <= last + within_s for at in times):
                    found.append(text)
                before[text] = call.at
        return found
