"""Gaps: places where changes may have been lost between the checkpoint and what the slot can still send.

Looked for at every connection, before one change is applied. Each error says how to continue; docs/operations.md,
"After a gap", says what that costs.

There are two kinds. On the server that the index has followed, or that was promoted in its place, changes were lost: a
resync heals that, and `source.on_gap` says whether the worker does it by itself. Or the server is another one, such as
an old primary that was started again: a resync would make the index equal to the wrong tables, so it needs an approval.

Source: PostgreSQL, "pg_replication_slots"; "Streaming Replication Protocol" (IDENTIFY_SYSTEM, TIMELINE_HISTORY).
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from cdcsync.config import Config
from cdcsync.errors import AnotherServer, DecodingFailed, GapError, SetupError, SourceUnavailable
from cdcsync.lsn import Lsn
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.liveness import WatchedConnection, same_server
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.preflight.identity import connect_source, refuse_another_server, standby
from cdcsync.source.catalog import SENDS_PREPARED, Slot, misfit, read_slot, why_lost
from cdcsync.source.slot import RESYNC, ServerIdentity, SlotConnection
from cdcsync.target.pipelines import Pipelines, PipelineState
from cdcsync.target.requests.history import History


def heals(gap: GapError, config: Config) -> bool:
    """Say whether the worker reads everything again after a gap, or stops."""
    return gap.approved if isinstance(gap, AnotherServer) else config.source.on_gap == "resync"


async def foreseen_gap(config: Config) -> GapError | None:
    """Return the gap that a worker would find if it started now; nothing is changed.

    :raises SourceUnavailable, TargetUnavailable: a server does not answer now.
    """
    schema, name = config.target.schema, config.source.slot
    async with await connect(config.target.dsn, "target", application_name="cdcsync check") as target:
        with speaking_of("target"):
            table = sql.Identifier(schema, "pipelines").as_string(target)
            if not await fetch_value(target, "SELECT to_regclass(%s) IS NOT NULL", [table]):
                return None
            state = await Pipelines(schema, name).read(target)
        try:
            async with await connect_source(config, state, application_name="cdcsync check") as source:
                # The slot is read before the checkpoint: a worker that runs moves it after that.
                with speaking_of("source", where=f"slot {name}"):
                    slot = await read_slot(source, name)
                with speaking_of("target"):
                    state = await Pipelines(schema, name).read(target)
                await refuse_gaps(source, target, state, slot, config)
        except GapError as gap:
            return gap
    return None


async def connect_slot(config: Config, state: PipelineState | None) -> SlotConnection:
    """Open a replication connection with the host of `source.dsn` that a pipeline follows. The caller closes it.

    :param state: of the pipeline; None if there is none yet.
    :raises AnotherServer: no host is its server, and all of them answer.
    :raises SourceUnavailable, SetupError: as `SlotConnection.connect`; or it is a standby, whose view of slots and WAL
        is only older, which is not a gap.
    """

    async def right(slot: SlotConnection) -> None:
        if await slot.in_recovery():
            raise standby()
        if state is not None:
            server = await slot.identify()
            refuse_another_server(
                slot.address, state, server.system_identifier, server.timeline, config.source.slot, follow=True
            )

    return await SlotConnection.connect(config.source.dsn, right)


async def refuse_gaps(
    source: Connection, target: Connection, state: PipelineState | None, slot: Slot | None, config: Config
) -> None:
    """Refuse every gap, over a replication connection of its own where the pipeline has begun.

    :raises GapError: there is one.
    :raises SetupError: the slot is of another kind or database.
    """
    name = config.source.slot
    refuse_misfit(slot, None if state is None else state.checkpoint)
    if state is not None and state.system_identifier is not None:
        async with await connect_slot(config, state) as slot_connection:
            backend = source.backend if isinstance(source, WatchedConnection) else None
            if not same_server(backend, await slot_connection.backend()):
                raise SourceUnavailable("the address led to another server meanwhile", where=f"slot {name}")
            server = await slot_connection.identify()
            refuse_another_server(slot_connection.address, state, server.system_identifier, server.timeline, name)
            if state.checkpoint is not None:
                await refuse_gap(slot_connection, state, server, slot, name)
                return
    await refuse_forgotten(target, config.target.schema, name, list(config.indexes))


def refuse_misfit(slot: Slot | None, checkpoint: Lsn | None) -> None:
    """Refuse a slot that we cannot read and may not drop, so that no resync is begun that could not end.

    :raises SetupError: it is one.
    """
    if slot is not None and (refused := misfit(slot, begun=checkpoint is not None)) is not None:
        why, fix = refused
        raise SetupError(f"the replication slot {why}", where=f"slot {slot.name}, checkpoint {checkpoint}", hint=fix)


def refuse_undecodable(stuck: DecodingFailed, checkpoint: Lsn | None, name: str) -> None:
    """Refuse a position at which the source has failed twice.

    :raises GapError: always.
    """
    raise GapError(
        f"the source fails each time that it decodes what follows the checkpoint: {stuck.message}",
        where=f"slot {name}, checkpoint {checkpoint}",
        hint=f"{stuck.hint}; then {RESYNC}",
    )


async def refuse_moved(source: Connection, name: str, checkpoint: Lsn) -> None:
    """See that nobody moved the slot between our look at it and the moment from which only we can.

    :raises SourceUnavailable: look again.
    """
    with speaking_of("source", where=f"slot {name}"):
        slot = await read_slot(source, name)
    if slot is None or (slot.confirmed_flush is not None and slot.confirmed_flush > checkpoint):
        raise SourceUnavailable("the slot was moved while we connected", where=f"slot {name}")


async def refuse_forgotten(target: Connection, schema: str, name: str, indexes: Sequence[str]) -> None:
    """Refuse indexes that hold rows beside a pipeline without a checkpoint: nobody knows what they have missed.

    :raises GapError: there are some.
    """
    with speaking_of("target"):
        begun = await History(schema).begun(target, indexes)
    if begun:
        raise GapError(
            f"the pipeline has no checkpoint, and the index {', '.join(begun)} was loaded before: the checkpoint was"
            " removed, so what changed since is unknown",
            where=f"slot {name}",
            hint=RESYNC,
        )


async def refuse_gap(
    slot_connection: SlotConnection, state: PipelineState, server: ServerIdentity, slot: Slot | None, name: str
) -> None:
    """Refuse a server that is behind us or went another way, and a slot that is ahead of us or gone.

    A slot that was made to send prepared transactions is refused, too.

    :raises GapError: changes after the checkpoint may be missing.
    """
    await _refuse_branch(slot_connection, state, server, name)
    refuse_lost(state, server, slot, name)


def refuse_lost(state: PipelineState, server: ServerIdentity, slot: Slot | None, name: str) -> None:
    """Refuse a server that is behind the index, and a slot that cannot send all that follows the checkpoint.

    :param server: of a history that the index has followed.
    :raises GapError: changes after the checkpoint may be missing.
    """
    where = f"slot {name}, checkpoint {state.checkpoint}"
    assert state.checkpoint is not None
    if state.reach is not None and server.lsn < state.reach:
        raise GapError(
            f"the source's WAL ends at {server.lsn}, before {_reach(state)}: it was restored from a backup",
            where=where,
            hint=RESYNC,
        )
    if slot is None:
        raise GapError(
            "the replication slot is gone: changes since the checkpoint cannot be received any more",
            where=where,
            hint=RESYNC,
        )
    if slot.wal_status == "lost":
        raise GapError(
            f"the server has removed WAL that the replication slot still needed ({why_lost(slot)})",
            where=where,
            hint=RESYNC,
        )
    if slot.two_phase:
        raise GapError(f"the replication slot {SENDS_PREPARED}", where=where, hint=RESYNC)
    if slot.confirmed_flush is not None and slot.confirmed_flush > state.checkpoint:
        raise GapError(
            f"the slot is ahead of the index, at {slot.confirmed_flush}: the target fell back to an older state (a"
            " standby of it was promoted before it had everything, or a backup was restored), or somebody else advanced"
            " the slot or made it anew",
            where=where,
            hint=RESYNC,
        )


async def _refuse_branch(
    slot_connection: SlotConnection, state: PipelineState, server: ServerIdentity, name: str
) -> None:
    """Refuse a newer timeline that left ours before the checkpoint: what is indexed beyond never happened there."""
    if state.timeline is None or server.timeline == state.timeline or state.reach is None:
        return
    left_at = await slot_connection.end_of_timeline(state.timeline, server.timeline)
    where = f"slot {name}, checkpoint {state.checkpoint}"
    if left_at is None:
        raise GapError(
            f"the source does not tell where its timeline {server.timeline} left timeline {state.timeline}, which the"
            " index has followed",
            where=where,
            hint=f"if pg_wal/{server.timeline:08X}.history is missing there, put it back from a standby or the WAL"
            f" archive, and start the worker again; or {RESYNC}",
        )
    if left_at < state.reach:
        raise GapError(
            f"the source's timeline {server.timeline} branched off at {left_at}, before {_reach(state)}: a standby was"
            " promoted that had not received all that is indexed",
            where=where,
            hint=RESYNC,
        )


def _reach(state: PipelineState) -> str:
    """Say how far the index reaches: to the checkpoint, or into a transaction beyond it."""
    return "the checkpoint" if state.reach == state.checkpoint else f"{state.reach}, of which parts are indexed"
