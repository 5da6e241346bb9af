"""Indexes whose recall is measured: their vectors, and what is stored of a measurement."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from psycopg import sql

from cdcsync.config.sections import Hnsw
from cdcsync.documents.templates import hash_text
from cdcsync.model.spec import Distance, IndexSpec
from cdcsync.postgres.queries import BY_INDEX
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.search import stored_spec
from cdcsync.target.settling import Settling
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec, register
from tests.support.servers import Database

Vectors = npt.NDArray[np.float64]


CROWD = 2_500
"""Rows that the planner does not read one by one for ten of them."""

SPARSE = 2
"""Links of a node with which a search of a crowd that looks at twelve finds a fifth of what is near: the graph is drawn
by chance, and with twice as many links some graphs let it find nine tenths."""


def crowd(count: int = CROWD) -> Vectors:
    """Return vectors among which HNSW gets lost when it looks at few: scattered, in 16 dimensions."""
    return np.random.default_rng(5).normal(size=(count, 16)).round(4)


@asynccontextmanager
async def indexed(
    database: Database,
    vectors: Vectors,
    *,
    name: str = "articles",
    hnsw: bool = True,
    state: str = "live",
    distance: Distance = "cosine",
    vector_type: str = "vector",
    m: int = 4,
    quantise: Literal["none", "binary"] = "none",
) -> AsyncIterator[tuple[LiveIndex, IndexSpec]]:
    """Make an index that holds these vectors, a document each; the second value is it as it is stored."""
    spec = make_spec(
        name=name,
        dimensions=vectors.shape[1],
        distance=distance,
        hnsw=Hnsw(m=m, ef_construction=4 * m, quantise=quantise),
        vector_type=vector_type,
    )
    async with live_index(database, spec) as index:
        await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
        await register(index.connection, spec, slot="s", state=state)
        texts = [f"text {at}" for at in range(len(vectors))]
        documents = [document(str(at), text, carried=(str(at % 10),)) for at, text in enumerate(texts)]
        made = {hash_text(text): vector.astype(np.float32) for text, vector in zip(texts, vectors, strict=True)}
        await index.apply(msgspec.structs.replace(changes(*documents), vectors=made))
        # HNSW holds what is settled: among fresh vectors, which a search compares each, nothing is missed.
        settling = Settling(index.connection, SCHEMA, spec)
        await settling.settle(await settling.rested(len(vectors), rest_s=0))
        if hnsw:
            await build_hnsw(index.connection, SCHEMA, spec)
        await index.connection.execute("ANALYZE")
        # A session that writes looks everything up by an index; those that search do not.
        await index.connection.execute(BY_INDEX.replace("= off", "= on").encode())
        yield index, await stored_spec(index.connection, SCHEMA, spec.name, spec.config)


async def counted(connection: Connection) -> tuple[int, int]:
    """Return how often the HNSW index was scanned, and how often the vectors were read one by one."""
    await connection.execute("SELECT pg_stat_force_next_flush()")
    cursor = await connection.execute(
        "SELECT i.idx_scan, t.seq_scan FROM pg_stat_user_indexes AS i JOIN pg_stat_user_tables AS t USING (relid)"
        " WHERE i.indexrelname = 'articles_vectors_1_hnsw'"
    )
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


async def stored(connection: Connection, schema: str = SCHEMA) -> Sequence[tuple[Any, ...]]:
    """Return the measurements that are stored."""
    cursor = await connection.execute(
        sql.SQL("SELECT generation, k, ef_search, usual, queries, recall FROM {} ORDER BY 1, 2, 3").format(
            sql.Identifier(schema, "evaluations")
        )
    )
    return await cursor.fetchall()
