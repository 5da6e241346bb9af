"""A worker's memory of itself: its rates of the last hour, recent events, and how fresh its indexes are.

The page draws these. The worker holds them, so that the page shows the last hour as soon as it is opened, and everyone
who opens it sees the same.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import msgspec
from prometheus_client import Counter

from cdcsync.lsn import Lsn
from cdcsync.metrics import Metrics
from cdcsync.metrics.windows import SLOT_S, Window
from cdcsync.status import Event, Freshness, IndexStatus, Status, Tone

EVERY_S = 10.0
"""The distance of two points: an hour is then 360 of them, about as many as the page has room for."""

KEPT = 360
"""Points: one hour."""

EVENTS = 50
"""How many events are kept: enough for an operator who comes back after a night, in about 10 kB."""

BRIEF = timedelta(seconds=2)
"""A problem that ended sooner is not remembered."""

GONE_AFTER = timedelta(seconds=5)
"""A problem that was not reported for so long has ended. Its sources are read at different times, and some flicker."""


_FIGURES = re.compile(r"[\d.,]+ \w+ (?:has|have|is|are)\b|[\d.,]+")
"""The parts of a problem's words that may change while it stays the same problem."""


class Point(msgspec.Struct, frozen=True):
    """Means since the point before: bytes, changes and vectors per second. `wal` and `lag` are None where not known."""

    at: float
    wal: float | None
    received: float
    changes: float
    vectors: float
    backlog: int
    lag: float | None


class History(msgspec.Struct, frozen=True):
    """The last hour, the oldest first; the answer to `/history`."""

    every_s: float
    points: list[Point]


class _Totals(msgspec.Struct, frozen=True):
    """The counters at the last point; the next one is the difference."""

    at: datetime
    wal: int | None
    received: float
    changes: float
    vectors: float


class _Open(msgspec.Struct):
    """An event that has not ended for certain."""

    event: Event
    seen: datetime
    stored: bool
    """Whether it is what the target says of an index, which does not flicker."""

    @property
    def lasted(self) -> bool:
        """Whether it is worth remembering: a worker that connects again has a moment without a stream."""
        return self.stored or self.seen - self.event.since >= BRIEF

    @property
    def ended(self) -> Event:
        """The event, as it ended when it was seen for the last time."""
        return msgspec.structs.replace(self.event, until=self.seen)

    def shown(self, at: datetime) -> Event | None:
        """Return the event as a reading of this time shows it; None if it does not."""
        if self.seen >= at:
            return self.event
        if self.stored:
            return self.ended
        return self.event if self.lasted else None


