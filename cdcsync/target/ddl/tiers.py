"""The vectors of an index in two tiers: *fresh*, where all are compared, and *settled*, which has the HNSW index.

An insert into HNSW costs a hundred times as much as an insert into a heap. So a vector that is new or changed goes to
fresh, where every search finds it by comparing it, and moves to settled once it has rested (`flows/settle`). Both are
partitions of the table `NAME_vectors_N`, which is what everybody reads.

Fresh has an IVFFlat index of a single list. It finds nothing faster, since it compares everything in its list, but it
returns rows in the order of their distance. Without it a search through the view sorts the whole of fresh, vectors
included, because the LIMIT does not reach through the join: 11 ms of a processor for 5,000 rows of 384 dimensions,
and 2.3 ms with it. An insert into the index takes 5 µs.

The rules for writers, which keep each chunk's vector in one tier without ever waiting for each other in a circle:

1. A vector is written to fresh first; the one in settled is deleted afterwards, by a statement of its own, so that it
   sees what a move that has just committed put there.
2. A vector is deleted from fresh first, then from settled, for the same reason.
3. A transaction that writes locks both tables in that order (`LOCK TABLE … IN ROW EXCLUSIVE MODE`) before it reads or
   writes either: those who replace a table lock in that order too.
4. A move copies to settled first, which takes long, and holds the rows of fresh only while it deletes them; what has
   changed or is locked by then stays, and its copy is deleted again.

Source: PostgreSQL, "Table Partitioning", "Explicit Locking" and "Transaction Isolation" (Read Committed); pgvector's
README (IVFFlat).
"""

from __future__ import annotations

from typing import LiteralString

from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import LOCKED_OUT
from cdcsync.postgres.horizons import snapshots
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import FRESH, SETTLED, Names, opclass, vector_schema
from cdcsync.target.ddl.standing import create_index, describe_table

COLUMNS: LiteralString = """
    chunk_id bigint NOT NULL,
    content_hash bytea NOT NULL,
    embedding {vector} NOT NULL,
    tier text NOT NULL DEFAULT {tier},
    stored_at timestamptz NOT NULL DEFAULT now()
"""
"""`stored_at` says when the vector was made, not when it was moved: with the chunk and the hash it identifies it."""

COLUMN_NAMES = ("chunk_id", "content_hash", "embedding", "tier", "stored_at")
"""The names of `COLUMNS`."""

DISCARDED = sql.SQL("''::bytea")
"""The content hash of a vector that is to be made anew: no text has it, so the vector is searched, and not reused."""

OPEN_FOR_S = 10.0
"""A transaction that was begun later than that is waited for: it is likely to be a short one."""

OPTIONS: dict[str, LiteralString] = {
    # Never out of line where a page has room: an exact comparison of the whole tier should not fetch each vector.
    # Small and rewritten all the time: to vacuum it costs milliseconds, and what is dead is read by every search.
    FRESH: "toast_tuple_target = 8160, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000,"
    " autovacuum_vacuum_cost_delay = 0",
    # Dead entries of HNSW take places of what a search looks at; to remove 4,000 of 20,000 takes 0.4 s of a processor.
    SETTLED: "autovacuum_vacuum_scale_factor = 0.05",
}


LIST_MEMORY: LiteralString = "SET LOCAL maintenance_work_mem = '256MB'"
"""In the transaction that builds the list of fresh: IVFFlat fails unless it has room for a sample of the vectors, 80 MB
of the largest ones."""


