"""The search by vector alone, as a statement of its own: what the recall of an index is measured with.

How far it looks is the search function's own figure, which `ddl/nearness` has for both.
"""

from __future__ import annotations

import msgspec
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names, pgvector_version
from cdcsync.target.ddl.nearness import DEPTH, ITERATIVE, effort, exactly_nearest, nearest, rescored, settings


class Effort(msgspec.Struct, frozen=True):
    """How far a search by vector looks.

    :ivar ef_search: the candidates of HNSW.
    :ivar depth: the vectors that the search asks for, of which the nearest count.
    """

    ef_search: int
    depth: int


async def usual_effort(connection: Connection, spec: IndexSpec, wanted: int) -> Effort:
    """Return how far the search function looks for so many chunks; the server computes it, as it does there."""
    iterative = await pgvector_version(connection) >= ITERATIVE
    statement = sql.SQL(
        "SELECT {effort}, depth FROM (SELECT k, rescored, {depth} AS depth"
        " FROM (SELECT {wanted} AS k, {rescored} AS rescored) AS w) AS d"
    ).format(
        effort=sql.SQL(effort(iterative=iterative)),
        depth=sql.SQL(DEPTH),
        wanted=sql.Literal(wanted),
        rescored=sql.Literal(rescored(spec)),
    )
    return Effort(*await fetch_one(connection, statement))


def nearest_statement(
    schema: str, extension: str, spec: IndexSpec, where: str | None, *, settled: bool = False, exact: bool = False
) -> sql.Composed:
    """Return the search by vector alone, as ids and distances: $1 the vector, $2 how many.

    :param settled: search the settled tier alone.
    :param exact: compare all vectors.
    """
    rows: sql.Composable = sql.SQL("")
    if where:
        # On a line of its own, so that nothing of ours can become part of it.
        rows = sql.SQL(" JOIN {} AS c USING (chunk_id) WHERE (\n{}\n)").format(
            Names(schema, spec.relations).chunks, sql.SQL(where)
        )
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
    """Set for this transaction how far HNSW looks, what a search sets, and how the condition's names are found."""
    iterative = await pgvector_version(connection) >= ITERATIVE
    wanted = settings(iterative=iterative) | {"hnsw.ef_search": str(ef_search)}
    await connection.execute(
        sql.SQL("; ").join(
            sql.SQL("SET LOCAL {} = {}").format(sql.SQL(name), sql.Literal(value)) for name, value in wanted.items()
        )
    )
    if filtered:
        # The condition means what it means to its author: with our empty path the operators of an extension's types
        # would not be found or, worse, others would. All our own names are qualified.
        await connection.execute("SET LOCAL search_path TO DEFAULT")
