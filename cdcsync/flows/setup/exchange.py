"""The chunks that stand beside an index: they become those that are searched, or are dropped.

A command asks for either through the registry. Both exchange or remove a name that whoever follows the index writes by,
so the holder of the pipeline's lock does it, before it writes: a worker that begins, or the command itself where no
worker runs, or once a running one has let go of the lock because the watch saw the request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from cdcsync.config import Config, QualifiedName
from cdcsync.config.names import beside_name, own_name
from cdcsync.errors import SetupError
from cdcsync.flows.setup.withdrawn import withdraw
from cdcsync.logs import get_logger
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import attempt
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.beside import contents_asked_for
from cdcsync.target.ddl.chunks_view import chunks_view_name
from cdcsync.target.ddl.generations import drop_beside, exchange_relations
from cdcsync.target.ddl.grants import settings_to_note
from cdcsync.target.ddl.names import Names
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generations, any_ends
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry
from cdcsync.target.search import stored_spec

log = get_logger()


async def do_what_was_asked(
    connection: Connection, config: Config, *, release: Callable[[str], Awaitable[None]] | None = None
) -> bool:
    """Exchange and drop the chunks beside the indexes of a configuration, as commands asked; says whether any were.

    Only the holder of the pipeline's lock may, and only before it writes.

    :param release: ends what still works on the tables of an index.
    """
    schema, done = config.target.schema, False
    with speaking_of("target"):
        entries = await Registry(schema).all(connection)
        generations = await Generations(schema).all(connection)
    for other in entries.values():
        index = own_name(other.name)
        if not other.hidden or other.slot != config.source.slot or index not in config.indexes:
            continue
        ends = any_ends(generations.get(other.name, ()))
        if not ends and other.activation_asked_at is None:
            continue
        done = True
        if release is not None:
            await release(index)
            await release(other.name)
        try:
            await _do(connection, config, other, ends=ends)
        except SetupError as error:
            # Nothing of it was done. The worker goes on with both, and the command says why.
            with speaking_of("target", where=f"index {index}"):
                refused = await withdraw(connection, schema, other.name, other.generation, error.with_fix, drop=ends)
            if refused:
                log.error("migration_refused", index=index, error=error.message, fix=error.hint)
    return done


async def do_without_worker(connection: Connection, config: Config) -> bool:
    """Take the pipeline's lock and do what was asked, unless a worker holds the lock; says whether it was free.

    The fence is raised first, and what is left of a worker that was cut off ends: it writes nothing more by the names
    that it knows, and examines them anew.
    """
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        if not await pipelines.try_lock(connection):
            return False
        lease = await pipelines.take_over(connection)
        crash_point("fence raised by a command")
        await pipelines.end_overtaken(connection, lease)
    await do_what_was_asked(connection, config)
    return True


async def _do(connection: Connection, config: Config, other: Entry, *, ends: bool) -> None:
    """Drop the chunks beside an index, or have it searched by them.

    :raises SetupError: that cannot be done; nothing was changed.
    """
    index, schema = own_name(other.name), config.target.schema
    section = config.indexes[index]
    with speaking_of("target", where=f"index {index}"):
        did = await attempt(
            connection,
            lambda: _drop(connection, config, index) if ends else _exchange(connection, config, index),
            [
                *Names(schema, other.relations).written(other.generation),
                QualifiedName(schema, f"{other.relations}_words"),
            ]
            if ends
            else [section.view_name, chunks_view_name(section.view_name)],
            where=f"index {index}",
            vacuumed=Vacuumed(connection, [(schema, one) for one in (index, other.relations)]),
        )
    if not did:
        return
    if ends:
        log.info("generation_dropped", index=index, generation=other.generation)
    else:
        log.info("generation_live", index=index, generation=other.generation)


def exchanged(spec: IndexSpec) -> IndexSpec:
    """Return an index as it is once it is searched by the chunks beside it, and those of before stand beside."""
    assert spec.beside is not None
    before = msgspec.structs.replace(spec, name=spec.beside.name, stem=spec.relations, beside=None)
    return msgspec.structs.replace(spec.beside, name=spec.name, beside=before)


async def _exchange(connection: Connection, config: Config, index: str) -> bool:
    """Have an index searched by the chunks beside it; returns False if nobody wants that any more."""
    schema = config.target.schema
    registry, generations = Registry(schema), Generations(schema)
    async with connection.transaction():
        await registry.find(connection, index, lock=True)
        other = await registry.find(connection, beside_name(index), lock=True)
        if other is None or other.activation_asked_at is None:
            return False
        # A drop may have been requested while this waited for the view's lock.
        if any_ends(await generations.around(connection, index, lock=True)):
            return False
        if other.state != "live":
            raise SetupError(
                f"generation {other.generation} is {other.state} by now: searches would find less with it",
                where=f"index {index}",
                hint=f"cdcsync migrate {index} status shows how far it is",
            )
        spec = exchanged(await stored_spec(connection, schema, index, config.indexes[index]))
        await exchange_relations(connection, schema, spec)
        await registry.exchange(connection, index)
        await generations.stamp(connection, index, spec.generation, "live_at")
        await registry.note_settings(connection, index, await settings_to_note(connection, schema, index))
        crash_point("chunks exchanged")
    crash_point("exchange of chunks committed")
    return True


async def _drop(connection: Connection, config: Config, index: str) -> bool:
    """Drop the chunks beside an index; returns False if there are none any more."""
    schema = config.target.schema
    registry = Registry(schema)
    async with connection.transaction():
        own = await registry.find(connection, index, lock=True)
        other = await registry.find(connection, beside_name(index), lock=True)
        if own is None or other is None:
            return False
        # Another holder of the pipeline's lock may have dropped what was meant, and others stand there since.
        if not any_ends(await Generations(schema).of(connection, other.name, lock=True)):
            return False
        spec = await stored_spec(connection, schema, index, config.indexes[index])
        await drop_beside(connection, schema, msgspec.structs.replace(spec, beside=None))
        await registry.remove(connection, other.name)
        # A configuration may ask for them still: the old one of a running worker, or that of a migration that was given
        # up. Nobody wants them in place of those that are searched.
        dropped = contents_asked_for(other)
        await registry.decline(connection, index, [*(own.declined or ()), *([] if dropped is None else [dropped])])
        crash_point("chunks dropped")
    crash_point("dropped chunks committed")
    return True
