"""Indexes that are built once their table is filled: keyword search and HNSW.

To build them at the end is several times faster than to have them grow, and blocks no writer. Searches read the whole
table meanwhile.

Source: PostgreSQL, "CREATE INDEX" (Building Indexes Concurrently); pgvector's README (Index Build Time).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TypeVar, cast

import anyio
import psycopg
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.errors import TargetUnavailable
from cdcsync.logs import get_logger
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.autovacuums import Vacuumed, end_autovacuums
from cdcsync.postgres.errors import first_line
from cdcsync.postgres.locking import BUILDING_WAITS, exclusive_locks
from cdcsync.postgres.queries import fetch_row, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.bm25 import bm25_of, bm25_option
from cdcsync.target.ddl.names import Names, opclass, signs, vector_schema

log = get_logger()

T = TypeVar("T")

FRUGAL: tuple[Mapping[str, str], ...] = (
    {},
    {"max_parallel_maintenance_workers": "0"},
    {"max_parallel_maintenance_workers": "0", "maintenance_work_mem": "64MB"},
)
"""The settings that a build tries while the server lacks memory: as configured, by one process, and with little."""

HELD_S = 10.0
"""How long a build waits for transactions that hold its table, where other indexes wait for it."""

POLL_S = 0.5
"""How often it is looked whether a build of another session is through."""


async def build_search(
    connection: Connection, schema: str, spec: IndexSpec, *, patience_s: float | None = None
) -> bool:
    """Build the index for keyword search, where the configuration asks for one; False when there is nothing to do.

    Needs a connection in autocommit.

    :param patience_s: how long transactions that hold the table are waited for, where others wait for the caller.
    :raises TargetUnavailable: they went on for longer than that.
    """
    if spec.config.search is None:
        return False
    names = Names(schema, spec.relations)
    method = sql.SQL("gin (search)")
    place = names.search_name, names.chunks_name
    return await frugally(spec, lambda less: _build(connection, schema, *place, method, spec, patience_s, less))


async def keep_bm25(connection: Connection, schema: str, spec: IndexSpec, *, patience_s: float | None = None) -> bool:
    """Build the index by which pg_textsearch ranks words, or drop it, as the extension and the configuration have it.

    Searches rank by the words' counts meanwhile. Needs a connection in autocommit.

    :param patience_s: as for `build_search`.
    :returns: whether there was something to do.
    :raises TargetUnavailable: as `build_search`.
    """
    names = Names(schema, spec.relations)
    wanted, built_with = await bm25_of(connection, spec), await bm25_option(connection, schema, spec)
    if built_with == (None if wanted is None else wanted.option):
        return False
    # One that is not valid is left to whoever builds it, if anybody does, or to our own build.
    if built_with or (built_with is not None and wanted is None):
        await _others_through(connection, sql.Identifier(schema, names.chunks_name), patience_s)
        await _see_it_is_free(connection, QualifiedName(schema, names.chunks_name), patience_s)
        await connection.execute(
            sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(schema, names.bm25_name))
        )
        crash_point("outdated BM25 index dropped")
    if wanted is not None:
        place, method = (names.bm25_name, names.chunks_name), wanted.method
        await frugally(spec, lambda less: _build(connection, schema, *place, method, spec, patience_s, less))
    return True


async def build_hnsw(connection: Connection, schema: str, spec: IndexSpec, *, patience_s: float | None = None) -> bool:
    """Build the generation's HNSW index without blocking writers; returns False when it was there already.

    Needs a connection in autocommit.

    :param patience_s: as for `build_search`.
    :raises TargetUnavailable: as `build_search`.
    """
    names = Names(schema, spec.relations)
    method = await hnsw_method(connection, spec)
    place = names.hnsw_name(spec.generation), names.settled_name(spec.generation)
    return await frugally(spec, lambda less: _build(connection, schema, *place, method, spec, patience_s, less))


async def hnsw_method(connection: Connection, spec: IndexSpec) -> sql.Composed:
    """Return what an HNSW index of the spec's vectors is made of, as CREATE INDEX has it after USING."""
    extension = sql.Identifier(await vector_schema(connection))
    if spec.config.hnsw.quantise == "binary":
        element = sql.SQL("({}) {}.bit_hamming_ops").format(signs(extension, spec, sql.SQL("embedding")), extension)
    else:
        element = sql.SQL("embedding {}").format(await opclass(connection, spec))
    return sql.SQL("hnsw ({}) WITH (m = {}, ef_construction = {})").format(
        element,
        sql.Literal(spec.config.hnsw.m),
        sql.Literal(spec.config.hnsw.ef_construction),
    )


async def hnsw_options(connection: Connection, schema: str, spec: IndexSpec) -> dict[str, int]:
    """Return the parameters that the generation's HNSW index was built by; none if it is not there."""
    name = sql.Identifier(schema, Names(schema, spec.relations).hnsw_name(spec.generation)).as_string(connection)
    cursor = await connection.execute(
        "SELECT o.option_name, o.option_value::int FROM pg_class c, pg_options_to_table(c.reloptions) AS o"
        " WHERE c.oid = to_regclass(%s) AND o.option_name IN ('m', 'ef_construction')",
        [name],
    )
    return dict(await cursor.fetchall())


