"""The search by vector alone, as a statement of its own: what the recall of an index is measured with."""

from __future__ import annotations

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.nearness import exactly_nearest, nearest
from cdcsync.target.ddl.searching import ITERATIVE, pgvector_version


def nearest_statement(
    schema: str, extension: str, spec: IndexSpec, where: str | None, *, settled: bool = False, exact: bool = False
) -> sql.Composed:
    """Return the search by vector alone, as ids and distances: $1 the vector, $2 how many.

    :param settled: search the settled tier alone.
    :param exact: compare all vectors.
    """
    # On a line of its own, so that nothing of ours can become part of it.
    condition = sql.SQL("(\n" + where + "\n)") if where else sql.SQL("true")
    rows = sql.SQL(" JOIN {} AS c USING (chunk_id) WHERE {}").format(Names(schema, spec.name).chunks, condition)
    return (exactly_nearest if exact else nearest)(
        schema,
        sql.Identifier(extension),
        spec,
        vector=sql.SQL("$1"),
        limit=sql.SQL("$2"),
        rows=rows,
        settled=settled,
    )


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
