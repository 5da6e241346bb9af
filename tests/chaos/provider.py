"""The provider of embeddings under chaos: its vectors can be computed in SQL, and it remembers what it was asked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Container, Mapping, Sequence

import msgspec

from cdcsync.embedders.protocol import WORD
from tests.chaos.proxy import Link
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


class Repeat(msgspec.Struct, frozen=True):
    """A text that was embedded twice, and when."""

    text: str
    first: float
    again: float


class Loss:
    """A time in which the results of calls under way may be lost: a moment, unless it is prolonged.

    :param links: connections that forward nothing from now on; it lasts until the worker has given them up.
    """

    def __init__(self, links: Sequence[Link] = ()) -> None:
        self.since = self.until = time.monotonic()
        self._links = links

    def prolong(self) -> None:
        """Have it last until now."""
        self.until = time.monotonic()

    def concerns(self, at: float, within_s: float) -> bool:
        """Say whether the results of a call at that time may be lost."""
        ends = [self.until, *(link.ended_at or time.monotonic() for link in self._links)]
        return self.since - within_s <= at <= max(ends) + within_s


Place = tuple[str, int, str]
"""A chunk as it was written: relation, id, and when."""


class Rewound(msgspec.Struct, frozen=True):
    """A server went back: what the target had no vector of at that time may be embedded again, however old it is.

    So may be what it lost directly afterwards: a batch that the worker still had in hand, of transactions which the
    source has lost, may replace texts that are there again once everything is read again.

    :ivar held: the chunks that had a vector, by their text.
    """

    at: float
    held: Mapping[str, Collection[Place]]

    def concerns(self, text: str, first: float, again: float, kept: Container[Place]) -> bool:
        """Say whether that explains why a text was embedded twice.

        :param kept: the chunks that are in the target in the end.
        """
        return first <= self.at <= again and not any(place in kept for place in self.held.get(text, ()))


class Provider(FakeProvider):
    """A provider whose vectors belong to their texts beyond doubt."""

    def __init__(self) -> None:
        super().__init__(DIMENSIONS)
        self.calls: list[Call] = []
        self.returning = list(RETURNING)
        """How texts begin whose documents go and come back."""
        self.rewound: list[Rewound] = []

    def vectors(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors, and remember the call."""
        self.calls.append(Call(time.monotonic(), tuple(texts)))
        return [[float(byte + 1) for byte in hashlib.md5(text.encode()).digest()[:DIMENSIONS]] for text in texts]

    def repeated(self, losses: Collection[Loss], kept: Container[Place], *, within_s: float) -> list[Repeat]:
        """Return the texts that were embedded again although nothing was lost since.

        :param kept: the chunks that are in the target now.
        :param within_s: how long after a call its result may still be lost.
        """
        before: dict[str, float] = {}
        found = []
        for call in self.calls:
            for text in call.texts:
                if text == WORD or text.startswith(tuple(self.returning)):
                    continue
                last = before.get(text)
                before[text] = call.at
                if last is None or any(one.concerns(last, within_s) for one in losses):
                    continue
                if not any(one.concerns(text, last, call.at, kept) for one in self.rewound):
                    found.append(Repeat(text, last, call.at))
        return found
