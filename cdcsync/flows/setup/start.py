"""Set-up: what `run` creates once every check has passed, and where in the stream the pipeline begins or goes on.

Target first, then publication, then slot: a crash anywhere in between is picked up where it was by the next start.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import anyio
import msgspec
import psycopg
import structlog

from cdcsync.config import Config, QualifiedName
from cdcsync.crashpoints import crash_point
from cdcsync.errors import DecodingFailed, GapError, SchemaChanged, SlotInUse
from cdcsync.flows.setup.gaps import refuse_forgotten, refuse_gap, refuse_standby, refuse_undecodable
from cdcsync.lsn import Lsn
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, speaking_of
from cdcsync.source.catalog import (
    FAILOVER_VERSION,
    Catalog,
    Slot,
    blockers,
    read_catalog,
    read_slot,
    running_transactions,
)
from cdcsync.source.publications import create_publication_statement, publish_statement
from cdcsync.source.slot import ServerIdentity, SlotConnection
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.ddl.upgrading import upgrade_vectors
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Entry, Registry
from cdcsync.target.requests import Kind, Requests
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
    """Create pgvector, our schema and the pipeline's row, as far as they are missing."""
    with speaking_of("target"):
        async with target.transaction():
            # Two workers that start together take turns here.
            await target.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdcsync set-up', 0))")
            cursor = await target.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'")
            if await cursor.fetchone() is None:
                await target.execute("CREATE EXTENSION vector SCHEMA public")
            await create_shared(target, config.target.schema)
            await Pipelines(config.target.schema, config.source.slot).ensure(target, config.source.publication)
            crash_point("shared tables written")
        crash_point("shared tables committed")


async def unpublished_tables(
    source: Connection, config: Config, specs: Sequence[IndexSpec]
) -> dict[QualifiedName, str]:
    """Return the tables whose changes are not sent, or that are not the ones they were when we began, and why."""
    name = config.source.publication
    with speaking_of("source", where=f"publication {name}"):
        catalog = await read_catalog(source, name, [spec.shape.table for spec in specs])
        publication = catalog.publication
        cursor = await source.execute(
            "SELECT c.oid::int8, n.nspname, c.relname,"
            " c.relkind <> 'p' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid)"
            " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY(%s::int8[]::oid[])",
            [[spec.table_oid for spec in specs]],
        )
        found = await cursor.fetchall()
    called = {oid: QualifiedName(schema, table) for oid, schema, table, _ in found}
    parents = {oid for oid, _, _, has_children in found if has_children}
    sent = publication.tables if publication is not None else {}
    reasons = {}
    for spec in specs:
        table = spec.shape.table
        if spec.table_oid not in called:
            reasons[table] = "the table was dropped"
        elif called[spec.table_oid] != table:
            reasons[table] = f"the table is called {called[spec.table_oid]} now"
        elif spec.table_oid in parents:
            reasons[table] = "other tables inherit from the table now"
        elif publication is None or table not in sent:
            reasons[table] = f"the publication {name} does not send the table any more"
        elif missing := {"insert", "update", "delete", "truncate"} - publication.operations:
            reasons[table] = f"the publication {name} does not send {', '.join(sorted(missing))} any more"
        elif sent[table].row_filter != spec.row_filter or spec.membership not in (None, membership(catalog, table)):
            reasons[table] = f"the publication {name} sends other rows of the table than before"
    return reasons


def membership(catalog: Catalog, table: QualifiedName) -> int | None:
    """Return the OID of the row of pg_publication_rel that has a table sent, if one does."""
    rows = catalog.publication.brought_by.get(table, ()) if catalog.publication is not None else ()
    return next((int(row.split()[1]) for row in rows if row.startswith("row ")), None)


async def set_up_indexes(
    target: Connection, config: Config, specs: Sequence[IndexSpec], unpublished: Collection[QualifiedName]
) -> None:
    """Create or extend each index's relations, and ask for the backfill that its state calls for.

    The relations, the index's row and the request commit together. An index that may have missed changes, because it
    was paused, its table made anew or not published for a while, is read again whole and rid of orphans.

    :param unpublished: tables whose changes have not been sent until now.
    """
    for spec in specs:
        with speaking_of("target", where=f"index {spec.name}"):
            try:
                await upgrade_vectors(target, config.target.schema, spec)
                async with target.transaction():
                    await create_index_relations(target, config.target.schema, spec)
                    await _register(target, config, spec, unpublished)
                    crash_point("index relations written")
                crash_point("index relations committed")
            except psycopg.errors.DependentObjectsStillExist as error:
                raise SchemaChanged(
                    f"the view {spec.config.view_name} has to change, and other objects depend on it",
                    index=spec.name,
                    where=str(spec.config.view_name),
                    hint=f"drop them, start the worker again, then create them anew: {error.diag.message_detail}",
                ) from error