async def create_vectors(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Create the vectors table of the spec's generation, without its HNSW index. The caller's transaction commits.

    :raises SetupError: it exists, for other vectors.
    """
    names = Names(schema, spec.relations)
    vectors = names.vectors(spec.generation)
    await connection.execute(
        sql.SQL("CREATE TABLE IF NOT EXISTS {} (" + COLUMNS + ") PARTITION BY LIST (tier)").format(
            vectors, vector=await vector_type(connection, spec), tier=sql.Literal(FRESH)
        )
    )
    present = await stored_type(connection, vectors)
    if present is None:
        raise SetupError(
            "the table exists and has no column of vectors, as after DROP EXTENSION vector;"
            " if it is dropped, the worker makes it again, and its vectors",
            where=vectors.as_string(connection),
            hint=f"DROP TABLE {vectors.as_string(connection)} CASCADE",
        )
    if present != spec.vector_type:
        raise SetupError(
            f"the table exists and its vectors are of type {present}, not {spec.vector_type}",
            where=vectors.as_string(connection),
            hint="it was left by another index: drop it, or give this index another name in the configuration",
        )
    for tier, table in names.tiers(spec.generation).items():
        await connection.execute(
            sql.SQL(
                "CREATE TABLE IF NOT EXISTS {} PARTITION OF {}"
                " (CONSTRAINT {} PRIMARY KEY (chunk_id), tier DEFAULT {tier})"
                " FOR VALUES IN ({tier}) WITH (" + OPTIONS[tier] + ")"
            ).format(
                table,
                vectors,
                sql.Identifier(names.key_name(spec.generation, tier)),
                tier=sql.Literal(tier),
            )
        )
        await _attach(connection, vectors, table, tier)
        definition = sql.SQL("{} (content_hash)").format(table)
        await create_index(connection, schema, names.hash_name(spec.generation, tier), definition)
    await connection.execute(LIST_MEMORY)
    definition = sql.SQL("{} USING ivfflat (embedding {}) WITH (lists = 1)").format(
        names.fresh(spec.generation), await opclass(connection, spec)
    )
    await create_index(connection, schema, names.near_name(spec.generation), definition)
    await describe_vectors(connection, schema, spec)


async def _attach(connection: Connection, vectors: sql.Identifier, table: sql.Identifier, tier: str) -> None:
    """Attach a tier that somebody has detached, and that searches have therefore not read; what we write went on."""
    pending = await fetch_row(
        connection,
        "SELECT inhdetachpending FROM pg_inherits WHERE inhrelid = to_regclass(%s) AND inhparent = to_regclass(%s)",
        [table.as_string(connection), vectors.as_string(connection)],
    )
    if pending == (False,):
        return
    if pending is not None:
        await _end_detachment(connection, vectors, table)
    await connection.execute(
        sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES IN ({})").format(vectors, table, sql.Literal(tier))
    )


async def _end_detachment(connection: Connection, vectors: sql.Identifier, table: sql.Identifier) -> None:
    """End a detachment, which waits for whoever may have seen the table attached.

    :raises SetupError: that would be for long: a transaction has been open for a while, or for a time that we may not
        know.
    """
    try:
        async with connection.transaction():
            await connection.execute(
                sql.SQL(BRIEFLY + "; ALTER TABLE {} DETACH PARTITION {} FINALIZE").format(vectors, table)
            )
    except LOCKED_OUT:
        if not (older := await snapshots(connection, open_for_s=OPEN_FOR_S)):
            raise
        raise SetupError(
            f"somebody began to detach it, and that ends only after {older[0]}",
            where=table.as_string(connection),
            hint=older[0].remedy,
        ) from None


async def describe_vectors(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Say in comments what the tables are. The caller's transaction commits."""
    names = Names(schema, spec.relations)
    tiers = names.tiers(spec.generation)
    for table, comment in (
        (
            names.vectors(spec.generation),
            f"vectors by {spec.model}, in two tiers; content_hash names the text each was made from",
        ),
        (tiers[FRESH], "vectors that are new or changed lately; searches compare each of them"),
        (tiers[SETTLED], "vectors that have rested, with the HNSW index"),
    ):
        await describe_table(connection, table, f"cdcsync index {spec.name}: {comment}")


async def vector_type(connection: Connection, spec: IndexSpec) -> sql.Composed:
    """Return the type of the spec's vectors, with the schema that it is in."""
    return sql.SQL("{}." + spec.vector_type).format(sql.Identifier(await vector_schema(connection)))


async def stored_type(connection: Connection, vectors: sql.Identifier) -> str | None:
    """Return the type of a table's vectors, without its schema; None where there is no such table."""
    row = await fetch_row(
        connection,
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = to_regclass(%s) AND attname = 'embedding'",
        [vectors.as_string(connection)],
    )
    return None if row is None else str(row[0]).rpartition(".")[2]
