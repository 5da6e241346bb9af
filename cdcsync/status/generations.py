"""The generations of an index's vectors, side by side: what makes each, how far it is, and how good."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.status.counting import count_index
from cdcsync.target import evaluations
from cdcsync.target.ddl.names import Names
from cdcsync.target.generations import Generation
from cdcsync.target.registry import Entry


class GenerationStatus(msgspec.Struct, frozen=True):
    """One generation of an index.

    `state` is `live`, or else `filling`, `ready` or `dropping`. Of `chunks`, `vectors` have a vector, `waiting` wait
    for one, and `failed` cannot have one. `rate` is in chunks a second over the whole fill, `eta_s` in seconds; both
    are None unless it is being filled. `bytes` is the disk space of its tables and indexes. `reason` says why it could
    not be filled when that was last tried.
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


async def read_generations(
    connection: Connection, schema: str, entry: Entry, generations: Sequence[Generation], *, evaluated: bool = True
) -> list[GenerationStatus]:
    """Return the state of these generations of an index, in their order.

    :param evaluated: whether this role may read what was measured of them.
    """
    return [await _read(connection, schema, entry, one, evaluated=evaluated) for one in generations]


async def _read(
    connection: Connection, schema: str, entry: Entry, one: Generation, *, evaluated: bool
) -> GenerationStatus:
    names, number = Names(schema, entry.name), one.generation
    tiers = [table.as_string(connection) for table in names.tiers(number).values()]
    there, size, seconds = await fetch_one(
        connection,
        "SELECT bool_and(to_regclass(t) IS NOT NULL), coalesce(sum(pg_total_relation_size(to_regclass(t))), 0)::int8,"
        " extract(epoch FROM clock_timestamp() - %s)::float8 FROM unnest(%s::text[]) AS t",
        [one.begun_at, tiers],
    )
    chunks = vectors = waiting = failed = 0
    if there:
        counts = await count_index(connection, names, number)
        chunks, vectors, waiting, failed = counts.chunks, counts.vectors, counts.backlog, counts.failed
    recall = None
    if evaluated:
        recall = (await evaluations.latest(connection, schema, {entry.name: number})).get(entry.name)
    live = number == entry.generation
    rate = vectors / seconds if one.state == "filling" and not live and vectors and seconds else None
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
        eta_s=None if rate is None else round(max(0, chunks - vectors - failed) / rate, 1),
        reason=one.reason,
    )
