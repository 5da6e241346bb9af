"""Set-up of a pipeline: shared tables, publication and slot, and where in the stream it begins or resumes.

Target first (`indexes` comes between), then publication, then slot: the next start resumes after a crash at any point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import anyio
import msgspec
import structlog
from psycopg import sql

from cdcsync.config import Config, QualifiedName
from cdcsync.errors import DecodingFailed, GapError, IndexFault, SetupError, SlotInUse
from cdcsync.flows.blocked import Blocked, Note
from cdcsync.flows.setup.gaps import (
    heals,
    refuse_forgotten,
    refuse_gap,
    refuse_gaps,
    refuse_misfit,
    refuse_undecodable,
)
from cdcsync.flows.setup.proof import fell_back, has_last_applied
from cdcsync.lsn import Lsn
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import LOCKED_OUT, speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.locking import BRIEFLY, publishing_locks, until_locked
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.identity import refuse_another_server
from cdcsync.preflight.target import SHARED
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import FAILOVER_VERSION, Slot, read_catalog, read_slot
from cdcsync.source.definitions import definitions_changed_since
from cdcsync.source.publications import create_publication_statement, mark_statement, publish_statement
from cdcsync.source.slot import ServerIdentity, SlotConnection
from cdcsync.source.transactions import next_transaction, running_transactions
from cdcsync.target.ddl.shared import NUMBERED, create_shared
from cdcsync.target.ddl.standing import continue_numbers
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.session import ApplySession

log = structlog.get_logger()

CREATIONS = 3
"""How often a start creates the slot at most if tables are created or altered meanwhile: an application that does so
all the time still gets one."""

PUBLISH_ATTEMPTS = 6
"""How often a table is to be added to the publication while somebody holds it: for some four seconds, in which nothing
else is followed. Then its index waits, and the others do not."""


class StartingPoint(msgspec.Struct, frozen=True):
    """Where a connection begins to stream.

    :ivar anew: whether what was delivered before may say nothing about what follows: the pipeline begins there, or the
        server may have another history than it had.
    :ivar server: the source as it was before the connection streamed.
    """

    checkpoint: Lsn
    anew: bool
    server: ServerIdentity


async def set_up_shared(target: Connection, config: Config) -> None:
    """Create pgvector, our schema and the pipeline's row, as far as they are missing.

    A column that is added to a shared table excludes searches, which read it: see `postgres/locking`.
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
            await _refuse_policies(target, config.target.schema)
            for table in NUMBERED:
                await continue_numbers(target, sql.Identifier(config.target.schema, table), "id")
            await Pipelines(config.target.schema, config.source.slot).ensure(target, config.source.publication)
            crash_point("shared tables written")
        crash_point("shared tables committed")

    with speaking_of("target"):
        await until_locked(create, table=f"{config.target.schema}.*")


async def _refuse_policies(target: Connection, schema: str) -> None:
    """Fail if policies hide rows of the shared tables from the worker.

    :raises SetupError: they do, or would if they were others: which rows they hide nobody can tell.
    """
    cursor = await target.execute(
        "SELECT format('ALTER TABLE %%I.%%I NO FORCE ROW LEVEL SECURITY', %s::text, relname) FROM pg_class"
        " WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s) AND relkind IN ('r', 'p')"
        " AND relname = ANY(%s) AND row_security_active(oid) ORDER BY relname",
        [schema, schema, list(SHARED)],
    )
    if changes := [change for (change,) in await cursor.fetchall()]:
        raise SetupError(
            "tables that all indexes share have policies that hide rows from the worker",
            where=schema,
            hint="; ".join(changes),
        )


async def set_up_publication(
    source: Connection,
    config: Config,
    tables: Collection[QualifiedName],
    *,
    index_of: Mapping[QualifiedName, str] = MappingProxyType({}),
) -> None:
    """Create the publication, or add those of the tables that it lacks.

    It must exist before the slot does, be it without a table: a slot looks its publication up in the catalog of the
    past. And it is put right before the tables' fingerprints are taken, which tell that it was not.

    :param tables: none if somebody holds all of them.
    :param index_of: an index that needs each table.
    :raises SetupError: the source refuses that: somebody dropped a table, or edited the publication, meanwhile.
    :raises IndexFault: somebody holds a table of an index, so that it cannot be added.
    """
    name = config.source.publication
    with speaking_of("source", where=f"publication {name}"):
        catalog = await read_catalog(source, name, tables)
        publication, tables = catalog.publication, catalog.single(tables)
        missing = [one for one in tables if publication is None or one not in publication.tables]
        if publication is not None and not missing:
            return

        async def publish() -> None:
            if publication is None:
                create = create_publication_statement(name, missing, version=source.info.server_version)
                await source.execute(sql.SQL("; ").join([create, mark_statement(name)]))  # one transaction
                crash_point("publication created")
                log.info("publication_created", publication=name, tables=[str(table) for table in missing])
            else:
                await source.execute(publish_statement(name, missing))
                crash_point("publication extended")
                log.info("publication_extended", publication=name, tables=[str(table) for table in missing])

        # VACUUM, CREATE INDEX CONCURRENTLY and the like are in the way for as long as they take.
        try:
            await until_locked(
                publish,
                table=", ".join(map(str, missing)),
                attempts=PUBLISH_ATTEMPTS,
                vacuumed=Vacuumed(source, [(one.schema, one.name) for one in missing]),
            )
        except LOCKED_OUT as error:
            locks = await publishing_locks(source, name, missing)
            held = next((lock.of for lock in locks if lock.of is not None), missing[0])
            raise IndexFault(
                f"a table cannot be added to the publication {name}" + "".join(f": {lock}" for lock in locks[:1]),
                index=index_of[held],
                where=f"publication {name}",
                hint=locks[0].remedy if locks else "wait for the session that holds the lock: pg_locks names it",
            ) from error


