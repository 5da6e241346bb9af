"""Suspects: texts whose call failed while the embedder works, so that one of them may be at fault.

    a call of many ─fails─► a quarter of them at a time ─fails─► … ─► one text ─fails─► that text's fault
        └─ quickly, and others were running ─► all of them once more, while no other call begins

They are asked for apart, one call at a time, so that texts which hang take one of the embedder's places, however many
they are, and all other texts have the rest.

What is known here is in memory only. A restart costs a call that fails again; the attempts of a text that failed alone
are in the backlog.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, takewhile

import msgspec

from cdcsync.model.embedding import Learnt

PARTS = 4
"""A call of several texts that fails is made again in so many parts. With two, more calls would hang for their whole
time limit before a text that hangs is found; with more, a limit of the embedder would be met in very small calls."""

MOST = 8_192
"""So many texts are suspected at most. What is forgotten is asked for beside others, fails, and is suspected again."""


class Suspicion(msgspec.Struct, frozen=True, eq=False):
    """How to ask for the texts of a call that failed; texts of the same call share one.

    :ivar texts: how many of them the next call has at most.
    :ivar alone: whether that call begins while no other runs: too many at a time may have been the cause.
    :ivar beside: how many calls were running when it failed, itself included.
    :ivar before: the sizes that were known before the first call with these texts failed.
    """

    texts: int = 1
    alone: bool = False
    beside: int = 1
    before: Learnt | None = None


UNKNOWN = Suspicion()
"""Of a text that failed before a restart, or so long ago that it was forgotten."""


class Suspects:
    """The suspected texts of one embedder, by hash."""

    def __init__(self) -> None:
        self._suspicions: OrderedDict[bytes, Suspicion] = OrderedDict()

    def __contains__(self, one: bytes) -> bool:
        return one in self._suspicions

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._suspicions)

    def of(self, one: bytes) -> Suspicion:
        """Return what is known of a text."""
        return self._suspicions.get(one, UNKNOWN)

    def note(self, texts: Iterable[bytes], suspicion: Suspicion) -> None:
        """Suspect texts, or suspect them in another way."""
        for one in texts:
            self._suspicions[one] = suspicion
        while len(self._suspicions) > MOST:
            self._suspicions.popitem(last=False)

    def acquit(self, texts: Iterable[bytes]) -> None:
        """Suspect texts no longer."""
        for one in texts:
            self._suspicions.pop(one, None)

    def together(self, texts: Mapping[bytes, str]) -> dict[bytes, str]:
        """Return the first of these texts, and those after it that the next call may have too."""
        suspicion = self.of(next(iter(texts)))
        alike = takewhile(lambda one: self.of(one[0]) is suspicion, texts.items())
        return dict(islice(alike, suspicion.texts))
