"""The generations of an index's vectors, side by side: what makes each, how far it is, and how good."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cdcsync.config.differences import KeyChange, contents_of, differences
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.status.builds import Builds, generation_waits, index_waits
from cdcsync.status.counting import count_index
from cdcsync.target import evaluations
from cdcsync.target.ddl.names import Names
from cdcsync.target.entries import Entry
from cdcsync.target.failures.documents import Listed
from cdcsync.target.generations import Generation
from cdcsync.target.requests.history import History

NONE_LEFT_OUT = Listed()


class GenerationStatus(msgspec.Struct, frozen=True):
    """One generation of an index.

    `state` is `live`, or else `filling`, `ready`, `activating` or `dropping`. Of `chunks`, `vectors` have a vector,
    `waiting` wait for one, `failed` cannot have one, and of `discarded` nobody tries to make one any more. `rate` is in
    chunks a second over the whole fill, `eta_s` in seconds; both are None unless it is being filled. `bytes` is the
    disk space of its tables and indexes. `reason` says why it cannot be filled or built now, `refusal` why it was not
    dropped or made live when that was last asked. `has_embedder` says whether the worker's configuration has an
    embedder for it, None if no worker has looked.
    `own_chunks` says in which keys a generation that has chunks of its own is unlike the live one; it is empty for one
    that shares the live one's chunks. `read` is the share of the table's rows that it was made of so far, while it is
    filled. `failed_documents` is how many rows at least no document could be made of, in a generation that has chunks
    of its own.
    """

    generation: int
    state: str
    embedder: str | None
    model: str
    dimensions: int
    vector_type: str
    distance: str
    m: int | None
    ef_construction: int | None
    chunks: int
    vectors: int
    waiting: int
    failed: int
    bytes: int
    recall: float | None
    quantise: str = "none"
    rate: float | None = None
    eta_s: float | None = None
    reason: str | None = None
    refusal: str | None = None
    own_chunks: list[str] = []
    read: float | None = None
    failed_documents: int = 0
    discarded: int = 0
    has_embedder: bool | None = None


async def read_generations(
    connection: Connection,
    schema: str,
    entry: Entry,
    generations: Sequence[Generation],
    builds: Builds,
    *,
    other: Entry | None,
    left_out: Listed,
    evaluated: bool = True,
) -> list[GenerationStatus]:
    """Return the state of these generations of an index, in their order.

    :param other: the index that stands beside it, where there is one.
    :param left_out: the rows that no document of that one could be made of.
    :param evaluated: whether this role may read what was measured of them.
    """
    found = []
    for one in generations:
        of = other if other is not None and one.of_other_chunks else entry
        status = await _read(connection, schema, of, one, live=one.generation == entry.generation, evaluated=evaluated)
        status = msgspec.structs.replace(status, reason=generation_waits(of, one, builds), refusal=one.refusal)
        if other is not None and of is other:
            load = await History(schema).last_load(connection, other.name)
            share = None if load is None or not load.rows_total else min(1.0, load.rows_done / load.rows_total)
            status = msgspec.structs.replace(
                status,
                eta_s=None,
                read=round(share, 4) if share is not None and status.state == "filling" else None,
                state=_state_beside(other, status.state),
                failed_documents=left_out.at_least,
                own_chunks=[str(change) for change in _unlike(entry, other)],
                reason=index_waits(other, builds),
            )
        found.append(status)
    return found


def hindrance(generation: int, reason: str) -> str:
    """Return a sentence of why a generation cannot be filled or built now."""
    return f"generation {generation} cannot be filled or built now, which is tried again: {reason}"


def _state_beside(other: Entry, state: str) -> str:
    if other.activation_asked_at is not None and state == "ready":
        return "activating"
    # One that is read again, after a gap for one, is not whole until that is through.
    return "filling" if state == "ready" and other.state != "live" else state


def _unlike(entry: Entry, other: Entry) -> list[KeyChange]:
    """Return in which keys the chunks that stand beside an index are made in another way."""
    if entry.configuration is None or other.configuration is None:
        return []
    return list(differences(contents_of(entry.configuration), contents_of(other.configuration)))


async def _read(
    connection: Connection, schema: str, entry: Entry, one: Generation, *, live: bool, evaluated: bool
) -> GenerationStatus:
    names, number = Names(schema, entry.relations), one.generation
    tables = list(names.tiers(number).values())
    if one.of_other_chunks:
        tables += [names.chunks, names.backlog]
    tiers = [table.as_string(connection) for table in tables]
    there, size, seconds = await fetch_one(
        connection,
        "SELECT bool_and(to_regclass(t) IS NOT NULL), coalesce(sum(pg_total_relation_size(to_regclass(t))), 0)::int8,"
        " extract(epoch FROM clock_timestamp() - %s)::float8 FROM unnest(%s::text[]) AS t",
        [one.begun_at, tiers],
    )
    chunks = vectors = waiting = failed = discarded = 0
    if there:
        counts = await count_index(connection, names, number, filled=live)
        chunks, vectors, waiting, failed = counts.chunks, counts.vectors, counts.backlog, counts.failed
        discarded = counts.discarded
    recall = None
    if evaluated:
        recall = (await evaluations.latest(connection, schema, {entry.name: number})).get(entry.name)
    rate = vectors / seconds if one.state == "filling" and not live and vectors and seconds > 0 else None
    return GenerationStatus(
        generation=number,
        state="live" if live else one.state,
        embedder=one.embedder,
        model=one.model,
        dimensions=one.dimensions,
        vector_type=one.vector_type,
        distance=one.distance,
        m=one.m,
        ef_construction=one.ef_construction,
        quantise=one.quantise,
        chunks=chunks,
        vectors=vectors,
        waiting=waiting,
        failed=failed,
        bytes=size,
        recall=None if recall is None else recall.recall,
        rate=None if rate is None else round(rate, 1),
        eta_s=None if rate is None else round(max(0, chunks - vectors - failed - discarded) / rate, 1),
        discarded=discarded,
        has_embedder=one.has_embedder,
    )
