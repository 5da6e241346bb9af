"""Indexes that are built once their table is filled: keyword search and HNSW.

To build them at the end is several times faster than to have them grow, and blocks no writer. Searches read the whole
table meanwhile.

Source: PostgreSQL, "CREATE INDEX" (Building Indexes Concurrently); pgvector's README (Index Build Time).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.index.schema import OPCLASSES, IndexSpec, Names, vector_schema
from cdcsync.postgres import Connection


async def build_search(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Build the index for keyword search, where the configuration asks for one; False when there is nothing to do.

    Needs a connection in autocommit.
    """
    if spec.config.search is None:
        return False
    names = Names(schema, spec.name)
    return await _build(
        connection, schema, names.search_name, sql.SQL("{} USING gin (search)").format(names.chunks), spec
    )


async def build_hnsw(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Build the generation's HNSW index without blocking writers; returns False when it was there already.

    Needs a connection in autocommit.
    """
    names = Names(schema, spec.name)
    opclass = f"{spec.config.vector_type}_{OPCLASSES[spec.distance]}"
    on = sql.SQL("{} USING hnsw (embedding {}) WITH (m = {}, ef_construction = {})").format(
        names.vectors(spec.generation),
        sql.Identifier(await vector_schema(connection), opclass),
        sql.Literal(spec.config.hnsw.m),
        sql.Literal(spec.config.hnsw.ef_construction),
    )
    return await _build(connection, schema, names.hnsw_name(spec.generation), on, spec)


async def _build(connection: Connection, schema: str, name: str, on: sql.Composable, spec: IndexSpec) -> bool:
    """Build an index unless it is there. One that an interrupted build left invalid is dropped and built again."""
    cursor = await connection.execute(
        "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [schema, name],
    )
    row = await cursor.fetchone()
    if row is not None and row[0]:
        return False
    if row is not None:
        await connection.execute(sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(schema, name)))
    settings = {"maintenance_work_mem": spec.config.hnsw.build_memory}
    if spec.config.hnsw.build_workers:
        settings["max_parallel_maintenance_workers"] = str(spec.config.hnsw.build_workers)
    try:
        for setting, value in settings.items():
            await connection.execute("SELECT set_config(%s, %s, false)", [setting, value])
        await connection.execute(sql.SQL("CREATE INDEX CONCURRENTLY {} ON {}").format(sql.Identifier(name), on))
    finally:
        if not connection.closed:
            for setting in settings:
                await connection.execute(sql.SQL("RESET {}").format(sql.Identifier(setting)))
    return True
