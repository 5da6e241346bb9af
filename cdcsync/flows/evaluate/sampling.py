"""The stored vectors that a measurement of recall searches with."""

from __future__ import annotations

import random
from typing import cast

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import OPERATORS, Names

CHANGED = 4
"""One in so many queries is among the vectors that changed last."""

LAST_BLOCKS = 16
"""The end of the settled tier that is looked at for what came there last: some hundred vectors."""

DRAWN = 4
"""So many ids are drawn for each query wanted: some meet the same vector, or a gap."""


async def sample_vectors(
    connection: Connection, names: Names, extension: str, spec: IndexSpec, queries: int
) -> list[tuple[int, str]]:
    """Return ids and vectors: one in `CHANGED` of those that changed last, and others at random.

    The others are chosen through the primary key: a few pages are read, however large it is. A vector after a gap in
    the ids is a little more likely. One that is at no distance from anything (all zeros, by cosine) is in no HNSW
    index, and is not chosen.
    """
    cursor = await connection.execute(
        sql.SQL(
            "WITH ends AS (SELECT min(chunk_id) AS low, max(chunk_id) AS high FROM {vectors}),"
            " drawn AS MATERIALIZED (SELECT CASE WHEN high - low < {draws} THEN low + n - 1"
            " ELSE low + floor(random() * (high - low + 1))::bigint END AS id"
            " FROM ends, generate_series(1, {draws}) AS n WHERE low + n - 1 <= high),"
            " met AS MATERIALIZED (SELECT DISTINCT v.chunk_id FROM drawn CROSS JOIN LATERAL"
            " (SELECT chunk_id FROM {vectors} WHERE chunk_id >= id ORDER BY chunk_id LIMIT 1) AS v),"
            # What came last is in fresh, and at the end of the settled table.
            " late AS (SELECT chunk_id, stored_at FROM {fresh} UNION ALL SELECT chunk_id, stored_at FROM {settled}"
            " WHERE ctid >= ('(' || greatest(0, pg_relation_size({name}::regclass)"
            " / current_setting('block_size')::int - {blocks}) || ',1)')::tid),"
            " changed AS MATERIALIZED (SELECT chunk_id FROM late ORDER BY stored_at DESC LIMIT {queries} / {part})"
            " SELECT v.chunk_id, v.embedding::text FROM"
            " (SELECT chunk_id, false AS other FROM changed UNION SELECT chunk_id, true FROM met"
            " WHERE chunk_id NOT IN (SELECT chunk_id FROM changed)) AS chosen JOIN {vectors} AS v USING (chunk_id)"
            " WHERE v.embedding OPERATOR({extension}.{operator}) v.embedding <> 'NaN'::float8"
            " ORDER BY chosen.other, random() LIMIT {queries}"
        ).format(
            vectors=names.vectors(spec.generation),
            fresh=names.fresh(spec.generation),
            settled=names.settled(spec.generation),
            name=sql.Literal(names.settled(spec.generation).as_string(connection)),
            draws=sql.Literal(DRAWN * queries),
            queries=sql.Literal(queries),
            part=sql.Literal(CHANGED),
            blocks=sql.Literal(LAST_BLOCKS),
            extension=sql.Identifier(extension),
            operator=sql.SQL(OPERATORS[spec.distance]),
        )
    )
    sample = cast(list[tuple[int, str]], await cursor.fetchall())
    random.shuffle(sample)  # an evaluation may end before all of them were searched with
    return sample