async def refuse_early(source: Connection, session: ApplySession, config: Config) -> None:
    """Look for a gap before anything is created: on a server that is not ours nothing may be.

    :raises GapError: there is one, and nobody says to heal it.
    :raises SetupError: the slot is of another kind or database.
    """
    state = await session.state()
    with speaking_of("source", where=f"slot {config.source.slot}"):
        slot = await read_slot(source, config.source.slot)
    try:
        await refuse_gaps(source, session.connection, state, slot, config)
    except GapError as gap:
        if not heals(gap, config):
            raise


async def starting_point(
    slot_connection: SlotConnection,
    source: WatchedConnection,
    session: ApplySession,
    config: Config,
    indexes: Sequence[str],
    *,
    stuck: DecodingFailed | None,
    note: Note,
) -> StartingPoint | None:
    """Return where to stream from; creates the slot where there is none.

    After a gap, `source.on_gap = "resync"`, or the approval of another server, makes a new slot and asks for a full
    backfill of every index.

    :param stuck: why the source cannot decode what follows the checkpoint, if it has failed there again and again.
    :param note: told whose transactions the creation of a slot waits for, and how far a slot is that sends again what
        was applied.
    :returns: None if the connection was used up to see whether the source went back: the answer is stored, and another
        connection needs not ask.
    :raises GapError: changes between the checkpoint and what the slot can send may be missing.
    :raises SetupError: the slot is of another kind or database, and so not ours to drop.
    """
    name = config.source.slot
    state = await session.state()
    server = await slot_connection.identify()
    with speaking_of("source", where=f"slot {name}"):
        slot = await read_slot(source, name)
    assert source.backend is not None
    started = source.backend.started_at
    refuse_misfit(slot, state.checkpoint)
    try:
        refuse_another_server(slot_connection.address, state, server.system_identifier, server.timeline, name)
        if state.checkpoint is None:
            await refuse_forgotten(session.connection, config.target.schema, name, indexes)
        else:
            await refuse_gap(slot_connection, state, server, slot, name)
        if stuck is not None:
            refuse_undecodable(stuck, state.checkpoint, name)
    except GapError as gap:
        if not heals(gap, config):
            raise
        log.error("gap", slot=name, error=str(gap), action="resync")
        begin = await _resync(slot_connection, source, session, slot, config, indexes, note)
        await session.begin_at(begin, server.system_identifier, server.timeline, started)
        return StartingPoint(begin, True, server)
    if state.checkpoint is None:
        begin = await _first_position(slot_connection, source, slot, config, note)
        await session.begin_at(begin, server.system_identifier, server.timeline, started)
        return StartingPoint(begin, True, server)
    assert slot is not None
    anew = state.source_started is not None and started != state.source_started
    followed = state.timeline is not None and server.timeline > state.timeline
    doubted, asked = followed, False
    if anew and not followed:
        # What is applied in part comes after the checkpoint, and so after all that the slot may send to prove it.
        in_part = state.reach != state.checkpoint
        asked = not in_part and fell_back(slot, state)
        doubted = in_part or (asked and not await has_last_applied(slot_connection, source, config, slot, state, note))
    if doubted or started != state.source_started or state.approved_source is not None:
        # On a promoted server, rows that were read again (for values that are not sent, or documents of several tables)
        # may have been read in a state that it never had. And an approval that nothing came of must not hold for ever.
        await session.begin_at(
            state.checkpoint, server.system_identifier, server.timeline, started, doubted=indexes if doubted else ()
        )
    if followed:
        log.info("timeline_followed", slot=name, timeline=server.timeline)
    elif doubted:
        log.warning(
            "source_doubted",
            slot=name,
            confirmed=str(slot.confirmed_flush),
            checkpoint=str(state.checkpoint),
            because="the source was started again, and its slot does not show that it has what was applied last, as if"
            " it had been restored; source and indexes are compared",
        )
    if asked:
        return None
    await _let_standbys_have(slot_connection, slot, config)
    return StartingPoint(state.checkpoint, doubted, server)


