"""Vectors on their way to the target, in pgvector's binary form.

As text, a vector of 384 dimensions costs a worker 200 µs and the server 50 µs; in binary form it is 11 and 3 µs.

Source: pgvector-python's README (psycopg 3); pgvector, src/vector.c (vector_recv).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pgvector import HalfVector, Vector
from pgvector.psycopg.halfvec import register_halfvec_info
from pgvector.psycopg.vector import register_vector_info
from psycopg import sql
from psycopg.types import TypeInfo

from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import MOST_HALF, FloatVector
from cdcsync.postgres.locking import exclusive_locks
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names, vector_schema


async def register_vectors(connection: Connection) -> None:
    """Let a connection accept the results of `wire_form` as parameters.

    The types are looked up by their qualified names: a search path, even for a moment, would let operators of others
    run as our role.
    """
    schema = await vector_schema(connection)
    for name, register in (("vector", register_vector_info), ("halfvec", register_halfvec_info)):
        if info := await TypeInfo.fetch(connection, sql.Identifier(schema, name)):
            register(connection, info)


def wire_form(spec: IndexSpec) -> Callable[[FloatVector], Vector | HalfVector]:
    """Return what makes parameters of an index's vectors."""
    return HalfVector if spec.vector_type.startswith("halfvec") else Vector


LEAST_NORM = 1e-3
"""The length from which on a vector of at most 16,000 components is not all zeros as a halfvec."""


def converted(
    alias: str, one: IndexSpec, to: IndexSpec, extension: sql.Identifier
) -> tuple[sql.Composed, sql.Composable]:
    """Return the vector of a row as one of another generation, and the condition under which it can be one.

    A model may make vectors that a halfvec cannot hold. These are made again, and judged as those of any text.

    :param alias: of the vectors table of `one`.
    :param extension: the schema of pgvector.
    """
    vector = sql.Identifier(alias, "embedding")
    if one.config.vector_type == to.config.vector_type:
        return sql.SQL("{}").format(vector), sql.SQL("true")
    return (
        sql.SQL("{}::{}.{}").format(vector, extension, sql.SQL(to.config.vector_type)),
        sql.SQL("{}.vector_norm({}) BETWEEN {} AND {}").format(
            extension, vector, sql.Literal(LEAST_NORM), sql.Literal(MOST_HALF)
        ),
    )


HELD_FOR_S = 1.0
"""Tables of another index that are held by a transaction as old as that are not waited for."""


async def within_reach(
    connection: Connection, schema: str, spec: IndexSpec, alike: Sequence[IndexSpec]
) -> Sequence[IndexSpec]:
    """Return those of an index's `alike` whose vectors can be read now.

    The index beside it may wait for its tables to be created, and nobody waits for tables of it that another session
    holds: what they spare is a call.
    """
    beside = [one for one in alike if one.name != spec.name]
    tables = [table for one in beside for table in Names(schema, one.relations).written(one.generation)]
    if not tables:
        return alike
    named = [sql.Identifier(table.schema, table.name).as_string() for table in tables]
    (there,) = await fetch_one(
        connection, "SELECT bool_and(to_regclass(name) IS NOT NULL) FROM unnest(%s::text[]) AS name", [named]
    )
    if there and not await exclusive_locks(connection, tables, open_for_s=HELD_FOR_S):
        return alike
    return [one for one in alike if one.name == spec.name]
