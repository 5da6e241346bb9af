"""The internal consistency of an index, independent of the source: each part is read under one snapshot of the target.

Every committed state of the index holds to these: a chunk's hash is that of its text; the chunks of a document are
numbered without a gap, are as many as each of them says, and agree on what the document is; each chunk has a vector of
its text in every generation, or is in the backlog; each vector belongs to a chunk, is of the model's dimensions and
finite; each row of the backlog belongs to a chunk. Such a chunk waits for its vector, or its text has failed, which is
listed, or it failed and was discarded, which is as its operator wants it.

Source: pgvector's README (vector_norm, l2_norm, vector_dims).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, LiteralString, cast

import msgspec
from psycopg import sql

from cdcsync.documents.templates import sql_hash
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.comparisons import comparisons
from cdcsync.postgres.queries import fetch_one, fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import DISCARDED_ATTEMPTS, MAX_ATTEMPTS, Names, vector_schema
from cdcsync.target.generations import Generations
from cdcsync.target.snapshots import hold_snapshot

Fault = Literal[
    "damaged", "failed", "vector_missing", "vector_stale", "vector_dimensions", "vector_not_finite", "vector_twice"
]

MOST = 100_000
"""Keys listed for each fault: with more, read the index again instead of repairing it by key. Held in memory."""


class Soundness(msgspec.Struct, frozen=True):
    """Keys by what is wrong with their chunks or vectors; what waits for its vector; what belongs to no chunk.

    :ivar vectors_orphaned: vectors of no chunk, and rows of the backlog of no chunk, which would wait for ever.
    :ivar last: the number of the last chunk that was looked at, None when there are no more.
    """

    faults: dict[Fault, list[Key]]
    waiting: int
    vectors_orphaned: int
    last: int | None = None
    chunks: int = 0


async def examine_chunks(connection: Connection, schema: str, spec: IndexSpec, after: int, limit: int) -> Soundness:
    """Look at up to `limit` chunks with numbers above `after`, and at their vectors.

    Of the generations beside the live one, those that are ready are looked at: one that is being filled lacks vectors,
    and proves at its end that it has all.
    """
    names = Names(schema, spec.relations)
    equal = await comparisons(connection, spec.key_types)
    parts: dict[str, sql.Composable] = {
        "chunks": names.chunks,
        "keys": sql.SQL(", ").join(sql.Identifier("c", name) for name in spec.shape.key),
        "same_key": sql.SQL(" AND ").join(
            sql.SQL("{} {} {}").format(sql.Identifier("c", name), one.equal, sql.Identifier("p", name))
            for name, one in zip(spec.shape.key, equal, strict=True)
        ),
        "carried": sql.SQL(", ").join(sql.Identifier("c", name) for name in spec.shape.carried),
        "carried_before": sql.SQL(", ").join(sql.Identifier("p", name) for name in spec.shape.carried),
        "limit": sql.Literal(MOST),
        "after": sql.Literal(after),
        "hash": sql.SQL(sql_hash("c.content")),
    }
    extension = await vector_schema(connection)
    faults: dict[Fault, list[Key]] = {}
    waiting = orphaned = 0
    # The lock comes before the snapshot, and by the time of the snapshot one of these may be filled again.
    locked = await _whole(connection, schema, spec)
    async with connection.transaction():
        await hold_snapshot(connection, names.backlog, names.chunks, *(names.vectors(one.generation) for one in locked))
        count, last = await fetch_one(
            connection,
            sql.SQL(
                "SELECT count(*), max(n.chunk_id) FROM (SELECT c.chunk_id FROM {chunks} AS c WHERE c.chunk_id > {after}"
                " ORDER BY c.chunk_id LIMIT {page}) AS n"
            ).format(**parts, page=sql.Literal(limit)),
        )
        last = last if count == limit else None
        # With no chunks left, everything above counts: vectors of chunks that are gone, too.
        between = "{0}.chunk_id > {after}" + ("" if last is None else " AND {0}.chunk_id <= {last}")
        parts["last"] = sql.Literal(last)
        parts["between"] = sql.SQL(between.replace("{0}", "c")).format(**parts)
        parts["vectors_between"] = sql.SQL(between.replace("{0}", "v")).format(**parts)

        width = len(spec.shape.key)

        async def look(wrong: Sequence[Fault], statement: LiteralString, values: Mapping[str, sql.Composable]) -> None:
            found = await fetch_texts(connection, sql.SQL(statement + " LIMIT {limit}").format(**values))
            for place, fault in enumerate(wrong, start=width):
                keys = [cast(Key, tuple(row[:width])) for row in found if len(row) == width or row[place] == "t"]
                if keys:
                    faults[fault] = list(dict.fromkeys([*faults.get(fault, ()), *keys]))

        await look(["damaged"], DAMAGED, parts)
        for one in await _whole(connection, schema, spec):
            if one not in locked:
                continue
            of = parts | _parts_of(names, extension, one)
            of |= {
                "faults": sql.SQL(", ").join(sql.SQL(fault).format(**of) for fault in VECTOR_FAULTS.values()),
                "any_fault": sql.SQL(" OR ").join(sql.SQL(fault).format(**of) for fault in VECTOR_FAULTS.values()),
            }
            await look(list(VECTOR_FAULTS), VECTORS, of)
            await look(["vector_twice"], TWICE, of)
            waits, lost = await fetch_one(connection, sql.SQL(COUNTED).format(**of))
            waiting, orphaned = waiting + cast(int, waits), orphaned + cast(int, lost)
    return Soundness(faults, waiting, orphaned, last, cast(int, count))


async def _whole(connection: Connection, schema: str, spec: IndexSpec) -> list[IndexSpec]:
    """Return the live generation, and those beside it that are ready."""
    ready = {one.generation for one in await Generations(schema).of(connection, spec.name) if one.state == "ready"}
    return [one for one in spec.generations if one is spec or one.generation in ready]


def _parts_of(names: Names, extension: str, one: IndexSpec) -> dict[str, sql.Composable]:
    """Return what the statements about the vectors of a generation need."""
    norm = "l2_norm" if one.config.vector_type == "halfvec" else "vector_norm"
    return {
        "backlog": names.backlog,
        "generation": sql.Literal(one.generation),
        "vectors": names.vectors(one.generation),
        **names.tiers(one.generation),
        "tried": sql.Literal(MAX_ATTEMPTS),
        "discarded": sql.Literal(DISCARDED_ATTEMPTS),
        "dimensions": sql.SQL("{}.vector_dims(v.embedding)").format(sql.Identifier(extension)),
        "norm": sql.SQL("{}." + norm).format(sql.Identifier(extension)),
        "right": sql.Literal(one.dimensions),
    }


DAMAGED: LiteralString = (
    "SELECT {keys} FROM {chunks} AS c WHERE {between} AND (c.content_hash <> {hash}"
    " OR c.chunk_no > 0 AND NOT EXISTS"
    " (SELECT FROM {chunks} AS p WHERE {same_key} AND p.chunk_no = c.chunk_no - 1"
    " AND p.document_hash = c.document_hash AND p.chunk_total IS NOT DISTINCT FROM c.chunk_total"
    " AND ROW({carried_before})::text = ROW({carried})::text)"
    " OR c.chunk_no >= c.chunk_total OR c.chunk_no = 0 AND c.chunk_total > 1 AND NOT EXISTS"
    " (SELECT FROM {chunks} AS p WHERE {same_key} AND p.chunk_no = c.chunk_total - 1))"
)

VECTOR_FAULTS: dict[Fault, LiteralString] = {
    "failed": "b.attempts >= {tried} AND b.attempts < {discarded}",
    "vector_missing": "b.chunk_id IS NULL AND v.chunk_id IS NULL",
    "vector_stale": "b.chunk_id IS NULL AND v.content_hash <> c.content_hash",
    "vector_dimensions": "{dimensions} <> {right}",
    "vector_not_finite": "NOT {norm}(v.embedding) < 'Infinity'::float8",
}
"""When a vector `v` of a chunk `c` is wrong, and its place in the backlog is `b`; NULL where it is not there."""

VECTORS: LiteralString = (
    "SELECT {keys}, {faults} FROM {chunks} AS c"
    " LEFT JOIN (SELECT * FROM {vectors} AS v WHERE {vectors_between}) AS v USING (chunk_id)"
    " LEFT JOIN {backlog} AS b ON b.chunk_id = c.chunk_id AND b.generation = {generation}"
    " WHERE {between} AND ({any_fault})"
)
"""The chunks of which that holds, with whether each does."""

TWICE: LiteralString = (
    "SELECT {keys} FROM {fresh} AS v JOIN {settled} USING (chunk_id) JOIN {chunks} AS c USING (chunk_id)"
    " WHERE {between}"
)

COUNTED: LiteralString = (
    "SELECT (SELECT count(*) FROM {chunks} AS c JOIN {backlog} AS b USING (chunk_id)"
    " WHERE {between} AND b.generation = {generation} AND b.attempts < {tried}),"
    " (SELECT count(*) FROM (SELECT chunk_id FROM {vectors} UNION ALL"
    " SELECT chunk_id FROM {backlog} WHERE generation = {generation}) AS v WHERE {vectors_between}"
    " AND NOT EXISTS (SELECT FROM {chunks} AS c WHERE c.chunk_id = v.chunk_id))"
)
"""How many chunks wait for their vector, and how many vectors, or places in the backlog, belong to no chunk."""