async def let_go(target: Connection, config: Config) -> None:
    """Note which indexes of this pipeline the configuration no longer has: nothing keeps them in step from now on."""
    with speaking_of("target"):
        for index in await Registry(config.target.schema).note_followed(
            target, config.source.slot, list(config.indexes)
        ):
            log.warning("index_unfollowed", index=index, fix=f"put it back, or remove it: cdcsync drop {index}")


async def pause_indexes(target: Connection, config: Config, broken: Mapping[str, Pause]) -> None:
    """Note why these indexes, which exist, cannot be followed."""
    with speaking_of("target"):
        for index, pause in broken.items():
            await Registry(config.target.schema).pause(target, index, pause)
            crash_point("broken index paused")


async def _register(
    target: Connection, config: Config, spec: IndexSpec, unpublished: Collection[QualifiedName]
) -> None:
    registry = Registry(config.target.schema)
    before = await registry.find(target, spec.name)
    await registry.register(target, config.source.slot, spec)
    request = _needed_backfill(spec, before, spec.shape.table in unpublished)
    if request is not None:
        kind, rewrite = request
        requests = Requests(config.target.schema)
        if kind == "resync":
            await requests.reload(target, spec.name, rewrite=rewrite)
        else:
            await requests.add(target, spec.name, kind, rewrite=rewrite, filter_=None)
        log.info("backfill_requested", index=spec.name, kind=kind, rewrite=rewrite)


def _needed_backfill(spec: IndexSpec, before: Entry | None, unpublished: bool) -> tuple[Kind, bool] | None:
    """Return the kind of backfill that brings an index to its spec, and whether all is to be chunked again."""
    if before is None:
        return "initial", False
    rewrite = before.fingerprint != spec.fingerprint
    put_back = None not in (before.membership, spec.membership) and before.membership != spec.membership
    unfollowed = before.unfollowed_at is not None
    if before.state == "paused" or unfollowed or unpublished or put_back or before.table_oid != spec.table_oid:
        return "resync", rewrite
    if before.sent is not None and _sent_otherwise(json.loads(before.sent), json.loads(spec.sent)):
        # While nobody looked: what an ALTER TABLE or a new row filter makes of old rows is not in the stream.
        return "resync", rewrite
    if rewrite or set(spec.shape.carried) - set(before.columns):
        return "replay", rewrite
    return None


def _sent_otherwise(before: dict[str, Any], now: dict[str, Any]) -> bool:
    types = before["types"]
    changed = any(types.get(column, type_) != type_ for column, type_ in now["types"].items())
    return changed or before["row_filter"] != now["row_filter"]


async def set_up_publication(source: Connection, config: Config, unpublished: Collection[QualifiedName]) -> None:
    """Create the publication, or add the tables it lacks.

    It must exist before the slot does: a slot looks its publication up in the catalog of the past.
    """
    name = config.source.publication
    tables = sorted(unpublished)
    if not tables:
        return
    with speaking_of("source", where=f"publication {name}"):
        publication = (await read_catalog(source, name, tables)).publication
        if publication is None:
            await source.execute(create_publication_statement(name, tables, version=source.info.server_version))
            crash_point("publication created")
            log.info("publication_created", publication=name, tables=[str(table) for table in tables])
        elif missing := [table for table in tables if table not in publication.tables]:
            await source.execute(publish_statement(name, missing))
            crash_point("publication extended")
            log.info("publication_extended", publication=name, tables=[str(table) for table in missing])


async def note_memberships(
    source: Connection, target: Connection, config: Config, specs: Sequence[IndexSpec]
) -> list[IndexSpec]:
    """Store by which membership the publication has each table now, so that leaving it and coming back is noticed."""
    with speaking_of("source", where=f"publication {config.source.publication}"):
        catalog = await read_catalog(source, config.source.publication, [spec.shape.table for spec in specs])
    noted = []
    for spec in specs:
        known = spec.membership if spec.membership is not None else membership(catalog, spec.shape.table)
        # One that is another since the table was examined stays unknown here: the watch sees that it left meanwhile.
        with speaking_of("target", where=f"index {spec.name}"):
            await Registry(config.target.schema).note_membership(target, spec.name, known)
            crash_point("membership noted")
        noted.append(msgspec.structs.replace(spec, membership=known))
    return noted


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
        await session.begin_at(state.checkpoint, server.system_identifier, server.timeline)
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
