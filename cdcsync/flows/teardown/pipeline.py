"""`teardown`: removes a pipeline's slot and publication on the source, and on request all it has in the target."""

from __future__ import annotations

import contextlib

from psycopg import sql

from cdcsync.config import Config
from cdcsync.errors import AnotherServer, SetupError, SlotInUse
from cdcsync.flows.teardown.both_servers import SourcePart, connect_source, dropped
from cdcsync.flows.teardown.publication import Step, of_publication
from cdcsync.flows.teardown.workers import hold_pipeline, raise_fence
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import ATTEMPTS, until_locked
from cdcsync.postgres.sessions import Session
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import Slot, read_slot, released_slot
from cdcsync.source.publications import read_publication
from cdcsync.target.belongings import Belongings, belongings_of, drop_pipeline, pipelines_sharing
from cdcsync.target.version import open_target


async def read_belongings(config: Config) -> Belongings:
    """Return what a purge would drop.

    :raises TargetUnavailable, SetupError: the target cannot be asked.
    """
    async with await open_target(config.target, application_name="cdcsync teardown") as target:
        with speaking_of("target"):
            return await belongings_of(target, config.target.schema, config.source.slot)


async def what_exists(config: Config) -> list[str]:
    """Return what there is already that a purge would drop, in words; nothing for a pipeline that never began.

    :raises SourceUnavailable, TargetUnavailable, SetupError: a server cannot be asked.
    """
    belongings, slot_name = await read_belongings(config), config.source.slot
    async with Session(config.source.dsn, "source", application_name="cdcsync teardown") as session:
        source = await session.connection()
        with speaking_of("source"):
            slot = await read_slot(source, slot_name)
    pipeline = [f"the pipeline {slot_name} in the schema {config.target.schema}"] if belongings.set_up else []
    indexes = [f"the index {name}" for name in belongings.indexes]
    return [*pipeline, *indexes, *([] if slot is None else [f"the slot {slot_name}"])]


async def tear_down(config: Config, *, purge: bool) -> list[Step]:
    """Drop slot and publication on the source, and with `purge` what the pipeline has in the target.

    :raises SetupError: a worker runs, the slot is not ours, or something depends on the index; nothing was dropped.
    :raises SlotInUse: something else reads the slot; nothing was dropped.
    :raises SourceUnavailable, TargetUnavailable: a server does not answer, or a session that a worker has left there
        does not end; the next teardown resumes from there.
    """
    schema, slot_name = config.target.schema, config.source.slot
    async with (
        await open_target(config.target, application_name="cdcsync teardown") as target,
        contextlib.AsyncExitStack() as stack,
    ):
        await hold_pipeline(target, config)
        source, elsewhere = await connect_source(config, target, application_name="cdcsync teardown")
        await stack.enter_async_context(source)
        with speaking_of("target"):
            belongings = await belongings_of(target, schema, slot_name)
            sharing = await pipelines_sharing(target, schema, slot_name, config.source.publication)
        with speaking_of("source"):
            slot = await released_slot(source, config.source.slot)
            publication = await read_publication(source, config.source.publication)
        if slot is not None:
            _refuse_slot(slot, elsewhere)
        publication_step = await of_publication(source, config, publication, belongings, sharing)
        if belongings.set_up:
            await raise_fence(target, config)

        drop_publication = None
        if publication_step.outcome == "dropped":
            name = sql.Identifier(config.source.publication)
            drop_publication = sql.SQL("DROP PUBLICATION IF EXISTS {}").format(name)
        part = SourcePart(source, config.source.publication, drop_publication)

        async def let_go() -> None:
            with speaking_of("target"):
                await target.execute("SELECT")  # whoever has ended this session, because it was silent, has the lock
            if drop_publication is not None:
                with speaking_of("source", where=part.where):
                    await source.execute(drop_publication)
                    crash_point("publication dropped")
                part.done.append(part.where)
            if slot is not None:
                with speaking_of("source", where=f"slot {slot_name}"):
                    await source.execute("SELECT pg_drop_replication_slot(%s)", [slot_name])
                    crash_point("slot dropped")
                part.done.append(f"slot {slot_name}")

        async def drop() -> None:
            """Drop it in the caller's transaction."""
            await drop_pipeline(target, schema, slot_name, belongings)

        if purge and belongings.set_up:
            await dropped(target, config, drop, let_go, part, relations=belongings.relations, where=f"slot {slot_name}")
        else:

            async def change() -> None:
                await part.make_room()
                await let_go()

            await until_locked(change, table=part.where, attempts=ATTEMPTS)
        of_slot = Step(f"slot {slot_name}", "absent" if slot is None else "dropped", _left_elsewhere(elsewhere))
        return [*([_of_purge(config, belongings)] if purge else []), of_slot, publication_step]


def _left_elsewhere(elsewhere: AnotherServer | None) -> str | None:
    if elsewhere is None:
        return None
    return f"{elsewhere.message}; if the server that was followed still runs, drop the slot there, for it keeps WAL"


def _refuse_slot(slot: Slot, elsewhere: AnotherServer | None) -> None:
    where = f"slot {slot.name}"
    if elsewhere is not None:
        raise SetupError(
            f"the slot may not be this pipeline's: {elsewhere.message}",
            where=where,
            hint=f"correct source.dsn; or, if nothing else reads the slot, {slot.drop}, and tear down again",
        )
    if slot.foreign is not None:
        raise SetupError(
            f"the slot may not be this pipeline's: it {slot.foreign}",
            where=where,
            hint="correct source.slot or source.dsn; or, if nothing else reads the slot,"
            f" {slot.drop}, and tear down again",
        )
    if slot.active_pid is not None:
        raise SlotInUse(
            f"a process reads the slot that is not this pipeline's worker: source pid {slot.active_pid}",
            where=where,
            hint="end it, or wait until the server has noticed that it is gone, then tear down again",
        )


def _of_purge(config: Config, belongings: Belongings) -> Step:
    what = f"indexes {', '.join(belongings.indexes)}" if belongings.indexes else f"pipeline {config.source.slot}"
    return Step(f"{what} in the target", "dropped" if belongings.set_up else "absent")
