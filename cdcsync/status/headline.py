"""How an index and the whole pipeline are, in a few words: what the page's head, `status` and the window's title say.

The head is that of the index that is worst off. What concerns the worker, such as a source that does not answer, goes
before all indexes, because it makes their figures stale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cdcsync.config.names import own_name
from cdcsync.status.durations import human_seconds
from cdcsync.status.model import BackfillStatus, Headline, IndexStatus, Progress, Status, Tone
from cdcsync.status.progress import held

_ORDER: dict[Tone, int] = {"bad": 3, "warn": 2, "busy": 1, "good": 0}

_TITLES = {
    "initial": "loading",
    "resync": "reading the table again",
    "replay": "replay",
    "compare": "comparing",
    "verify": "verifying",
    "related": "rebuilding documents of changed related rows",
}


def with_headlines(status: Status, late_s: float, reasons: Sequence[str] = ()) -> Status:
    """Return the status with the headline of each index and of the whole.

    :param late_s: an index that is further behind than this is late (`worker.ready_max_lag_s`).
    :param reasons: why the worker says that it is not ready.
    """
    indexes = {
        name: msgspec.structs.replace(index, headline=_of_index(status, name, index, late_s))
        for name, index in status.indexes.items()
    }
    told = [index.headline for index in indexes.values() if index.headline is not None]
    worst = max(told, key=lambda one: _ORDER[one.tone], default=Headline("no index is configured", "bad"))
    if worst.tone == "good":
        # All are up to date: the figure is that of the one whose changes take longest.
        slowest = max(indexes.values(), key=_usual)
        worst = Headline(_up_to_date(slowest, status.lag_seconds), "good")
    whole = _of_worker(status)
    if whole is None and reasons and worst.tone in ("good", "busy"):
        whole = Headline(f"not ready: {reasons[0]}", "bad")
    return msgspec.structs.replace(status, indexes=indexes, headline=whole or worst)


def without_problems(status: Status) -> Status:
    """Return the status with the problems of paused indexes alone."""
    paused = tuple(f"index {name} is paused" for name, index in status.indexes.items() if index.state == "paused")
    return msgspec.structs.replace(status, problems=[one for one in status.problems if one.startswith(paused)])


def as_waiting(status: Status, name: str | None, why: str) -> Status:
    """Return the status of a worker that has to wait before it can follow its source.

    :param name: the worker's own, which is not stored while it has no lock.
    :param why: takes the place of what the servers let one suppose, such as that no worker runs.
    """
    guessed = ("no worker runs", f"worker {status.worker.name} runs and is not reading", status.worker.waits or why)
    problems = [why, *(one for one in status.problems if not one.startswith(guessed))]
    worker = msgspec.structs.replace(status.worker, name=name, waits=why)
    return msgspec.structs.replace(status, worker=worker, problems=problems)


def with_problems(status: Status, problems: Mapping[str, str]) -> Status:
    """Return the status with what the worker alone knows to be wrong, by index."""
    indexes = dict(status.indexes)
    for name, why in problems.items():
        # Of what stands beside an index, too.
        if (index := indexes.get(own_name(name))) is not None:
            indexes[own_name(name)] = msgspec.structs.replace(index, problem=why)
    told = [f"index {name}: {why}" for name, why in problems.items()]
    return msgspec.structs.replace(status, indexes=indexes, problems=[*status.problems, *told])


def as_starting(status: Status) -> Status:
    """Return the status with the headline of a worker that has just begun, unless an index is paused."""
    indexes = {
        name: msgspec.structs.replace(index, headline=Headline("not set up yet", "busy", name))
        if index.state == "absent"
        else index
        for name, index in status.indexes.items()
    }
    paused = [index.headline for index in indexes.values() if index.state == "paused"]
    return msgspec.structs.replace(status, indexes=indexes, headline=(*paused, Headline("starting", "busy"))[0])


def _of_worker(status: Status) -> Headline | None:
    """Return what concerns all indexes, if anything does."""
    if status.worker.waits is not None:
        return Headline(status.worker.waits, "bad")
    if status.worker.running is False:
        return Headline("no worker runs", "bad")
    if status.slot is not None and status.slot.wal_status == "lost":
        return Headline("the slot has lost WAL", "bad")
    if status.caught_up is None:
        return Headline("the source cannot be read, so the lag is unknown", "bad")
    return None


def _of_index(status: Status, name: str, index: IndexStatus, late_s: float) -> Headline:
    match index.state:
        case "absent":
            return Headline(index.reason or "not set up yet", "bad", name)
        case "paused":
            return Headline(f"paused: {index.reason or 'no reason is stored'}", "bad", name)
        case "building" | "live":
            pass
    if index.unreadable is not None:
        return Headline(f"cannot be read: {index.unreadable}", "bad", name)
    if index.locked is not None:
        return Headline(f"cannot use a table: {index.locked}", "bad", name)
    if index.problem is not None:
        return Headline(index.problem, "bad", name)
    embedder = status.embedders.get(index.embedder or "")
    if index.backlog and embedder is not None and embedder.problem is not None:
        return Headline(f"{_texts(index.backlog)} for vectors: {embedder.problem}", "bad", name)
    if index.state == "building" and index.reason:
        return Headline(f"waits to be built: {index.reason}", "bad", name)
    if index.progress or index.state == "building":
        return Headline(_loading(index), "warn" if held(index) else "busy", name)
    lag = status.lag_seconds
    if lag is not None and lag > late_s:
        return Headline(f"behind, {human_seconds(lag)}", "warn", name)
    if index.backfill is not None:
        return Headline(f"up to date; {_title(index.backfill)}", "warn" if held(index) else "busy", name)
    return Headline(_up_to_date(index, lag), "good", name)


def _up_to_date(index: IndexStatus, lag: float | None) -> str:
    """Say how soon changes can be found: the lag, or where there is none what was usual lately."""
    soon = max(lag or 0.0, _usual(index))
    return f"up to date, {human_seconds(soon)}" if soon else "up to date"


def _usual(index: IndexStatus) -> float:
    return (index.text_freshness.p50_s or 0.0) if index.text_freshness is not None else 0.0


def _loading(index: IndexStatus) -> str:
    title = "loading" if index.state == "building" else "embedding"
    if index.backfill is not None:
        title = _title(index.backfill)
    if any(one.what == "hnsw" for one in index.progress):
        title = "building the HNSW index"
        parts = [one for one in index.progress if one.what == "hnsw"]
    else:
        parts = list(index.progress)
    shares = [_share(one) for one in parts]
    known = [share for share in shares if share is not None]
    if not known:
        return title
    # Rows and vectors are made side by side: the load ends with the later of the two.
    left = [one.eta_s for one in parts if one.eta_s]
    eta = f", {human_seconds(max(left))} left" if left else ""
    return f"{title}{' at' if held(index) else ''} {int(min(known) * 100)}%{eta}"


def _title(load: BackfillStatus) -> str:
    return _TITLES[load.kind] + (", paused" if load.state == "paused" else "")


def _share(part: Progress) -> float | None:
    return None if part.total is None else min(1.0, part.done / part.total) if part.total else 1.0


def _texts(count: int) -> str:
    return "1 text waits" if count == 1 else f"{count:,} texts wait"