class Memory:
    """Remembers readings of the status.

    :param metrics: the worker's own, whose counters the rates are of.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._points: deque[Point] = deque(maxlen=KEPT)
        self._before: _Totals | None = None
        self._open: dict[str, _Open] = {}
        self._ended: deque[Event] = deque(maxlen=EVENTS)
        self._differed: dict[str, datetime] = {}

    def history(self) -> History:
        """Return the rates of the last hour."""
        return History(EVERY_S, list(self._points))

    def noted(self, status: Status, reasons: Iterable[str]) -> Status:
        """Remember a reading, and return it with what is remembered.

        :param reasons: why the worker is not ready, with what it concerns.
        """
        self._note_point(status)
        self._note_events(status, reasons)
        open_ = [one.shown(status.read_at) for one in self._open.values()]
        events = sorted([*filter(None, open_), *self._ended], key=lambda event: event.since, reverse=True)[:EVENTS]
        indexes = {
            name: msgspec.structs.replace(
                index,
                text_freshness=freshness(self._metrics.recent_text.get(name)),
                vector_freshness=freshness(self._metrics.recent_vectors.get(name)),
            )
            for name, index in status.indexes.items()
        }
        return msgspec.structs.replace(status, indexes=indexes, events=events)

    def happened(self, words: str, at: datetime, tone: Tone = "good", index: str | None = None) -> None:
        """Remember something that has no duration."""
        self._ended.append(Event(words, tone, at, at, index))

    def _note_point(self, status: Status) -> None:
        metrics, before = self._metrics, self._before
        passed = math.inf if before is None else (status.read_at - before.at).total_seconds()
        if 0 <= passed < EVERY_S:
            return
        end = None
        if status.checkpoint is not None and status.lag_bytes is not None:
            end = int(Lsn.parse(status.checkpoint)) + status.lag_bytes
        now = _Totals(
            status.read_at, end, _total(metrics.received_bytes), _total(metrics.changes), _total(metrics.vectors)
        )
        self._before = now
        if before is None or passed < 0:  # the target's clock went back
            return
        self._points.append(
            Point(
                at=round(now.at.timestamp(), 1),
                wal=None if now.wal is None or before.wal is None else _rate(now.wal - before.wal, passed),
                received=_rate(now.received - before.received, passed),
                changes=_rate(now.changes - before.changes, passed),
                vectors=_rate(now.vectors - before.vectors, passed),
                backlog=sum(index.backlog for index in status.indexes.values()),
                lag=status.lag_seconds,
            )
        )

    def _note_events(self, status: Status, reasons: Iterable[str]) -> None:
        at = status.read_at
        stored = [one for name, index in status.indexes.items() for one in _of_index(name, index, at)]
        for key, event in [*stored, *_problems(status, reasons)]:
            known = self._open.get(key)
            if known is None:
                self._open[key] = _Open(event, at, (key, event) in stored)
            else:
                # The words may hold figures that change.
                known.event = msgspec.structs.replace(event, since=known.event.since)
                known.seen = at
        for key, one in list(self._open.items()):
            if at - one.seen > GONE_AFTER:
                del self._open[key]
                if one.lasted:
                    self._ended.append(one.ended)
        for name, index in status.indexes.items():
            if index.differed_at is not None and self._differed.get(name) != index.differed_at:
                self._differed[name] = index.differed_at
                self.happened("the audit found differences and read them again", index.differed_at, "warn", name)


def _problems(status: Status, reasons: Iterable[str]) -> Iterable[tuple[str, Event]]:
    """Yield the current problems, each with a key that stays the same while it lasts."""
    paused = {name for name, index in status.indexes.items() if index.state == "paused"}
    told = [*reasons, *status.problems]
    for text in dict.fromkeys(told):
        if not any(text.startswith(f"index {name} is paused") for name in paused):
            about = next((name for name in status.indexes if text.startswith(f"index {name}")), None)
            words = text if about is None else text.removeprefix(f"index {about}").lstrip(": ")
            yield _FIGURES.sub("#", text), Event(words, "bad", status.read_at, index=about)


_KINDS: Mapping[str, str] = {
    "initial": "first load",
    "compare": "comparison with the table",
    "related": "rebuild of documents whose related rows changed",
}


def _of_index(name: str, index: IndexStatus, at: datetime) -> Iterable[tuple[str, Event]]:
    """Yield what an index goes through, likewise."""
    if index.state == "paused":
        yield f"paused {name}", Event(f"paused: {index.reason}", "bad", index.since or at, index=name)
    elif index.state == "building" and index.backfill is None:
        built = any(one.what == "hnsw" for one in index.progress)
        words = "building the HNSW index" if built else "first load: the last vectors"
        yield f"{words} {name}", Event(words, "busy", at, index=name)
    if (load := index.backfill) is not None:
        words = _KINDS.get(load.kind, load.kind)
        waits = "" if load.state == "running" else f", {load.state}"
        yield f"load {name} {load.id}", Event(f"{words}{waits}", "busy", at, index=name)


def freshness(window: Window | None) -> Freshness | None:
    """Return what a window says; None while nothing was measured."""
    if window is None or not (count := window.count()):
        return None
    return Freshness(count, window.quantile(0.5), window.quantile(0.99), SLOT_S, window.strip(0.5, 0.99))


def _total(counter: Counter) -> float:
    return sum(
        sample.value for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")
    )


def _rate(difference: float, seconds: float) -> float:
    return round(max(0.0, difference) / seconds, 2)
