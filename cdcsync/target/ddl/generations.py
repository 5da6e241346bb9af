"""The relations of an index's generations: the vectors of another one, which of them searches use, and their end.

Each of these happens in the caller's transaction, together with what the registry says of it. Searches wait for
milliseconds at most, and none of them fails: see `locking`.

Source: PostgreSQL, "CREATE VIEW", "Explicit Locking".
"""

from __future__ import annotations

import msgspec
import psycopg
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.grants import grants_of, set_again, settings_kept, succeed
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.ddl.relations import create_view
from cdcsync.target.ddl.searching import put_search
from cdcsync.target.ddl.tiers import create_vectors


async def create_generations(connection: Connection, schema: str, spec: IndexSpec) -> list[int]:
    """Create the vectors tables of the generations beside the live one, where they are missing.

    Roles that may read the live vectors may read these. The caller's transaction commits.

    :returns: the generations whose tables were missing.
    """
    names = Names(schema, spec.name)
    created = []
    for one in spec.others:
        table = names.vectors(one.generation).as_string(connection)
        missing = await fetch_value(connection, "SELECT to_regclass(%s) IS NULL", [table])
        await create_vectors(connection, schema, one)
        if missing:
            created.append(one.generation)
        await _copy_grants(
            connection, names.vectors(spec.generation), names.vectors(one.generation), others_too=not missing
        )
    return created


async def switch_relations(connection: Connection, schema: str, spec: IndexSpec, before: int) -> None:
    """Point view and search function to the spec's generation. The caller's transaction commits.

    :param before: the generation that they use now.
    :raises SetupError: something is built on the view, whose vectors have another type now.
    """
    names = Names(schema, spec.name)
    await connection.execute(BRIEFLY)
    await _copy_grants(connection, names.vectors(before), names.vectors(spec.generation))
    async with settings_kept(connection, schema, spec.name):
        await _switch(connection, schema, spec)


async def _switch(connection: Connection, schema: str, spec: IndexSpec) -> None:
    view = spec.config.view_name
    try:
        await create_view(connection, schema, spec)
    except psycopg.errors.DependentObjectsStillExist as error:
        detail = " ".join((error.diag.message_detail or "").split())
        raise SetupError(
            f"the vectors of {view} become {spec.vector_type}, and other objects are built on it",
            where=str(view),
            hint=f"drop them, and create them again after the switch: {detail}",
        ) from error
    if not await put_search(connection, schema, spec):
        raise SetupError(
            f"the search function {spec.name}_search is of an earlier version, which knows one generation alone",
            where=f"index {spec.name}",
            hint="drop what depends on it (the worker's log names it as search_function_kept), and start the worker",
        )


async def drop_relations(connection: Connection, schema: str, spec: IndexSpec, generation: int) -> None:
    """Drop the vectors of a generation that the spec does not have any more. The caller's transaction commits."""
    names = Names(schema, spec.name)
    await connection.execute(BRIEFLY)
    # What searches are made of first: from here on none begins that could look for these vectors.
    async with settings_kept(connection, schema, spec.name):
        await put_search(connection, schema, spec)
    await connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(names.vectors(generation)))
    await Rebuild(connection, schema, msgspec.structs.replace(spec, generation=generation)).forget()
    await connection.execute(
        sql.SQL("DELETE FROM {} WHERE generation = {}").format(names.backlog, sql.Literal(generation))
    )


async def _copy_grants(
    connection: Connection, old: sql.Identifier, new: sql.Identifier, *, others_too: bool = True
) -> None:
    """Grant on a table what is granted on another.

    :param others_too: whether it keeps the grants that it has besides.
    """
    grants = await grants_of(connection, old)
    if others_too:
        await set_again(connection, [one.on(new) for one in grants])
    else:
        await succeed(connection, new, grants)
