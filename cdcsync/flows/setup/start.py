"""Set-up: what `run` creates once every check has passed, and where in the stream the pipeline begins or resumes.

Target first, then publication, then slot: a crash anywhere in between is picked up where it was by the next start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import msgspec
import psycopg
import structlog

from cdcsync.config import Config, QualifiedName
from cdcsync.crashpoints import crash_point
from cdcsync.documents.related import TableFacts
from cdcsync.errors import DecodingFailed, GapError, SchemaChanged, SetupError, SlotInUse, TablesChanged
from cdcsync.flows.setup.differences import (
    as_followed,
    ask_for,
    difference_of,
    note_fingerprint,
    present_fingerprint,
)
from cdcsync.flows.setup.gaps import refuse_forgotten, refuse_gap, refuse_standby, refuse_undecodable
from cdcsync.flows.setup.needs import need_of
from cdcsync.lsn import Lsn
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, first_line, speaking_of
from cdcsync.source.catalog import (
    FAILOVER_VERSION,
    Catalog,
    Slot,
    blockers,
    read_catalog,
    read_slot,
    running_transactions,
)
from cdcsync.source.families import rows_sent
from cdcsync.source.fingerprints import Difference
from cdcsync.source.publications import create_publication_statement, publish_statement
from cdcsync.source.slot import ServerIdentity, SlotConnection
from cdcsync.target import evaluations
from cdcsync.target.approvals import Approvals, change_of
from cdcsync.target.ddl.generations import create_generations, drop_relations
from cdcsync.target.ddl.grants import settings_to_note
from cdcsync.target.ddl.locking import BRIEFLY, until_locked
from cdcsync.target.ddl.missing import Missing, missing_relations
from cdcsync.target.ddl.policies import put_policy
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.ddl.upgrading import upgrade_vectors
from cdcsync.target.generations import Generations
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Entry, Registry
from cdcsync.target.requests import Requests
from cdcsync.target.session import ApplySession

log = structlog.get_logger()

WRITERS_REPORT_S = 5.0
"""How often it is said which open transactions the creation of the slot waits for."""


class StartingPoint(msgspec.Struct, frozen=True):
    """Where a connection begins to stream.

    :ivar anew: whether the pipeline begins there: what was before it says nothing about what follows.
    :ivar server: the source as it was before the connection streamed.
    """

    checkpoint: Lsn
    anew: bool
    server: ServerIdentity


async def set_up_shared(target: Connection, config: Config) -> None:
    """Create pgvector, our schema and the pipeline's row, as far as they are missing.

    A column that is added to a shared table excludes searches, which read it: see `target/ddl/locking`.
    """

    async def create() -> None:
        async with target.transaction():
            # Two workers that start together take turns here.
            await target.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdcsync set-up', 0))")
            await target.execute(BRIEFLY)
            cursor = await target.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'")
            if await cursor.fetchone() is None:
                await target.execute("CREATE EXTENSION vector SCHEMA public")
            await create_shared(target, config.target.schema)
            await Pipelines(config.target.schema, config.source.slot).ensure(target, config.source.publication)
            crash_point("shared tables written")
        crash_point("shared tables committed")

    with speaking_of("target"):
        await until_locked(create, table=f"{config.target.schema}.*")


def outdated(catalog: Catalog, specs: Sequence[IndexSpec]) -> bool:
    """Say whether a table is another one than when its index was examined, so that all has to be examined again."""
    of_all = catalog
    for spec in specs:
        catalog = as_followed(of_all, spec)
        publication, table = catalog.publication, catalog.tables.get(spec.shape.table)
        if table is None or table.oid != spec.table_oid:
            return True
        if spec.shape.many and rows_sent(publication, catalog.members.get(spec.shape.table, ())) != spec.members:
            return True
        columns = [table.columns.get(name) for name in spec.shape.own]
        if tuple(one.wire_type for one in columns if one is not None) != spec.shape.types:
            return True
        sent = publication.tables.get(table.name) if publication is not None else None
        if sent is None or sent.row_filter != spec.row_filter:
            return True
        if any(_related_outdated(spec, name, facts, catalog) for name, facts in spec.facts.items()):
            return True
    return False


def _related_outdated(spec: IndexSpec, name: QualifiedName, facts: TableFacts, catalog: Catalog) -> bool:
    """Say whether a table of an index with related tables is another one than the statements were made for."""
    table, publication = catalog.tables.get(name), catalog.publication
    if table is None or table.oid != spec.oids.get(name, table.oid):
        return True
    sent = publication.tables.get(name) if publication is not None else None
    types = {column: table.columns[column].value_type for column in facts.types if column in table.columns}
    return sent is None or sent.row_filter != facts.row_filter or types != facts.types


async def set_up_indexes(
    target: Connection,
    config: Config,
    specs: Sequence[IndexSpec],
    catalog: Catalog,
    waiting: Mapping[str, Pause] | None = None,
) -> None:
    """Create or extend each index's relations, and ask for what its state calls for.

    The relations, the index's row, its fingerprint and the request commit together.

    :param catalog: the tables as they are now, which have been read since they were published.
    :param waiting: why new indexes are not loaded yet.
    """
    for spec in specs:
        with speaking_of("target", where=f"index {spec.name}", index=spec.name):
            try:
                await upgrade_vectors(target, config.target.schema, spec)
                await drop_generations(target, config.target.schema, spec)
                async with target.transaction():
                    before = await _as_examined(target, config.target.schema, spec)
                    view = None if before is None else before.view
                    missing = await missing_relations(target, config.target.schema, spec, view=view)
                    await create_index_relations(target, config.target.schema, spec)
                    created = await create_generations(target, config.target.schema, spec)
                    await put_policy(target, config.target.schema, spec, config.serve)
                    await _register(target, config, spec, catalog, missing)
                    settings = await settings_to_note(target, config.target.schema, spec.name)
                    await Registry(config.target.schema).note_settings(target, spec.name, settings)
                    for generation in created:
                        await Generations(config.target.schema).begin_again(target, spec.name, generation)
                    if waiting and spec.name in waiting:
                        await Registry(config.target.schema).pause(target, spec.name, waiting[spec.name])
                    crash_point("index relations written")
                crash_point("index relations committed")
            except SetupError as error:
                if await Registry(config.target.schema).find(target, spec.name) is None:
                    raise
                raise SchemaChanged(error.message, index=spec.name, where=error.where, hint=error.hint) from error
            except psycopg.errors.DependentObjectsStillExist as error:
                raise SchemaChanged(
                    f"the view {spec.config.view_name} has to change, and other objects depend on it",
                    index=spec.name,
                    where=str(spec.config.view_name),
                    hint=f"drop them, then create them anew: {error.diag.message_detail}",
                ) from error


async def _as_examined(target: Connection, schema: str, spec: IndexSpec) -> Entry | None:
    """Return the index's row if it still has the generations that it was examined with, and see that it keeps them.

    :raises TablesChanged: somebody switched from one to another, or began or ended a migration.
    """
    entry = await Registry(schema).find(target, spec.name, lock=True)
    if entry is None:
        return None
    wanted = {one.generation for one in await Generations(schema).of(target, spec.name) if one.state != "dropping"}
    wanted.add(entry.generation)
    if entry.generation != spec.generation or wanted != {one.generation for one in spec.generations}:
        raise TablesChanged("the index has other generations of vectors", where=f"index {spec.name}")
    return entry


async def drop_generations(target: Connection, schema: str, spec: IndexSpec) -> None:
    """Drop the generations of an index that somebody asked to be dropped.

    Only the holder of the pipeline's lock may, and only before it writes: see `target/generations`.
    """
    generations = Generations(schema)
    kept = {one.generation for one in spec.generations}

    async def drop(generation: int) -> None:
        async with target.transaction():
            await drop_relations(target, schema, spec, generation)
            await generations.remove(target, spec.name, generation)
            await evaluations.forget(target, schema, spec.name, generation)
            crash_point("generation dropped")
        crash_point("dropped generation committed")

    for one in await generations.of(target, spec.name):
        if one.state == "dropping" and one.generation not in kept:
            table = f"{spec.name}_vectors_{one.generation}"
            await until_locked(lambda: drop(one.generation), table=table)  # noqa: B023 - awaited here
            log.info("generation_dropped", index=spec.name, generation=one.generation)


async def let_go(target: Connection, config: Config) -> None:
    """Note which indexes of this pipeline the configuration no longer has: nothing keeps them in step from now on."""
    with speaking_of("target"):
        registry = Registry(config.target.schema)
        gone = await registry.note_followed(target, config.source.slot, list(config.indexes))
        crash_point("indexes let go")
        for index in gone:
            log.warning("index_unfollowed", index=index, fix=f"put it back, or remove it: cdcsync drop {index}")


async def pause_indexes(target: Connection, config: Config, broken: Mapping[str, Pause]) -> None:
    """Note why these indexes, which exist, cannot be followed."""
    with speaking_of("target"):
        for index, pause in broken.items():
            await Registry(config.target.schema).pause(target, index, pause)
            crash_point("broken index paused")


async def _register(target: Connection, config: Config, spec: IndexSpec, catalog: Catalog, missing: Missing) -> None:
    schema = config.target.schema
    registry, requests = Registry(schema), Requests(schema)
    now = present_fingerprint(catalog, spec)
    assert now is not None
    before = await registry.find(target, spec.name)
    begun = before is not None and not await requests.still_to_begin(target, spec.name)
    await registry.register(target, config.source.slot, spec)
    for name, why in spec.left_out.items():
        if before is None or before.left_out.get(name) != why:
            log.warning("table_left_out", index=spec.name, table=name, because=why)
    await Generations(schema).register(target, spec)
    found = Difference() if before is None else difference_of(catalog, spec, before, now)
    need = need_of(spec, before, found, missing=missing, begun=begun)
    if begun and need is not None and need.embeds:
        # What others were said to embed was counted from what the index has been until now.
        await Approvals(schema).remove(target, spec.name)
    elif begun:
        await Approvals(schema).spend(target, spec.name, change_of(spec))
    if begun and missing and before is not None and before.state == "live":
        log.error("relations_missing", index=spec.name, tables=missing.tables, built=missing.built)
        await registry.load_again(target, spec.name)
    if need is None and found.emptied:
        return  # the stream may bring the TRUNCATE: the watch waits for it
    await note_fingerprint(target, schema, spec.name, now)
    if need is None:
        await ask_for(target, schema, spec.name, found)
        return
    if before is not None and not begun:
        return  # the first load is asked for, and what it reads is the table as it is now
    if need.kind == "resync":
        # Chunks as much as vectors are made of the rows.
        await requests.reload(target, spec.name, rewrite=need.rewrite)
        await registry.load_again(target, spec.name)
    else:
        if need.kind == "initial":
            await requests.add(target, spec.name, need.kind, rewrite=need.rewrite, filter_=None)
        else:
            await requests.follow_configuration(target, spec.name, rewrite=need.rewrite)
        await ask_for(target, schema, spec.name, found)
    log.info("backfill_requested", index=spec.name, kind=need.kind, rewrite=need.rewrite, because=need.because)


async def set_up_publication(source: Connection, config: Config, tables: Sequence[QualifiedName]) -> None:
    """Create the publication, or add those of the tables that it lacks.

    It must exist before the slot does: a slot looks its publication up in the catalog of the past. And it is put right
    before the tables' fingerprints are taken, which tell that it was not.

    :raises TablesChanged: one of the tables was dropped meanwhile.
    """
    name = config.source.publication
    with speaking_of("source", where=f"publication {name}"):
        catalog = await read_catalog(source, name, tables)
        publication, tables = catalog.publication, catalog.single(tables)
        try:
            if publication is None and tables:
                await source.execute(create_publication_statement(name, tables, version=source.info.server_version))
                crash_point("publication created")
                log.info("publication_created", publication=name, tables=[str(table) for table in tables])
            elif publication is not None and (missing := [one for one in tables if one not in publication.tables]):
                await source.execute(publish_statement(name, missing))
                crash_point("publication extended")
                log.info("publication_extended", publication=name, tables=[str(table) for table in missing])
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as error:
            raise TablesChanged(f"a table went: {first_line(error)}", where=f"publication {name}") from error


async def refuse_early(source: Connection, session: ApplySession, config: Config) -> None:
    """Look for a gap before anything is created: on a server that is not ours nothing may be.

    :raises GapError: there is one, and the configuration does not say to heal it.
    """
    state = await session.state()
    if config.source.on_gap == "resync":
        return
    if state.checkpoint is None:
        await refuse_forgotten(session, config.target.schema, config.source.slot, list(config.indexes))
        return
    async with await SlotConnection.connect(config.source.dsn) as slot_connection:
        await refuse_standby(slot_connection, source)
        server = await slot_connection.identify()
        with speaking_of("source", where=f"slot {config.source.slot}"):
            slot = await read_slot(source, config.source.slot)
        await refuse_gap(slot_connection, state, server, slot, config.source.slot)


async def starting_point(
    slot_connection: SlotConnection,
    source: Connection,
    session: ApplySession,
    config: Config,
    indexes: Sequence[str],
    *,
    stuck: DecodingFailed | None = None,
) -> StartingPoint:
    """Return where to stream from; creates the slot where there is none.

    After a gap, `source.on_gap = "resync"` makes a new slot and asks for a full backfill of every index.

    :param stuck: why the source cannot decode what follows the checkpoint, if it has failed there again and again.

    :raises GapError: changes between the checkpoint and what the slot can send may be missing.
    """
    name = config.source.slot
    state = await session.state()
    await refuse_standby(slot_connection, source)
    server = await slot_connection.identify()
    with speaking_of("source", where=f"slot {name}"):
        slot = await read_slot(source, name)
    try:
        if state.checkpoint is None:
            await refuse_forgotten(session, config.target.schema, name, indexes)
        else:
            await refuse_gap(slot_connection, state, server, slot, name)
        if stuck is not None:
            refuse_undecodable(stuck, state.checkpoint, name)
    except GapError as gap:
        if config.source.on_gap != "resync":
            raise
        log.error("gap", slot=name, error=str(gap), action="resync")
        begin = await _resync(slot_connection, source, session, server, slot, config, indexes)
        return StartingPoint(begin, True, server)
    if state.checkpoint is None:
        begin = await _first_position(slot_connection, source, slot, config)
        await session.begin_at(begin, server.system_identifier, server.timeline)
        return StartingPoint(begin, True, server)
    if state.timeline is not None and server.timeline > state.timeline:
        # Rows that were read again (for values that are not sent, or documents of several tables) may have been read
        # in a state that the promoted server never had.
        await session.begin_at(state.checkpoint, server.system_identifier, server.timeline, doubted=indexes)
        log.info("timeline_followed", slot=name, timeline=server.timeline)
    assert slot is not None
    await _let_standbys_have(slot_connection, slot, config)
    return StartingPoint(state.checkpoint, False, server)


async def _let_standbys_have(slot_connection: SlotConnection, slot: Slot, config: Config) -> None:
    """Make the slot a failover slot where that is wanted and the server can."""
    if config.source.failover and not slot.failover and slot_connection.version >= FAILOVER_VERSION:
        await slot_connection.set_failover(slot.name)
        crash_point("slot made a failover slot")
        log.info("slot_failover", slot=slot.name)


async def _first_position(
    slot_connection: SlotConnection, source: Connection, slot: Slot | None, config: Config
) -> Lsn:
    name = config.source.slot
    if slot is not None and slot.wal_status == "lost":
        with speaking_of("source", where=f"slot {name}"):
            await source.execute("SELECT pg_drop_replication_slot(%s)", [name])
            crash_point("lost slot dropped")
    elif slot is not None and slot.confirmed_flush is None:
        raise SlotInUse(
            "the slot is still being created by a session that was left behind",
            where=f"slot {name}",
            hint="it goes away with that session",
        )
    elif slot is not None:
        # Nothing is indexed yet, so nothing can be missing: the initial load is still to come.
        assert slot.confirmed_flush is not None
        log.info("slot_adopted", slot=name, lsn=str(slot.confirmed_flush))
        await _let_standbys_have(slot_connection, slot, config)
        return slot.confirmed_flush
    return await _create_slot(slot_connection, source, config)


async def _create_slot(slot_connection: SlotConnection, source: Connection, config: Config) -> Lsn:
    """Create the slot, and say who is in the way while that waits for open write transactions."""
    name = config.source.slot
    failover = config.source.failover and slot_connection.version >= FAILOVER_VERSION
    log.info("slot_creating", slot=name)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_report_writers, source, name)
        begin = await slot_connection.create_slot(name, failover=failover)
        crash_point("slot created")
        tasks.cancel_scope.cancel()
    log.info("slot_created", slot=name, lsn=str(begin))
    return begin


async def _report_writers(source: Connection, name: str) -> None:
    while True:
        await anyio.sleep(WRITERS_REPORT_S)
        with speaking_of("source"), anyio.CancelScope(shield=True):
            sessions = await blockers(source, await running_transactions(source))
        log.warning("slot_waits_for_transactions", slot=name, sessions=sessions)


async def _resync(
    slot_connection: SlotConnection,
    source: Connection,
    session: ApplySession,
    server: ServerIdentity,
    slot: Slot | None,
    config: Config,
    indexes: Sequence[str],
) -> Lsn:
    """Begin anew with a new slot; the index stays searchable while everything is read again.

    First the old position is forgotten and the resync asked for, in one transaction: interrupted anywhere after
    that, the next start begins as one without a position does.
    """
    name = config.source.slot
    await session.forget_position(indexes)
    log.info("resync_requested", slot=name, indexes=list(indexes))
    if slot is not None:
        with speaking_of("source", where=f"slot {name}"):
            await source.execute("SELECT pg_drop_replication_slot(%s)", [name])
            crash_point("old slot dropped")
    begin = await _create_slot(slot_connection, source, config)
    await session.begin_at(begin, server.system_identifier, server.timeline)
    return begin
