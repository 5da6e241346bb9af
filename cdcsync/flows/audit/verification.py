"""`verify` and `repair`: a comparison from its start to its end at once, and a replay of the keys that it found."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Self

import anyio
import msgspec
import structlog

from cdcsync.errors import SetupError
from cdcsync.flows.audit.comparison import (
    FAILED,
    START,
    UNDECIDED,
    EnsureWorker,
    compare_step,
    compared,
    done,
    looked_at_later,
)
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.many import source_table
from cdcsync.target.audits import Place
from cdcsync.target.ddl.missing import Missing, missing_relations
from cdcsync.target.keys import delete_vectors_without_chunks
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History
from cdcsync.target.requests.submission import Requests

log = structlog.get_logger()

PAGE_ROWS = 5_000
"""Rows compared at once: a tenth of a second on each server, and half a megabyte here."""

SUSPECTS_AT_ONCE = 50_000
"""Suspects are compared at the latest when there are so many: their keys are in memory here."""

MANY = 5_000
SHARE = 0.5
LOOKED_SHARE = 0.1
"""If so many documents differ, and this share of those that were looked at, once that is this share of the table, the
table is read again from its start. Its pages are read in order; single keys are found, compared and read one by one."""

EXAMPLES = 20
"""Keys of each problem that a report names."""

FORCED = frozenset(("vector_dimensions", "vector_not_finite", "vector_twice"))
"""Problems that chunking again does not fix: such a vector names the right text."""


class Verification(msgspec.Struct, frozen=True):
    """The findings of a verification.

    :ivar documents: how many documents the source's rows come to.
    :ivar candidates: documents that were compared one by one.
    :ivar equal: whether nothing differs, which is claimed only if every document could be judged.
    :ivar differences: how many documents differ, by problem.
    :ivar examples: some of their keys, by problem.
    :ivar undecided: documents that changed each time they were looked at, so that nothing is known of them.
    :ivar waiting: chunks that wait for their vector; that is not a difference.
    :ivar missing: relations that a live index lacks in the target.
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
    missing: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether anything was found that is not as the source has it; an undecided document was not."""
        return bool(self.differences or self.vectors_orphaned or self.missing)

    @property
    def wrong(self) -> int:
        """How many documents and vectors are not as they can be: what has failed is."""
        failed = self.differences.get(FAILED, 0)
        return sum(self.differences.values()) - failed + self.vectors_orphaned

    @classmethod
    def of_nothing(cls, index: str, missing: tuple[str, ...]) -> Self:
        """Return the verification of an index whose tables are missing: nothing can be compared."""
        return cls(index, False, 0, 0, {}, {}, 0, 0, 0, 0.0, datetime.now(UTC), missing)


async def missing_of(target: Connection, schema: str, index: IndexSpec) -> Missing:
    """Return which relations a live index lacks; one that is being built lacks those that are built at the end."""
    with speaking_of("target", where=f"index {index.name}"):
        entry = await Registry(schema).find(target, index.name)
        if entry is None or entry.state != "live":
            return Missing()
        return await missing_relations(target, schema, index, view=entry.view)


async def require_still_searched(target: Connection, schema: str, index: IndexSpec) -> None:
    """Refuse to conclude from a comparison of chunks and vectors that searches use no more.

    :raises SetupError: they use another generation by now, or the index was dropped.
    """
    with speaking_of("target", where=f"index {index.name}"):
        entry = await Registry(schema).find(target, index.name)
    if entry is None or (entry.relations, entry.generation) != (index.relations, index.generation):
        raise SetupError(
            "the index was dropped or switched to another generation while it was compared, so nothing is known of it",
            where=f"index {index.name}",
            hint="start the command again",
        )


def as_a_whole(differing: int, looked: int, estimate: float = 0) -> bool:
    """Say whether so much differs that the whole table should be read again.

    :param looked: how many documents were compared, of which so many differ.
    :param estimate: how many rows the table has, if there are more to be compared.
    """
    enough = looked >= min(SUSPECTS_AT_ONCE, LOOKED_SHARE * estimate)
    return enough and differing >= max(MANY, SHARE * looked)


class DiffersAsAWhole(Exception):
    """So much of an index may differ that it is not worth finding out which documents do."""

    def __init__(self, documents: int, suspects: int) -> None:
        super().__init__(f"{suspects} of the first {documents} documents may differ")
        self.documents = documents
        self.suspects = suspects


class Findings(msgspec.Struct, frozen=True):
    """A verification with every key that it found, for the repair."""

    verification: Verification
    keys: dict[str, list[Key]]
    undecided: Sequence[Key] = ()


async def verify(
    source: Connection,
    target: Connection,
    schema: str,
    spec: IndexSpec,
    *,
    ensure_worker: EnsureWorker = nullcontext,
    to_the_end: bool = True,
) -> Findings:
    """Compare an index with its source. Where something may differ, a worker has to run to say whether it does.

    :param spec: with the source's key types and the publication's row filter.
    :param ensure_worker: entered while a worker has to run.
    :param to_the_end: whether to find out what differs even if it is most of the index.
    :raises SetupError: the comparison could not be made.
    :raises DiffersAsAWhole: it is most of the index, as far as that was looked at.
    """
    started = anyio.current_time()
    with speaking_of("source", where=str(spec.shape.table)):
        estimate = await source_table(spec).estimate(source)
    keys: dict[str, list[Key]] = {}
    suspects: list[Key] = []
    documents = candidates = waiting = orphaned = 0
    place: Place | None = START
    while place is not None:
        step = await compare_step(source, target, schema, spec, place, PAGE_ROWS)
        documents += step.documents
        suspects += step.suspects
        if not to_the_end and as_a_whole(candidates + len(suspects), documents, estimate):
            raise DiffersAsAWhole(documents, candidates + len(suspects))
        waiting += step.waiting
        orphaned += step.vectors_orphaned
        _gather(keys, step.faults)
        place = step.following
        if len(suspects) >= SUSPECTS_AT_ONCE or place is None or place == _CHUNKS:
            candidates += len(suspects)
            _gather(keys, await compared(target, schema, spec, suspects, ensure_worker))
            suspects = []
    if undecided := keys.pop(UNDECIDED, []):
        _gather(keys, await looked_at_later(target, schema, spec, undecided, ensure_worker))
        undecided = keys.pop(UNDECIDED, [])
    verification = Verification(
        index=spec.name,
        equal=not keys and not orphaned and not undecided,
        documents=documents,
        candidates=candidates,
        differences={problem: len(found) for problem, found in keys.items()},
        examples={problem: found[:EXAMPLES] for problem, found in keys.items()},
        undecided=len(undecided),
        waiting=waiting,
        vectors_orphaned=orphaned,
        seconds=round(anyio.current_time() - started, 3),
        finished_at=datetime.now(UTC),
    )
    return Findings(verification, keys, undecided)


_CHUNKS = Place("chunks", None)


def _gather(keys: dict[str, list[Key]], found: dict[str, list[Key]]) -> None:
    for problem, some in found.items():
        keys[problem] = list(dict.fromkeys([*keys.get(problem, ()), *some]))


async def repair(target: Connection, schema: str, spec: IndexSpec, findings: Findings) -> int:
    """Repair the differences that were found; return the number of repaired documents."""
    return await repair_found(
        target,
        schema,
        spec,
        findings.keys,
        whole=as_a_whole(sum(map(len, findings.keys.values())), findings.verification.documents),
        vectors_orphaned=bool(findings.verification.vectors_orphaned),
    )


async def repair_found(
    target: Connection,
    schema: str,
    spec: IndexSpec,
    keys: Mapping[str, Sequence[Key]],
    *,
    whole: bool,
    vectors_orphaned: bool,
    until_read: bool = True,
) -> int:
    """Request that these documents are read again, by a replay of their keys; returns how many they are.

    Rows that are gone leave the index, the others are chunked anew; vectors that are unusable are made again.

    :param keys: by problem.
    :param whole: whether to read all documents again instead.
    :param vectors_orphaned: whether there are vectors without a chunk.
    :param until_read: whether to wait for that if all documents are read.
    """
    requests = Requests(schema)
    chunked = dict.fromkeys(itertools.chain.from_iterable(keys.values()))
    forced = dict.fromkeys(itertools.chain.from_iterable(found for problem, found in keys.items() if problem in FORCED))
    asked = []
    with speaking_of("target", where=f"index {spec.name}"):
        if vectors_orphaned:
            await delete_vectors_without_chunks(target, schema, spec)
        async with target.transaction():
            if whole:
                log.warning("index_read_again", index=spec.name, differing=len(chunked))
                reload = await requests.reload(target, spec.name, rewrite=True)
                if until_read:
                    asked.append(reload)
            elif chunked:
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
        await done(target, History(schema), id_, spec)
    return len(chunked)