async def frugally(spec: IndexSpec, build: Callable[[Mapping[str, str]], Awaitable[T]]) -> T:
    """Build an index by the settings of `FRUGAL`, the next ones each time the server lacks memory.

    Parallel workers share the graph in shared memory, of which a container has 64 MB unless told otherwise.

    :param build: is given the settings, for `build_settings`.
    :raises DiskFull, OutOfMemory: the server lacks memory, or disk space, even for the last of them.
    """
    for settings, fewer in pairwise(FRUGAL):
        try:
            return await build(settings)
        except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory) as error:
            log.warning("index_build_frugal", index=spec.name, error=first_line(error), settings=fewer)
    return await build(FRUGAL[-1])


@asynccontextmanager
async def build_settings(connection: Connection, spec: IndexSpec, frugal: Mapping[str, str]) -> AsyncIterator[None]:
    """Give a session the memory and the workers that the spec has for building an index, but for what `frugal` says.

    A build ends by waiting for older transactions: it would be in vain if the session's `lock_timeout` ended that.
    """
    settings = {"maintenance_work_mem": spec.config.hnsw.build_memory, "lock_timeout": "0"}
    if spec.config.hnsw.build_workers:
        settings["max_parallel_maintenance_workers"] = str(spec.config.hnsw.build_workers)
    settings |= frugal
    before = {one: await fetch_value(connection, "SELECT current_setting(%s)", [one]) for one in settings}
    try:
        for setting, value in settings.items():
            await connection.execute("SELECT set_config(%s, %s, false)", [setting, value])
        yield
    finally:
        if not connection.closed:
            for setting, value in before.items():
                await connection.execute("SELECT set_config(%s, %s, false)", [setting, value])


async def _build(
    connection: Connection,
    schema: str,
    name: str,
    table_name: str,
    method: sql.Composable,
    spec: IndexSpec,
    patience_s: float | None,
    frugal: Mapping[str, str],
) -> bool:
    """Build an index unless it is there. One that an interrupted build left invalid is dropped and built again.

    A server that has not noticed that its client is gone continues the build: we wait for it, and use its result.
    """
    table = sql.Identifier(schema, table_name)
    while True:
        if await _validity(connection, schema, name):
            return False  # whatever somebody else builds on that table
        await _others_through(connection, table, patience_s)
        await _see_it_is_free(connection, QualifiedName(schema, table_name), patience_s)
        valid = await _validity(connection, schema, name)
        if valid:
            return False
        if valid is not None:
            await connection.execute(
                sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(schema, name))
            )
            crash_point("invalid search index dropped")
            continue
        try:
            await _create(connection, name, table, method, spec, frugal)
            return True
        except psycopg.errors.DeadlockDetected:
            # Two builds that were begun at once wait for each other.
            log.info("index_build_again", table=table.as_string(connection))
        except psycopg.errors.DuplicateTable:
            if await _validity(connection, schema, name) is None:
                raise


async def _others_through(connection: Connection, table: sql.Identifier, patience_s: float | None) -> None:
    """Wait until no session builds an index on a table.

    :param patience_s: how many seconds at most; None for as long as it takes.
    :raises TargetUnavailable: one still does.
    """
    waited = False
    until = math.inf if patience_s is None else anyio.current_time() + patience_s
    while True:
        row = await fetch_row(
            connection,
            "SELECT pid FROM pg_stat_progress_create_index"
            " WHERE datname = current_database() AND relid = to_regclass(%s)",
            [table.as_string(connection)],
        )
        if row is None:
            return
        if not waited:
            log.info("index_build_waits", table=table.as_string(connection), pid=row[0])
            waited = True
        if anyio.current_time() >= until:
            raise TargetUnavailable(
                f"the session with pid {row[0]} builds an index on it, perhaps for a worker that was killed",
                where=table.as_string(connection),
                hint="wait until that is through: its result will be used",
                sqlstate="55P03",
            )
        await anyio.sleep(POLL_S)


async def _see_it_is_free(connection: Connection, table: QualifiedName, patience_s: float | None) -> None:
    """See that no transaction holds a table in which an index is built or dropped: that waits for it without an end.

    :param patience_s: how many seconds such transactions are waited for; None not to look for them at all.
    :raises TargetUnavailable: one of them is still open.
    """
    if patience_s is None:
        return
    await end_autovacuums(Vacuumed(connection, [(table.schema, table.name)]))
    until = anyio.current_time() + patience_s
    held = await exclusive_locks(connection, [table], modes=BUILDING_WAITS)
    while held:
        if anyio.current_time() >= until:
            raise TargetUnavailable(str(held[0]), where=str(table), hint=held[0].remedy, sqlstate="55P03")
        await anyio.sleep(POLL_S)
        then = {one.transaction for one in held}
        now = await exclusive_locks(connection, [table], modes=BUILDING_WAITS)
        held = [one for one in now if one.transaction in then]


async def _validity(connection: Connection, schema: str, name: str) -> bool | None:
    """Say whether an index is valid; None where there is none of that name."""
    row = await fetch_row(
        connection,
        "SELECT i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [schema, name],
    )
    return None if row is None else cast(bool, row[0])


async def _create(
    connection: Connection,
    name: str,
    table: sql.Identifier,
    method: sql.Composable,
    spec: IndexSpec,
    frugal: Mapping[str, str],
) -> None:
    async with build_settings(connection, spec, frugal):
        await connection.execute(
            sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} USING {}").format(sql.Identifier(name), table, method)
        )
        crash_point("search index built")
