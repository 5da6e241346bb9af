"""The SQL function that searches one index: how it is created, upgraded and dropped.

`SCHEMA.INDEX_search` is the one owner of how an index is searched: applications call it, and so does `search` of this
package.

Source: PostgreSQL, "CREATE FUNCTION", "ALTER TYPE".
"""

from __future__ import annotations

import hashlib

import psycopg
from psycopg import sql

from cdcsync.logs import get_logger
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.hits import attributes, wanted_attributes
from cdcsync.target.ddl.names import function_name, hit_name, words_name
from cdcsync.target.ddl.search_function import compose
from cdcsync.target.ddl.standing import describe_table

log = get_logger()

RENAMED = "what its statements name in the target was renamed, moved or replaced"
"""Why an index is examined again whose statements, or whose search function, know a type by an earlier name."""


async def put_search(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Create an index's search function, or bring it up to date. The caller's transaction commits.

    Where objects of users depend on the function, its hits keep the columns that they had, and a warning is logged. The
    caller keeps the grants: see `settings_kept`.

    :returns: whether it is up to date; False if it is of an earlier version that other objects depend on.
    """
    function, hit = function_name(schema, spec.name), hit_name(schema, spec.name)
    present = await attributes(connection, schema, spec)
    wanted = wanted_attributes(spec)
    if present and any(wanted.get(name) != type_ for name, type_ in present.items()):
        try:
            async with connection.transaction():
                await drop_search(connection, schema, spec.name)
            present = {}
        except psycopg.errors.DependentObjectsStillExist as error:
            _tell_kept(spec, error)
    definitions = {
        name: sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(type_)) for name, type_ in wanted.items()
    }
    if not present:
        await connection.execute(
            sql.SQL("CREATE TYPE {} AS ({})").format(hit, sql.SQL(", ").join(definitions.values()))
        )
        comment = f"cdcsync index {spec.name}: a hit of {spec.name}_search"
        await connection.execute(sql.SQL("COMMENT ON TYPE {} IS {}").format(hit, sql.Literal(comment)))
    else:
        added = [name for name in wanted if name not in present]
        for name in added:
            await connection.execute(sql.SQL("ALTER TYPE {} ADD ATTRIBUTE {}").format(hit, definitions[name]))
    if await _lacks_generation(connection, schema, spec) and not await _drop_function(connection, schema, spec):
        return False
    statement, comment = await _described(connection, schema, spec)
    if comment in await _comments(connection, schema, spec):
        return True
    await connection.execute(statement)
    await connection.execute(sql.SQL("COMMENT ON FUNCTION {} IS {}").format(function, sql.Literal(comment)))
    return True


async def search_outdated(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Say whether an index's search function is there, and `put_search` would replace it.

    Its text names schemas, types and operators of the target: those of pgvector and of carried columns. If somebody
    renames or moves one of them, views follow by themselves, and the text of a function does not.
    """
    comments = await _comments(connection, schema, spec)
    if not comments or await _lacks_generation(connection, schema, spec):
        return False
    _, comment = await _described(connection, schema, spec)
    return comment not in comments


async def _described(connection: Connection, schema: str, spec: IndexSpec) -> tuple[sql.Composed, str]:
    """Return the statement that creates the function, and the comment by which one of this text is known."""
    statement = await compose(connection, schema, spec)
    digest = hashlib.sha256(statement.as_bytes(connection)).hexdigest()[:16]
    comment = f"cdcsync index {spec.name}: searches by words and by vector; docs/searching.md describes it ({digest})"
    return statement, comment


async def _comments(connection: Connection, schema: str, spec: IndexSpec) -> list[str | None]:
    """Return the comments of the functions of this name."""
    cursor = await connection.execute(
        "SELECT obj_description(p.oid, 'pg_proc') FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
        " WHERE n.nspname = %s AND p.proname = %s",
        [schema, f"{spec.name}_search"],
    )
    return [comment for (comment,) in await cursor.fetchall()]


async def _lacks_generation(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Say whether the function is one of the versions whose searches could not name a generation."""
    cursor = await connection.execute(
        "SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
        " WHERE n.nspname = %s AND p.proname = %s AND NOT p.proargnames @> '{generation}'",
        [schema, f"{spec.name}_search"],
    )
    return await cursor.fetchone() is not None


async def _drop_function(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    """Drop the function, so that it can be created with other parameters; returns whether nothing depends on it."""
    try:
        async with connection.transaction():
            await connection.execute(sql.SQL("DROP FUNCTION {}").format(function_name(schema, spec.name)))
    except psycopg.errors.DependentObjectsStillExist as error:
        _tell_kept(spec, error)
        return False
    return True


def _tell_kept(spec: IndexSpec, error: psycopg.Error) -> None:
    detail = " ".join((error.diag.message_detail or "").split())
    fix = f"drop what depends on it and start the worker again: {detail}"
    log.warning("search_function_kept", index=spec.name, fix=fix)


async def create_words(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Create the table of an index's words. The caller's transaction commits."""
    table = words_name(schema, spec.relations)
    await connection.execute(
        sql.SQL(
            'CREATE TABLE IF NOT EXISTS {} (lexeme text COLLATE "C" PRIMARY KEY, chunks bigint NOT NULL,'
            " occurrences bigint NOT NULL)"
        ).format(table)
    )
    comment = (
        f"cdcsync index {spec.name}: in how many chunks each word is, which is what searches weight words by."
        " The row of the empty word counts all chunks, and their words, a word once in each"
    )
    await describe_table(connection, table, comment)


async def drop_search(connection: Connection, schema: str, index: str) -> None:
    """Drop an index's search function and its type. The caller's transaction commits."""
    await connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}").format(function_name(schema, index)))
    await connection.execute(sql.SQL("DROP TYPE IF EXISTS {}").format(hit_name(schema, index)))
