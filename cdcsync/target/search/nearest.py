"""The search by vector alone, as a statement of its own: what the recall of an index is measured with."""

from __future__ import annotations

from typing import LiteralString

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import OPERATORS, Names
from cdcsync.target.ddl.searching import ITERATIVE, pgvector_version

_NEAREST: LiteralString = """
        SELECT v.chunk_id, v.embedding {operator} {vector} AS distance
        FROM {vectors} AS v JOIN {chunks} AS c USING (chunk_id)
        WHERE {condition} ORDER BY v.embedding {operator} {vector} LIMIT $2"""
"""The limit stays next to the ordering, which is what the HNSW index can serve."""


def nearest_statement(
    schema: str, extension: str, spec: IndexSpec, where: str | None, *, settled: bool = False
) -> sql.Composed:
    """Return the search by vector alone, as ids and distances: $1 the vector, $2 how many.

    :param settled: search the settled tier alone.
    """
    parts = _vector_parts(schema, extension, spec, "$1", where)
    if settled:
        parts["vectors"] = Names(schema, spec.name).settled(spec.generation)
    return sql.SQL(_NEAREST).format(**parts)


def _vector_parts(
    schema: str, extension: str, spec: IndexSpec, vector: LiteralString, where: str | None
) -> dict[str, sql.Composable]:
    names = Names(schema, spec.name)
    return {
        "chunks": names.chunks,
        "vectors": names.vectors(spec.generation),
        "operator": sql.SQL("OPERATOR({}." + OPERATORS[spec.distance] + ")").format(sql.Identifier(extension)),
        "vector": sql.SQL(vector + "::{}." + spec.vector_type).format(sql.Identifier(extension)),
        # On a line of its own, so that nothing of ours can become part of it.
        "condition": sql.SQL("(\n" + where + "\n)") if where else sql.SQL("true"),
    }


async def tune(connection: Connection, ef_search: int, *, filtered: bool) -> None:
    """Set for this transaction how far HNSW looks, and how the condition's names are found."""
    await connection.execute(sql.SQL("SET LOCAL hnsw.ef_search = {}").format(sql.Literal(ef_search)))
    if await pgvector_version(connection) >= ITERATIVE:
        # As every search does: scan on past rows that a condition leaves out, and past entries of rows that are gone.
        await connection.execute("SET LOCAL hnsw.iterative_scan = 'relaxed_order'")
    if filtered:
        # The condition means what it means to its author: with our empty path the operators of an extension's types
        # would not be found or, worse, others would. All our own names are qualified.
        await connection.execute("SET LOCAL search_path TO DEFAULT")
