"""Comparisons that were asked for: an index whose rows may have changed without the stream telling it.

    request ─► every transaction of that time is over, and applied ─► `verify` ─► `repair` of exactly what differs

What equals before a change is applied may not afterwards, so `verify` begins once the stream has come as far. On a
source that lacks a fix (`source/publications.fixed_in`), a table that was published while a transaction wrote to it may
not be sent any more once that transaction is decoded. So there the stream is opened anew before `verify`.

A false alarm costs one comparison by digests and reads no row again. If most of the index differs, the comparison ends
early, and the table is read again from its start.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping

import anyio
import msgspec
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.errors import CdcsyncError, Retry, leading
from cdcsync.flows.audit.comparison import UNDECIDED
from cdcsync.flows.audit.verification import DiffersAsAWhole, repair, verify
from cdcsync.flows.blocked import Blocked, Note, noted, outlast
from cdcsync.lsn import Lsn
from cdcsync.model.requests import Request
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS, LockedOut
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import insert_lsn
from cdcsync.source.publications import fixed_in
from cdcsync.source.transactions import running_transactions
from cdcsync.target.ddl.names import written_tables
from cdcsync.target.requests.queue import Queue
from cdcsync.target.requests.submission import Requests

log = structlog.get_logger()

POLL_S = 1.0
"""How often comparisons are looked for: one small query."""

REACH_S = 60.0
"""How long it is waited for the stream to come to a position before that is logged, and an earlier one asked for if the
source is behind it."""

Reach = Callable[[Lsn, bool], Awaitable[None]]
"""Returns once a position is applied, and if asked to, the stream is opened anew from there or later."""


async def compare_for_ever(
    source_dsn: str,
    target_dsn: str,
    schema: str,
    specs: Mapping[str, IndexSpec],
    deliveries: Mapping[str, Deliveries],
    reach: Reach,
    problems: MutableMapping[str, str],
) -> None:
    """Make the comparisons that are asked for, until cancelled.

    :param problems: takes whose transactions the comparison of an index waits for.
    """
    queue = Queue(schema)
    backoff = Backoff(_waits, first=POLL_S, waits="comparisons wait")
    locked = {name: LockedOut(name, spec.single_tables, written_tables(schema, spec)) for name, spec in specs.items()}
    async with (
        Session(source_dsn, "source", application_name="cdcsync compare") as source,
        Session(
            target_dsn, "target", application_name="cdcsync compare", lock_wait_ms=SHARED_LOCK_WAIT_MS, works=True
        ) as target,
    ):
        while True:
            async with backoff:
                with speaking_of("target"):
                    readable = [name for name in specs if not locked[name].lately]
                    request = await queue.oldest_comparison(await target.connection(), readable)
                if request is None:
                    await source.aclose()
                    await anyio.sleep(POLL_S)
                    continue
                spec = specs[request.index]
                comparing = await source.connection(), await target.connection()
                backoff.succeeded()  # a comparison may take hours
                try:
                    note = noted(problems, request.index)
                    await _serve(*comparing, schema, spec, deliveries[request.index], reach, request, note)
                except CdcsyncError as error:
                    if not await locked[request.index].note(error, source, target):
                        raise


def _waits(failure: Failure) -> None:
    log.warning("comparison_waits", error=str(failure.error), attempt=failure.attempt, delay_s=failure.delay_s)


async def _serve(
    source: Connection,
    target: Connection,
    schema: str,
    spec: IndexSpec,
    deliveries: Deliveries,
    reach: Reach,
    request: Request,
    note: Note,
) -> None:
    queue, requests = Queue(schema), Requests(schema)
    with speaking_of("target"):
        await queue.start(target, request, None)
    try:
        await _outlast(source, spec.name, deliveries, note)
        await _arrive(source, spec.name, reach)
        with speaking_of("target"):
            present = await queue.oldest_comparison(target, [spec.name])
        if present is None or present.id != request.id:
            return  # meanwhile it was cancelled, or the index is paused or loaded anew
        rows = await _compare(source, target, schema, spec)
    except DiffersAsAWhole as found:
        log.warning("index_read_again", index=spec.name, differing=found.suspects)
        with speaking_of("target"):
            async with target.transaction():
                await queue.compared(target, request, found.documents)
                await requests.reload(target, spec.name, rewrite=False)
                crash_point("reading in place of a comparison asked for")
            crash_point("reading in place of a comparison begun")
        return
    except BaseExceptionGroup as group:
        error = leading(group)
    except CdcsyncError as one:
        error = one
    else:
        with speaking_of("target"):
            await queue.compared(target, request, rows)
        return
    if not isinstance(error, CdcsyncError) or error.retry is Retry.AUTOMATIC:
        raise error
    # Rows that cannot be compared are read again.
    log.error("comparison_failed", index=spec.name, error=str(error))
    with speaking_of("target"):
        async with target.transaction():
            await queue.fail(target, request, str(error))
            await requests.reload(target, spec.name, rewrite=False)
            crash_point("comparison given up")
        crash_point("reading in place of a comparison committed")


async def _compare(source: Connection, target: Connection, schema: str, spec: IndexSpec) -> int:
    """Compare an index with its source and replay what differs; returns how many documents the source has."""
    findings = await verify(source, target, schema, spec, to_the_end=False)
    found = findings.verification
    if found.differs:
        # The worker had cause to compare. A difference that nothing foretold is an error, which the audit logs.
        log.warning("index_differed", index=spec.name, differences=found.differences)
    if found.differs or findings.undecided:
        # An undecided document may lack a change that was not sent, so it is read again as well.
        undecided = {UNDECIDED: [*findings.undecided]} if findings.undecided else {}
        await repair(target, schema, spec, msgspec.structs.replace(findings, keys=findings.keys | undecided))
    log.info("compared", index=spec.name, documents=found.documents, seconds=found.seconds)
    return found.documents


async def _arrive(source: Connection, index: str, reach: Reach) -> None:
    """Return once the stream has brought what is committed now.

    If it is opened anew there, no transaction of before is decoded. What was not sent until then is found by comparing.
    """
    anew = fixed_in(source.info.server_version) is not None
    end: Lsn | None = None
    while True:
        with speaking_of("source"):
            here = await insert_lsn(source)
        # A source that another took the place of may never come to where that one was.
        end = here if end is None else min(end, here)
        with anyio.move_on_after(REACH_S):
            await reach(end, anew)
            return
        log.warning("comparison_waits_for_stream", index=index, position=str(end))


async def _outlast(source: Connection, index: str, deliveries: Deliveries, note: Note) -> None:
    """Return once the transactions that are open now are over.

    What they did while the table was not sent may never be delivered, and it shows only once they have committed.
    """

    def say(sessions: list[str]) -> None:
        log.warning("comparison_waits_for_transactions", index=index, sessions=sessions)

    with speaking_of("source"):
        running = await running_transactions(source)
    deliveries.suspect(running)
    what = "rows of its table may have changed without being sent, and comparing them waits for"
    await outlast(source, running, Blocked(what, note, say))
