"""The relations of an index's generations: the vectors of another one, which of them searches use, and their end.

Each of these happens in the caller's transaction, together with what the registry says of it. Searches wait for
milliseconds at most, and none of them fails: see `locking`.

Source: PostgreSQL, "CREATE VIEW", "Explicit Locking".
"""

from __future__ import annotations

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config.names import beside_name
from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.chunks_view import put_chunks_view
from cdcsync.target.ddl.grants import grants_of, opens, read_alike, set_again, settings_kept, succeed
from cdcsync.target.ddl.marked import describe_again, drop_all, drop_functions, marker, tables_of
from cdcsync.target.ddl.names import Names, words_name
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.ddl.relations import create_view
from cdcsync.target.ddl.searching import put_search
from cdcsync.target.ddl.tiers import create_vectors


async def create_generations(connection: Connection, schema: str, spec: IndexSpec) -> list[int]:
    """Create the vectors tables of the generations beside the live one, where they or tiers of them are missing.

    Roles that may read the live vectors may read these. The caller's transaction commits.

    :returns: the generations of which a table was missing, and with it vectors.
    """
    names = Names(schema, spec.relations)
    created = []
    for one in spec.others:
        tables = names.all_vectors(one.generation)
        present = [await _exists(connection, relation) for relation in tables]
        await create_vectors(connection, schema, one)
        if not all(present):
            created.append(one.generation)
        for old, new in zip(names.all_vectors(spec.generation), tables, strict=True):
            await _copy_grants(connection, old, new, others_too=present[0])
    return created


async def switch_relations(connection: Connection, schema: str, spec: IndexSpec, before: int) -> None:
    """Point view and search function to the spec's generation. The caller's transaction commits.

    :param before: the generation that they use now.
    :raises SetupError: something is built on the view, whose vectors have another type now; or the vectors are not held
        to the row-level security that an operator gave those which are searched.
    """
    names = Names(schema, spec.relations)
    await connection.execute(BRIEFLY)
    for old, new in zip(names.all_vectors(before), names.all_vectors(spec.generation), strict=True):
        await _refuse_open(connection, spec, old, new)
        await _copy_grants(connection, old, new)
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
    """Drop the vectors of a generation that the spec does not have any more. The caller's transaction commits.

    :raises SetupError: something is built on them.
    """
    names = Names(schema, spec.relations)
    await connection.execute(BRIEFLY)
    # What searches are made of first: from here on none begins that could look for these vectors.
    async with settings_kept(connection, schema, spec.name):
        await put_search(connection, schema, spec)
    try:
        await connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(names.vectors(generation)))
    except psycopg.errors.DependentObjectsStillExist as error:
        raise _built_on(spec.name, error) from error
    await Rebuild(connection, schema, msgspec.structs.replace(spec, generation=generation)).forget()
    await connection.execute(
        sql.SQL("DELETE FROM {} WHERE generation = {}").format(names.backlog, sql.Literal(generation))
    )


async def open_beside(connection: Connection, schema: str, spec: IndexSpec, *, created: bool) -> None:
    """Let whoever may read the tables of an index read those that stand beside it. The caller's transaction commits.

    Where an operator's own row-level security holds on its chunks, and not on those beside, nobody may yet.

    :param created: whether the tables are new, and have the grants that default privileges say.
    """
    assert spec.beside is not None
    await _copy_all(connection, schema, spec, spec.beside, others_too=not created)


async def exchange_relations(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Have views and search function use the chunks of a spec. The caller's transaction commits.

    :param spec: the index as it is to be; those that it is searched by until now stand beside it.
    :raises SetupError: something is built on the view, whose vectors have another type now; or chunks or vectors are
        not held to the row-level security that an operator gave those which are searched.
    """
    before = spec.beside
    assert before is not None
    mine, its = Names(schema, before.relations), Names(schema, spec.relations)
    vectors = zip(mine.all_vectors(before.generation), its.all_vectors(spec.generation), strict=True)
    for old, new in [(mine.chunks, its.chunks), *vectors]:
        await _refuse_open(connection, spec, old, new)
    await connection.execute(BRIEFLY)
    await _copy_all(connection, schema, before, spec, others_too=True)
    async with settings_kept(connection, schema, spec.name):
        await _switch(connection, schema, spec)
        await put_chunks_view(connection, schema, spec)
    for one, other in ((spec, before), (before, spec)):
        await describe_again(connection, schema, one.relations, other.name, one.name)


async def drop_beside(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Drop the chunks that stand beside an index, with all that is theirs. The caller's transaction commits.

    :param spec: the index without them.
    :raises SetupError: something is built on their tables.
    """
    await connection.execute(BRIEFLY)
    # What searches are made of first, as for vectors.
    async with settings_kept(connection, schema, spec.name):
        await put_search(connection, schema, spec)
    beside = beside_name(spec.name)
    tables = await tables_of(connection, schema, [beside])
    try:
        await drop_all(connection, "TABLE", list(tables.values()))
    except psycopg.errors.DependentObjectsStillExist as error:
        raise _built_on(spec.name, error) from error
    await drop_functions(connection, schema, marker(beside))


def _built_on(index: str, error: psycopg.errors.DependentObjectsStillExist) -> SetupError:
    detail = " ".join((error.diag.message_detail or "").split())
    return SetupError("something of your own is built on its tables", where=f"index {index}", hint=f"drop it: {detail}")


async def _refuse_open(connection: Connection, spec: IndexSpec, old: sql.Identifier, new: sql.Identifier) -> None:
    """See that a table in the place of another is held to the row-level security that an operator gave that one.

    :raises SetupError: it is not.
    """
    if await opens(connection, new, old=old):
        raise SetupError(
            f"{old.as_string(connection)} has row-level security of your own, and"
            f" {new.as_string(connection)} has not: whoever may read it would see every row",
            where=f"index {spec.name}",
            hint="create the same policies there, and enable row-level security; then try again",
        )


async def _copy_all(connection: Connection, schema: str, one: IndexSpec, other: IndexSpec, *, others_too: bool) -> None:
    """Grant on the tables of an index what is granted on those of the one that stands beside it."""
    mine, its = Names(schema, one.relations), Names(schema, other.relations)
    closed = await opens(connection, its.chunks, old=mine.chunks)
    words, its_words = words_name(schema, one.relations), words_name(schema, other.relations)
    pairs = [
        (mine.chunks, its.chunks),
        (mine.backlog, its.backlog),
        *zip(mine.all_vectors(one.generation), its.all_vectors(other.generation), strict=True),
        (words, its_words),
    ]
    for old, new in pairs:
        if await _exists(connection, new):
            if not closed:
                await _copy_grants(connection, old, new, others_too=others_too)
            elif not others_too:
                await succeed(connection, new, [])
    if not closed and not await _exists(connection, words) and await _exists(connection, its_words):
        await read_alike(connection, its_words, chunks=mine.chunks, index=one.name)


async def _exists(connection: Connection, relation: sql.Identifier) -> bool:
    return bool(await fetch_value(connection, "SELECT to_regclass(%s) IS NOT NULL", [relation.as_string(connection)]))


async def _copy_grants(
    connection: Connection, old: sql.Identifier, new: sql.Identifier, *, others_too: bool = True
) -> None:
    """Grant on a table what is granted on another, unless that one has row-level security that the table lacks.

    :param others_too: whether it keeps the grants that it has besides.
    """
    grants = [] if await opens(connection, new, old=old) else await grants_of(connection, old)
    if others_too:
        await set_again(connection, [one.on(new) for one in grants])
    else:
        await succeed(connection, new, grants)