async def _let_standbys_have(slot_connection: SlotConnection, slot: Slot, config: Config) -> None:
    """Make the slot a failover slot where that is wanted and the server can."""
    if config.source.failover and not slot.failover and slot_connection.version >= FAILOVER_VERSION:
        await slot_connection.set_failover(slot.name)
        crash_point("slot made a failover slot")
        log.info("slot_failover", slot=slot.name)


async def _first_position(
    slot_connection: SlotConnection, source: Connection, slot: Slot | None, config: Config, note: Note
) -> Lsn:
    """Return where a pipeline begins that has indexed nothing yet: at the slot as it is, or at a new one.

    A slot from which nothing was read yet may have been left by a worker that was killed before it had seen whether the
    slot can decode everything. That is looked up again, in everything since the oldest transaction that the slot needs.
    A new slot in its place loses nothing, because the first load is still to come.

    :raises SlotInUse: another process is creating or reading the slot.
    """
    name = config.source.slot
    if slot is None:
        return await _create_slot(slot_connection, source, config, note)
    with speaking_of("source", where=f"slot {name}"):
        if slot.wal_status == "lost":
            await source.execute("SELECT pg_drop_replication_slot(%s)", [name])
            crash_point("lost slot dropped")
            return await _create_slot(slot_connection, source, config, note)
        if slot.confirmed_flush is None or slot.catalog_xmin is None:
            raise SlotInUse(
                "the slot is still being created by a session that was left behind",
                where=f"slot {name}",
                hint="it goes away with that session",
            )
        if slot.active_pid is not None:
            raise SlotInUse(
                f"a process of the source, {slot.active_pid}, reads the slot, and no worker has begun with it",
                where=f"slot {name}",
                hint="end it, or wait until the server has noticed that its client is gone",
            )
        doubtful = await definitions_changed_since(source, slot.catalog_xmin)
    if doubtful:
        await _drop_doubtful(source, name)
        return await _create_slot(slot_connection, source, config, note, failover=slot.failover)
    log.info("slot_adopted", slot=name, lsn=str(slot.confirmed_flush))
    await _let_standbys_have(slot_connection, slot, config)
    return slot.confirmed_flush


async def _create_slot(
    slot_connection: SlotConnection, source: Connection, config: Config, note: Note, *, failover: bool = False
) -> Lsn:
    """Create the slot, and say who is in the way while that waits for open write transactions.

    A slot that may never be able to decode some of the changes is created again, see `source/definitions`.

    :param failover: whether standbys are to have it, though the configuration does not ask for that.
    """
    name = config.source.slot
    failover = (config.source.failover or failover) and slot_connection.version >= FAILOVER_VERSION
    log.info("slot_creating", slot=name)
    creations = 0
    while True:
        creations += 1
        with speaking_of("source"):
            first = await next_transaction(source)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_report_writers, source, name, note)
            begin = await slot_connection.create_slot(name, failover=failover)
            crash_point("slot created")
            tasks.cancel_scope.cancel()
        with speaking_of("source", where=f"slot {name}"):
            if not await definitions_changed_since(source, first):
                break
        if creations >= CREATIONS:
            log.warning(
                "slot_doubtful",
                slot=name,
                because="tables were created or altered each time that it was created",
                fix="when that is over, restart the worker and run cdcsync verify INDEX --repair; if the source cannot"
                " decode a change, the worker reports a gap",
            )
            break
        await _drop_doubtful(source, name)
    log.info("slot_created", slot=name, lsn=str(begin))
    return begin


async def _drop_doubtful(source: Connection, name: str) -> None:
    """Drop a slot that may not be able to decode everything, so that it is created again."""
    log.info("slot_made_again", slot=name, because="tables were created or altered after its creation began")
    with speaking_of("source", where=f"slot {name}"):
        await source.execute("SELECT pg_drop_replication_slot(%s)", [name])
        crash_point("slot that is made again dropped")


async def _report_writers(source: Connection, name: str, note: Note) -> None:
    def say(sessions: list[str]) -> None:
        log.warning("slot_waits_for_transactions", slot=name, sessions=sessions)

    with Blocked(f"the creation of slot {name} waits for", note, say) as blocked:
        while True:
            await blocked.due()
            with speaking_of("source"), anyio.CancelScope(shield=True):
                await blocked.by(source, await running_transactions(source, anywhere=True))


async def _resync(
    slot_connection: SlotConnection,
    source: Connection,
    session: ApplySession,
    slot: Slot | None,
    config: Config,
    indexes: Sequence[str],
    note: Note,
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
    return await _create_slot(slot_connection, source, config, note)
