"""The rolling audit: compares every index with its source in the background, for ever, and reads again what differs.

It is what finds a fault that no rule foresees. It goes round the live indexes, a page of one at a time, and waits after
each page, so that both servers and this process have little to do for it. Where it is, is in the target: a worker that
is killed loses at most the last seconds of it.

1. A suspect is looked at again a moment later. Only what differs twice goes to the backfill engine, which tells for
   certain: beside changes that come in, most suspects were changing.
2. The place is stored once everything before it has been compared.
3. An index is proven equal when a comparison ends that found nothing. It begins anew after a load of the index: what a
   load has written was compared by none before. A difference is counted by kind, logged as an
   error and read again; the next comparison then begins at once, unless the one before it found differences, too.
4. A document that changed each time it was looked at is looked at again later. One that is undecided at the end of the
   comparison is counted: the index is proven equal but for those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import anyio
import msgspec
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.errors import CdcsyncError, Retry
from cdcsync.flows.audit.comparison import (
    FAILED,
    REPEATED,
    START,
    UNDECIDED,
    compare_step,
    compared,
    looked_at_later,
)
from cdcsync.flows.audit.digests import differing, source_digests
from cdcsync.flows.audit.verification import Verification, as_a_whole, repair_found
from cdcsync.metrics import Metrics
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS, LockedOut
from cdcsync.postgres.sessions import IDLE_S, Connection, Session
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.many import source_table
from cdcsync.target.audits import Audits, Place
from cdcsync.target.ddl.names import written_tables
from cdcsync.target.failures.documents import unlisted_among
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History

log = structlog.get_logger()

FIRST_S = 60.0
"""How long after its start a worker begins: it has more urgent things to do until then."""

REST_S = 180.0
"""How long an index rests between two comparisons: a small one is proven equal every few minutes."""

WITHIN_S = 12 * 3600.0
"""A comparison takes no longer than this beside steady changes, so that a day is never missed."""

BUSY_ROWS_PER_S = 50.0
"""Rows a second beside changes that come in, unless the index is too large for that: less than 1 % of a processor."""

PAGE_S = 0.5
"""A page has as many rows as are due in this time, so that no change waits behind a large one."""

MOST_ROWS = 5_000
"""Rows of a page at most."""

SECOND_LOOK_S = 1.0
"""How long after the first look a suspect is looked at again: by then a change has usually arrived."""

NOTE_S = 10.0
"""How often the place is stored: so much is compared again after a crash."""

ESTIMATED_S = 600.0
"""How often the rows of an index are estimated, beside changes that come in: that asks for each of its tables."""

SUSPECTS_AT_ONCE = 500

NOT_LIVE_S = 5.0
"""How often an index that is not live, or a pipeline that is late, is looked at again."""


class _Comparison:
    """A comparison of one index that is under way."""

    def __init__(self, schema: str, spec: IndexSpec) -> None:
        self.spec = spec
        self.locked = LockedOut(spec.name, spec.single_tables, written_tables(schema, spec))
        self.due = anyio.current_time() + FIRST_S
        self.anew = False
        """Whether to begin from the start, despite a stored place."""
        self.differed = False
        """Whether the comparison before this one found differences, which were read again."""
        self.loaded_at: datetime | None = None
        """When the last load of the index ended: what was compared before that is to be compared again."""
        self.looks = 0
        """How many rows, keys and chunks a comparison looks at, about."""
        self.estimated_at = -math.inf
        """When that was estimated."""
        self.restart()

    def restart(self) -> None:
        self.place: Place | None = None
        """Where it is; None before it is known, and after the end."""
        self.begun = self.noted = anyio.current_time()
        self.suspects: list[Key] = []
        self.faults: dict[str, list[Key]] = {}
        self.rows = 0
        """Rows looked at since the place was stored."""
        self.documents = self.candidates = self.waiting = self.orphaned = 0
        self.undecided: list[Key] = []
        """Documents that changed each time they were looked at so far."""
        self.forgotten = 0
        """How many others a worker before this one could not judge: which these are is not stored."""
        self.differences: dict[str, int] = {}
        self.differing = 0
        """Documents that differed, since the whole table was read again because of that."""
        self.examples: dict[str, list[Key]] = {}


class RollingAudit:
    """Audits the indexes of a pipeline until cancelled."""

    def __init__(
        self,
        source_dsn: str,
        target_dsn: str,
        schema: str,
        specs: Sequence[IndexSpec],
        metrics: Metrics,
        *,
        most_rows_per_s: float,
        every_s: float,
        busy: Callable[[], bool],
    ) -> None:
        """Make the audit.

        :param most_rows_per_s: the pace while nothing else is to do.
        :param every_s: begin a comparison so long after the last one began, at the full pace; 0 for the usual rest.
        :param busy: says whether changes come in.
        """
        self._source = Session(source_dsn, "source", application_name="cdcsync audit", idle_s=IDLE_S)
        self._target = Session(
            target_dsn,
            "target",
            application_name="cdcsync audit",
            idle_s=IDLE_S,
            lock_wait_ms=SHARED_LOCK_WAIT_MS,
            works=True,
        )
        self._schema = schema
        self._audits = Audits(schema)
        self._registry = Registry(schema)
        self._history = History(schema)
        self._metrics = metrics
        self._most_rows_per_s = most_rows_per_s
        self._every_s = every_s
        self._busy = busy
        self._comparisons = [_Comparison(schema, spec) for spec in specs]
        for one in self._comparisons:
            one.due = anyio.current_time() + min(FIRST_S, every_s or FIRST_S)

    async def run(self) -> None:
        """Audit, connecting again whenever a server was away."""

        def failed(failure: Failure) -> None:
            log.warning("audit_waits", error=str(failure.error), attempt=failure.attempt)

        backoff = Backoff(failed, first=1.0, most=60.0, errors=CdcsyncError, waits="the audit waits")
        while True:
            async with backoff, self._source, self._target:
                while True:
                    one = min(self._comparisons, key=lambda one: one.due, default=None)
                    if one is None:
                        return
                    await anyio.sleep(max(0.0, one.due - anyio.current_time()))
                    try:
                        await self._advance(one)
                    except CdcsyncError as error:
                        # From the stored place; but if that no longer fits the table, from the start.
                        one.restart()
                        one.anew = error.retry is not Retry.AUTOMATIC
                        one.due = anyio.current_time() + NOT_LIVE_S
                        # If its tables are locked, the others are compared meanwhile.
                        if not await one.locked.note(error, self._source, self._target):
                            raise
                    backoff.succeeded()

    async def _advance(self, one: _Comparison) -> None:
        """Do one step of a comparison and say when the next is due."""
        source, target, spec = await self._source.connection(), await self._target.connection(), one.spec
        with speaking_of("target"):
            entry = await self._registry.find(target, spec.name)
            load = await self._history.last_load(target, spec.name)
            read = await self._history.reads_table(target, spec.name)
        if entry is None or entry.state != "live" or (load is not None and not load.ended):
            one.restart()  # until it is loaded, all differences are known ones
            one.due = anyio.current_time() + NOT_LIVE_S
            return
        if read:
            # Its suspects would be compared only after that, and the other indexes wait for no index.
            one.due = anyio.current_time() + NOT_LIVE_S
            return
        loaded_at = load.finished_at if load is not None else None
        if loaded_at != one.loaded_at:
            one.restart()
            one.loaded_at = loaded_at
        if one.place is None and not await self._resume(target, one):
            return
        assert one.place is not None
        rows_per_s = await self._rows_per_s(source, one)
        limit = max(20, min(MOST_ROWS, round(rows_per_s * PAGE_S)))
        step = await compare_step(source, target, self._schema, spec, one.place, limit)
        if one.place.phase == "rows":
            one.rows += step.documents
        one.documents += step.documents
        one.suspects += step.suspects
        one.waiting += step.waiting
        one.orphaned += step.vectors_orphaned
        for problem, keys in step.faults.items():
            one.faults.setdefault(problem, []).extend(keys)
        now = anyio.current_time()
        one.due = now + step.looked / rows_per_s
        ended = step.following is None
        if ended or len(one.suspects) >= SUSPECTS_AT_ONCE or now - one.noted > NOTE_S:
            await self._conclude(source, target, one, step.following or one.place, ended=ended)
        one.place = step.following
        if ended:
            await self._finish(target, one)

    async def _resume(self, target: Connection, one: _Comparison) -> bool:
        """Find the position to resume from, or begin a comparison; False when none is due."""
        rest_s = self._every_s or REST_S
        with speaking_of("target"):
            audit = await self._audits.read(target, one.spec.name)
            if audit is not None and audit.finished_at is not None and not audit.differences:
                left = rest_s - (datetime.now(UTC) - audit.finished_at).total_seconds()
                if 0 < left <= rest_s:
                    one.due = anyio.current_time() + left
                    return False
            loaded_since = audit is not None and one.loaded_at is not None and audit.began_at < one.loaded_at
            if audit is None or audit.finished_at is not None or loaded_since or one.anew:
                one.anew = False
                await self._audits.begin(target, one.spec.name)
                crash_point("audit begun")
                one.place = START
            else:
                one.place, one.forgotten = audit.place, audit.undecided
        return True

    async def _rows_per_s(self, source: Connection, one: _Comparison) -> float:
        if self._every_s or not self._busy():
            return self._most_rows_per_s or float(MOST_ROWS) / PAGE_S
        if (now := anyio.current_time()) >= one.estimated_at + ESTIMATED_S:
            with speaking_of("source", where=str(one.spec.shape.table)):
                one.looks = 3 * await source_table(one.spec).estimate(source)
            one.estimated_at = now
        return min(self._most_rows_per_s, max(BUSY_ROWS_PER_S, one.looks / WITHIN_S))

    async def _conclude(
        self, source: Connection, target: Connection, one: _Comparison, place: Place, *, ended: bool
    ) -> None:
        """Find out about the suspects so far, have what differs read again, and store the place."""
        spec, found = one.spec, one.faults
        suspects = await self._looked_at_again(source, target, spec, one.suspects)
        compared_now = await compared(target, self._schema, spec, suspects)
        one.candidates += len(suspects)
        one.undecided = list(dict.fromkeys([*one.undecided, *compared_now.pop(UNDECIDED, [])]))
        if ended and one.undecided:
            later = await looked_at_later(target, self._schema, spec, one.undecided)
            one.undecided = later.pop(UNDECIDED, [])
            for problem, keys in later.items():
                compared_now.setdefault(problem, []).extend(keys)
        for problem, keys in compared_now.items():
            found.setdefault(problem, []).extend(keys)
        failed = found.pop(FAILED, [])
        if failed:
            one.differences[FAILED] = one.differences.get(FAILED, 0) + len(failed)
        differences = {problem: len(keys) for problem, keys in found.items()}
        if one.orphaned:
            differences["vectors_orphaned"] = one.orphaned
        if differences:
            log.error("audit_found", index=spec.name, differences=differences)
            for problem, count in differences.items():
                self._metrics.audit_differences.labels(spec.name, problem).inc(count)
                one.differences[problem] = one.differences.get(problem, 0) + count
        with speaking_of("target"):
            await self._audits.advance(
                target,
                spec.name,
                place,
                documents=one.rows,
                differences=sum(differences.values()),
                undecided=one.forgotten + len(one.undecided),
            )
            crash_point("audit advanced")
        found.pop(REPEATED, None)  # reading again would not tell which of the rows is meant
        await self._list(target, spec, compared_now.get(FAILED, []))
        if found or one.orphaned:
            one.differing += sum(differences.values())
            whole = as_a_whole(one.differing, one.documents)
            one.differing *= not whole
            await repair_found(
                *(target, self._schema, spec, found), whole=whole, vectors_orphaned=bool(one.orphaned), until_read=False
            )
        one.suspects, one.faults, one.rows, one.orphaned, one.noted = [], {}, 0, 0, anyio.current_time()

    async def _list(self, target: Connection, spec: IndexSpec, failed: Sequence[Key]) -> None:
        """See that rows without a document are listed, where `status` and `failures` find them."""
        with speaking_of("target"):
            unlisted = await unlisted_among(target, self._schema, spec.name, failed)
        if unlisted:
            log.warning("failures_unlisted", index=spec.name, rows=len(unlisted))
            await repair_found(target, self._schema, spec, {FAILED: unlisted}, whole=False, vectors_orphaned=False)

    async def _looked_at_again(
        self, source: Connection, target: Connection, spec: IndexSpec, suspects: Sequence[Key]
    ) -> list[Key]:
        """Return those suspects that differ a moment later, too; what the source does not have stays one."""
        if not suspects:
            return []
        await anyio.sleep(SECOND_LOOK_S)
        keys = list(dict.fromkeys(suspects))
        with speaking_of("source", where=str(spec.shape.table)):
            page = await source_digests(source, spec, None, len(keys), keys=keys)
        gone = [key for key in keys if key not in page.by_key]
        with speaking_of("target", where=f"index {spec.name}"):
            page = msgspec.structs.replace(page, by_key=page.by_key | dict.fromkeys(gone))
            return await differing(target, self._schema, spec, page)

    async def _finish(self, target: Connection, one: _Comparison) -> None:
        """Note the end of a comparison, and show what it found."""
        with speaking_of("target"):
            await self._audits.finish(target, one.spec.name)
            crash_point("audit finished")
            audit = await self._audits.read(target, one.spec.name)
        if audit is None:
            return
        differences = {problem: count for problem, count in one.differences.items() if problem != "vectors_orphaned"}
        report(
            Verification(
                index=one.spec.name,
                equal=not audit.differences and not one.differences and not audit.undecided,
                documents=audit.documents,
                candidates=one.candidates,
                differences=differences,
                examples={},
                undecided=audit.undecided,
                waiting=one.waiting,
                vectors_orphaned=one.differences.get("vectors_orphaned", 0),
                seconds=round(max(0.0, (datetime.now(UTC) - audit.began_at).total_seconds()), 3),
                finished_at=datetime.now(UTC),
            ),
            self._metrics,
        )
        at_once = bool(audit.differences) and not one.differed
        one.restart()
        one.differed = bool(audit.differences)
        one.due = anyio.current_time() + (0.0 if at_once else self._every_s or REST_S)


def report(found: Verification, metrics: Metrics) -> None:
    """Show in metrics and log what a comparison found."""
    # Rows and texts that have failed have gauges of their own: the index is as right as it can be.
    metrics.verify_differences.labels(found.index).set(found.wrong)
    metrics.verify_finished.labels(found.index).set(found.finished_at.timestamp())
    metrics.verify_seconds.labels(found.index).set(found.seconds)
    say = log.error if found.wrong else log.warning if found.differences else log.info
    say(
        "verified",
        index=found.index,
        equal=found.equal,
        documents=found.documents,
        differences=found.differences,
        undecided=found.undecided,
        seconds=found.seconds,
    )
