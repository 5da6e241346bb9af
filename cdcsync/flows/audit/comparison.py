"""A comparison of an index with its source, step by step, from wherever it was left.

    rows      the source's rows, in the order of their keys: does the index have the same under each?
    orphans   the index's keys: does the source still have each?
    chunks    the index in itself: hashes, numbering and vectors

Nothing is concluded from the first two: a row may have changed between two looks. They give *suspects*, which the
backfill engine compares at a mark of the stream (`compared`). What is found in the third is so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TypeAlias, assert_never

import anyio
import msgspec

from cdcsync.errors import SetupError
from cdcsync.flows.audit.digests import differing, source_digests
from cdcsync.flows.audit.soundness import examine_chunks
from cdcsync.model.requests import Request
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.many import source_table
from cdcsync.target.audits import START, Place
from cdcsync.target.failures.documents import failed_among
from cdcsync.target.keys import page_of_keys
from cdcsync.target.requests.history import History
from cdcsync.target.requests.submission import Requests

FOLLOW_S = 0.2
"""How often a request is looked at until it has ended."""

FAILED = "failed"
"""The problem of rows of which no document can be made, and of documents with a text that cannot be embedded."""

REPEATED = "repeated"
"""The problem of keys that several rows of the source have."""

UNDECIDED = "undecided"
"""The problem of documents that changed each time they were read; it is not a difference."""

LATER_TIMES = 3
"""How often an undecided document is compared once more, each time with as many looks as at first. What is undecided
even then has been changing dozens of times a second all the time."""

LATER_S = 1.0
"""The first pause before that; each is three times as long as the one before, so that a burst of changes is over."""

EnsureWorker: TypeAlias = Callable[[], AbstractAsyncContextManager[object]]
"""Sees to it that a worker runs, for as long as it takes."""


class Step(msgspec.Struct, frozen=True):
    """The findings of one step.

    :ivar suspects: keys of documents that may differ.
    :ivar faults: keys of documents that are wrong independently of the source, by problem.
    :ivar looked: how many rows, keys or chunks it looked at.
    :ivar documents: how many of them are rows of the source that a document is made of.
    :ivar following: where the next step begins; None after the last one.
    """

    looked: int
    following: Place | None
    documents: int = 0
    suspects: list[Key] = []
    faults: dict[str, list[Key]] = {}
    waiting: int = 0
    vectors_orphaned: int = 0


async def compare_step(
    source: Connection, target: Connection, schema: str, spec: IndexSpec, place: Place, limit: int
) -> Step:
    """Compare up to `limit` rows, keys or chunks from a place on."""
    match place.phase:
        case "rows":
            with speaking_of("source", where=str(spec.shape.table)):
                page = await source_digests(source, spec, place.after, limit)
            with speaking_of("target", where=f"index {spec.name}"):
                suspects = await differing(target, schema, spec, page)
            following = Place("orphans", None) if page.last else Place("rows", page.after)
            faults = {REPEATED: page.repeated} if page.repeated else {}
            documents = sum(one is not None for one in page.by_key.values())
            return Step(len(page.by_key), following, documents, suspects, faults)
        case "orphans":
            with speaking_of("target", where=f"index {spec.name}"):
                keys = await page_of_keys(target, schema, spec, place.after, limit)
            table = source_table(spec)
            with speaking_of("source", where=str(spec.shape.table)):
                absent = (await table.absent(source, keys))[1] if keys else []
            last = len(keys) < limit
            return Step(len(keys), Place("chunks", None) if last else Place("orphans", keys[-1]), suspects=absent)
        case "chunks":
            after = int(place.after[0]) if place.after else -1
            with speaking_of("target", where=f"index {spec.name}"):
                sound = await examine_chunks(target, schema, spec, after, limit)
            return Step(
                looked=sound.chunks,
                following=None if sound.last is None else Place("chunks", (str(sound.last),)),
                faults={str(fault): found for fault, found in sound.faults.items()},
                waiting=sound.waiting,
                vectors_orphaned=sound.vectors_orphaned,
            )
        case _:
            assert_never(place.phase)


async def compared(
    target: Connection, schema: str, spec: IndexSpec, suspects: Sequence[Key], ensure_worker: EnsureWorker = nullcontext
) -> dict[str, list[Key]]:
    """Request that the engine compares these documents; returns the keys that differ, by problem.

    :raises SetupError: the comparison could not be made.
    """
    if not suspects:
        return {}
    requests, history = Requests(schema), History(schema)
    with speaking_of("target"):
        async with target.transaction():
            id_ = await requests.add(
                target, spec.name, "verify", rewrite=False, filter_=None, keys=list(dict.fromkeys(suspects))
            )
            crash_point("comparison asked for")
        crash_point("request for a comparison committed")
    try:
        async with ensure_worker():
            await done(target, history, id_, spec)
    except BaseException:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + 5):
            if not target.closed and not target.broken:
                await requests.action(target, spec.name, "cancel", id_=id_)
        raise
    found: dict[str, list[Key]] = {}
    with speaking_of("target"):
        for key, problem in await history.found(target, id_):
            found.setdefault(problem, []).append(key)
        # Cutting a text can fail, too, which nobody tried to see how a document differs.
        missing = found.pop("missing", [])
        failed = await failed_among(target, schema, spec.name, missing)
    parted = {
        "missing": [key for key in missing if key not in failed],
        FAILED: [*found.pop(FAILED, []), *(key for key in missing if key in failed)],
    }
    return {problem: keys for problem, keys in (found | parted).items() if keys}


async def looked_at_later(
    target: Connection,
    schema: str,
    spec: IndexSpec,
    undecided: Sequence[Key],
    ensure_worker: EnsureWorker = nullcontext,
) -> dict[str, list[Key]]:
    """Compare documents again that changed each time they were looked at; returns the keys, by problem.

    :raises SetupError: the comparison could not be made.
    """
    found: dict[str, list[Key]] = {UNDECIDED: list(undecided)}
    for time in range(LATER_TIMES):
        if not (left := found.pop(UNDECIDED, [])):
            break
        await anyio.sleep(LATER_S * 3**time)
        for problem, keys in (await compared(target, schema, spec, left, ensure_worker)).items():
            found.setdefault(problem, []).extend(keys)
    return found


async def done(target: Connection, history: History, id_: int, spec: IndexSpec) -> Request:
    """Return when a request has been served.

    :raises SetupError: it failed, or someone cancelled it.
    """
    while True:
        with speaking_of("target"):
            request = await history.one(target, id_)
        if request is not None and request.state == "done":
            return request
        if request is None or request.ended:
            what = "went with its index" if request is None else f"{request.state}: {request.error or 'by request'}"
            raise SetupError(f"request {id_} {what}", where=f"index {spec.name}", hint="start the command again")
        await anyio.sleep(FOLLOW_S)


__all__ = [
    "FAILED",
    "REPEATED",
    "START",
    "UNDECIDED",
    "EnsureWorker",
    "Step",
    "compare_step",
    "compared",
    "done",
    "looked_at_later",
]
