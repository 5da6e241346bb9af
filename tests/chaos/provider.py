"""The provider of embeddings under chaos: its vectors can be computed in SQL, and it remembers what it was asked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Container, Iterator, Mapping, Sequence, Set

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


class Held(msgspec.Struct, frozen=True):
    """The texts of which the target had a vector at some time."""

    at: float
    texts: Set[str]


class Provider(FakeProvider):
    """A provider whose vectors belong to their texts beyond doubt."""

    def __init__(self) -> None:
        super().__init__(DIMENSIONS)
        self.calls: list[Call] = []
        self.returning = list(RETURNING)
        """How texts begin whose documents go and come back."""
        self.rewound: list[Rewound] = []
        self.held: list[Held] = []
        """What the target had from time to time, above all just after something may have been lost."""
        self.rivals: list[Loss] = []
        """When two workers asked at the same time, of which one had been overtaken."""

    def vectors(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors."""
        return [[float(byte + 1) for byte in hashlib.md5(text.encode()).digest()[:DIMENSIONS]] for text in texts]

    def answered(self, texts: list[str], vectors: list[list[float]]) -> None:
        """Remember the call, unless its answer was spoiled."""
        if vectors == self.vectors(texts):
            self.calls.append(Call(time.monotonic(), tuple(texts)))
            self.embedded.update(texts)

    def _checked(self) -> Iterator[tuple[str, float]]:
        """Yield the texts that may be embedded once only, with the time of each call."""
        for call in list(self.calls):
            for text in call.texts:
                if text != WORD and not text.startswith(tuple(self.returning)):
                    yield text, call.at

    def covered(self) -> tuple[int, int]:
        """Return how many texts were embedded, and of how many a second call would have been found.

        Those are the ones that were seen in the target after their call, and whose call is still remembered.
        """
        first: dict[str, float] = {}
        for call in list(self.calls):
            for text in call.texts:
                if text != WORD:
                    first.setdefault(text, call.at)
        checked = {text for text, _ in self._checked()}
        rewound = min((one.at for one in self.rewound), default=float("inf"))
        seen = {
            text for held in self.held if held.at < rewound for text in held.texts if first.get(text, held.at) < held.at
        }
        return len(self.embedded.keys() - {WORD}), len(seen & checked)

    def repeated(self, losses: Collection[Loss], kept: Container[Place], *, within_s: float) -> list[Repeat]:
        """Return the texts that were embedded again although nothing was lost since.

        A text of which the target was seen to have a vector is not lost, whatever happened around its call; unless a
        server went back, or an overtaken worker still asks for it.

        :param kept: the chunks that are in the target now.
        :param within_s: how long after a call its result may still be lost if it was not seen in the target.
        """
        before: dict[str, float] = {}
        found = []
        for text, at in self._checked():
            last = before.get(text)
            before[text] = at
            if last is None or any(one.concerns(text, last, at, kept) for one in self.rewound):
                continue
            lost = any(one.concerns(last, within_s) for one in losses)
            if not lost or self._was_held(text, last, at):
                found.append(Repeat(text, last, at))
        return found

    def _was_held(self, text: str, first: float, again: float) -> bool:
        if any(one.at <= again for one in self.rewound) or any(one.concerns(again, 0.0) for one in self.rivals):
            return False
        return any(first < held.at < again and text in held.texts for held in self.held)
