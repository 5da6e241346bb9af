"""`verify`, `repair` and the schedule: from sums to findings, and from findings to a replay of those keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from datetime import UTC, datetime
from typing import TypeAlias

import anyio
import msgspec
import structlog

from cdcsync.backoff import backoff_s
from cdcsync.crashpoints import crash_point
from cdcsync.errors import CdcsyncError, SetupError
from cdcsync.flows.audit.digests import IndexDigests, SourceDigests, Sums
from cdcsync.flows.audit.soundness import examine_index
from cdcsync.metrics import Metrics
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, Session, speaking_of
from cdcsync.source.tables import SourceTable
from cdcsync.target.failures.documents import failed_among
from cdcsync.target.keys import delete_vectors_without_chunks
from cdcsync.target.registry import Registry
from cdcsync.target.requests import Request, Requests

log = structlog.get_logger()

ROWS_PER_BUCKET = 256
"""Rows that share a bucket: few enough that one difference makes few candidates."""

MOST_BUCKETS = 1 << 14
"""The sums of this many take a few megabytes here, and each page of the source returns at most as many."""

ROWS_AT_ONCE = 200_000
"""Rows of differing buckets compared at once, of both sides together: some 60 MB here."""

EXAMPLES = 20
"""Keys of each problem that a report names."""

FOLLOW_S = 0.2
"""How often a request is looked at until it has ended."""

FAILED = "failed"
"""The problem of rows that are missing because no document could be made of them."""

FORCED = frozenset(("vector_dimensions", "vector_not_finite"))
"""Problems that chunking again does not mend: such a vector names the right text."""


class Verification(msgspec.Struct, frozen=True):
    """What a verification found.

    :ivar documents: how many documents the source's rows come to.
    :ivar candidates: documents that were compared one by one.
    :ivar differences: how many documents differ, by problem.
    :ivar examples: some of their keys, by problem.
    :ivar undecided: documents that changed each time they were looked at.
    :ivar waiting: chunks that wait for their vector, which is no difference.
    """

    index: str
    equal: bool
    documents: int
    candidates: int
    differences: dict[str, int]
    examples: dict[str, list[Key]]
    undecided: int
    waiting: int
    vectors_orphaned: int
    seconds: float
    finished_at: datetime


class Findings(msgspec.Struct, frozen=True):
    """A verification with every key that it found, for mending."""

    verification: Verification
    keys: dict[str, list[Key]]


EnsureWorker: TypeAlias = Callable[[], AbstractAsyncContextManager[object]]
"""Sees to it that a worker runs, for as long as it takes."""


async def verify(
    source: Connection, target: Connection, schema: str, spec: IndexSpec, *, ensure_worker: EnsureWorker = nullcontext
) -> Findings:
    """Compare an index with its source. Where something may differ, a worker has to run to say whether it does.

    :param spec: with the source's key types and the publication's row filter.
    :param ensure_worker: entered while a worker has to run.
    :raises SetupError: the comparison could not be made.
    """
    started = anyio.current_time()
    in_source, in_index = SourceDigests(source, spec), IndexDigests(target, schema, spec)
    with speaking_of("source", where=str(spec.shape.table)):
        estimate = await SourceTable(spec.shape, spec.source_key_types, spec.row_filter).estimate(source)
    buckets = _buckets(estimate)
    sums: dict[str, Sums] = {}

    async def sum_source() -> None:
        with speaking_of("source", where=str(spec.shape.table)):
            sums["source"] = await in_source.sums(buckets)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sum_source)
        with speaking_of("target", where=f"index {spec.name}"):
            sums["index"] = await in_index.sums(buckets)
    keys: dict[str, list[Key]] = {}
    candidates = 0
    for group in _groups(sums["source"].differing(sums["index"])):
        suspects = await _suspects(in_source, in_index, buckets, group)
        candidates += len(suspects)
        for key, problem in await _compared(target, schema, spec, suspects, ensure_worker):
            keys.setdefault(problem, []).append(key)
    with speaking_of("target", where=f"index {spec.name}"):
        keys = await _explained(target, schema, spec, keys)
        sound = await examine_index(target, schema, spec)
    keys.update({str(fault): found for fault, found in sound.faults.items()})
    undecided = keys.pop("undecided", [])
    verification = Verification(
        index=spec.name,
        equal=not keys and not sound.vectors_orphaned,
        documents=sums["source"].rows,
        candidates=candidates,
        differences={problem: len(found) for problem, found in keys.items()},
        examples={problem: found[:EXAMPLES] for problem, found in keys.items()},
        undecided=len(undecided),
        waiting=sound.waiting,
        vectors_orphaned=sound.vectors_orphaned,
        seconds=round(anyio.current_time() - started, 3),
        finished_at=datetime.now(UTC),
    )
    return Findings(verification, keys)


async def _explained(
    target: Connection, schema: str, spec: IndexSpec, keys: dict[str, list[Key]]
) -> dict[str, list[Key]]:
    """Tell the rows that are missing because no document could be made of them from the others."""
    missing = keys.pop("missing", [])
    failed = await failed_among(target, schema, spec.name, missing)
    parted = {
        "missing": [key for key in missing if key not in failed],
        FAILED: [key for key in missing if key in failed],
    }
    return {problem: found for problem, found in (keys | parted).items() if found}


def _buckets(rows: int) -> int:
    """Return how many buckets for about so many rows: a power of two."""
    return min(MOST_BUCKETS, 1 << max(6, (rows // ROWS_PER_BUCKET).bit_length()))


def _groups(differing: Mapping[int, int]) -> Iterator[list[int]]:
    """Yield the differing buckets in groups of no more than `ROWS_AT_ONCE` rows, or of one bucket."""
    group: list[int] = []
    rows = 0
    for bucket, more in differing.items():
        if group and rows + more > ROWS_AT_ONCE:
            yield group
            group, rows = [], 0
        group.append(bucket)
        rows += more
    if group:
        yield group


async def _suspects(in_source: SourceDigests, in_index: IndexDigests, buckets: int, wanted: Sequence[int]) -> list[Key]:
    """Return the keys in these buckets that the two do not have alike."""
    with speaking_of("source"):
        expected = {key: digest async for key, digest in in_source.rows(buckets, wanted)}
    suspects = []
    with speaking_of("target"):
        async for key, digest in in_index.rows(buckets, wanted):
            if expected.pop(key, None) != digest:
                suspects.append(key)
    return [*suspects, *expected]


async def _compared(
    target: Connection, schema: str, spec: IndexSpec, suspects: Sequence[Key], ensure_worker: EnsureWorker
) -> list[tuple[Key, str]]:
    """Have the engine compare these documents and return what differs."""
    if not suspects:
        return []
    requests = Requests(schema)
    with speaking_of("target"):
        async with target.transaction():
            id_ = await requests.add(target, spec.name, "verify", rewrite=False, filter_=None, keys=suspects)
            crash_point("comparison asked for")
        crash_point("request for a comparison committed")
    try:
        async with ensure_worker():
            await _done(target, requests, id_, spec)
    except BaseException:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 5):
            if not target.closed and not target.broken:
                await requests.action(target, spec.name, "cancel", id_=id_)
        raise
    with speaking_of("target"):
        return [(key, problem) for key, problem in await requests.found(target, id_)]


async def _done(target: Connection, requests: Requests, id_: int, spec: IndexSpec) -> Request:
    """Return when a request has been served.

    :raises SetupError: it failed, or someone cancelled it.
    """
    while True:
        with speaking_of("target"):
            request = await requests.one(target, id_)
        if request is not None and request.state == "done":
            return request
        if request is None or request.ended:
            what = "went with its index" if request is None else f"{request.state}: {request.error or 'by request'}"
            raise SetupError(f"request {id_} {what}", where=f"index {spec.name}", hint="start the command again")
        await anyio.sleep(FOLLOW_S)


async def repair(target: Connection, schema: str, spec: IndexSpec, findings: Findings) -> int:
    """Mend what was found, and only that, by a replay of those keys; returns how many documents that were.

    Rows that are gone leave the index, the others are chunked anew; vectors that are unusable are made again.
    """
    requests = Requests(schema)
    chunked = dict.fromkeys(itertools.chain.from_iterable(findings.keys.values()))
    forced = dict.fromkeys(
        itertools.chain.from_iterable(found for problem, found in findings.keys.items() if problem in FORCED)
    )
    asked = []
    with speaking_of("target", where=f"index {spec.name}"):
        if findings.verification.vectors_orphaned:
            await delete_vectors_without_chunks(target, schema, spec)
        async with target.transaction():
            if chunked:
                asked.append(await requests.add(target, spec.name, "replay", rewrite=True, filter_=None, keys=chunked))
            if forced:
                asked.append(
                    await requests.add(
                        target, spec.name, "replay", rewrite=False, filter_=None, keys=forced, force_embed=True
                    )
                )
            crash_point("repair asked for")
        crash_point("request for a repair committed")
    for id_ in asked:
        await _done(target, requests, id_, spec)
    return len(chunked)


async def verify_for_ever(
    source_dsn: str, target_dsn: str, schema: str, specs: Sequence[IndexSpec], metrics: Metrics, *, every_s: float
) -> None:
    """Verify each index once in `every_s` seconds, and show in the metrics what was found; until cancelled."""
    source = Session(source_dsn, "source", application_name="cdcsync verify")
    target = Session(target_dsn, "target", application_name="cdcsync verify")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(source.aclose)
        stack.push_async_callback(target.aclose)
        attempt = 0
        while True:
            await anyio.sleep(every_s if not attempt else backoff_s(attempt, most=every_s))
            try:
                for spec in specs:
                    if not await _is_live(await target.connection(), schema, spec):
                        continue
                    found = await verify(await source.connection(), await target.connection(), schema, spec)
                    _report(found.verification, metrics)
                attempt = 0
            except* CdcsyncError as group:
                attempt += 1
                log.warning("verify_failed", error=str(group.exceptions[0]), attempt=attempt)


async def _is_live(target: Connection, schema: str, spec: IndexSpec) -> bool:
    """Say whether an index is loaded and followed; before that, all differences are known ones."""
    with speaking_of("target"):
        entry = await Registry(schema).find(target, spec.name)
        return entry is not None and entry.state == "live"


def _report(found: Verification, metrics: Metrics) -> None:
    # Rows that no document could be made of have a gauge of their own: the index is as right as it can be.
    failed = found.differences.get(FAILED, 0)
    differences = sum(found.differences.values()) - failed + found.vectors_orphaned
    metrics.verify_differences.labels(found.index).set(differences)
    metrics.verify_finished.labels(found.index).set(found.finished_at.timestamp())
    metrics.verify_seconds.labels(found.index).set(found.seconds)
    say = log.error if differences else log.warning if failed else log.info
    say(
        "verified",
        index=found.index,
        equal=found.equal,
        documents=found.documents,
        differences=found.differences,
        undecided=found.undecided,
        seconds=found.seconds,
    )
