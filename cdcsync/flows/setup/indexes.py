"""The set-up of indexes in the target: relations, the row in `indexes`, and the load that each state calls for.

Everything of one index commits together, so that a crash between two indexes is picked up by the next start. Only the
holder of the pipeline's lock calls these, before it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import psycopg
import structlog

from cdcsync.config import Config, QualifiedName
from cdcsync.config.names import beside_name, own_name
from cdcsync.errors import IndexFault, SetupError, TablesChanged
from cdcsync.flows.setup.differences import (
    as_followed,
    ask_for,
    difference_of,
    note_fingerprint,
    present_fingerprint,
    stored_fingerprint,
)
from cdcsync.flows.setup.needs import need_of
from cdcsync.flows.setup.withdrawn import withdraw
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import LOCKED_OUT, speaking_of
from cdcsync.postgres.locking import BRIEFLY, OPEN_FOR_S, REPLACING_WAITS, attempt, exclusive_locks, until_locked
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import Catalog, facts_of
from cdcsync.source.families import rows_sent
from cdcsync.source.fingerprints import Difference, collations_of
from cdcsync.source.publications import fixed_in
from cdcsync.source.relations import Table
from cdcsync.target import evaluations
from cdcsync.target.approvals import Approvals, change_of
from cdcsync.target.ddl.generations import create_generations, drop_relations, open_beside
from cdcsync.target.ddl.grants import settings_to_note
from cdcsync.target.ddl.missing import Missing, missing_relations, newly_asked_for
from cdcsync.target.ddl.names import written_tables
from cdcsync.target.ddl.policies import put_policy
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.searching import search_outdated
from cdcsync.target.ddl.serving import grant_serving
from cdcsync.target.ddl.upgrading import upgrade_vectors
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generations
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry, made_by
from cdcsync.target.requests.history import History
from cdcsync.target.requests.submission import Requests

log = structlog.get_logger()

LOCK_ATTEMPTS = 30
"""How often a change that an index needs of its relations is tried while somebody uses them: for two minutes. Then that
index is paused, because no other one is followed meanwhile."""


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
        compared = (*spec.shape.own, *(spec.where.columns if spec.where is not None else ()))
        if collations_of(table, compared) != spec.collations:
            return True
        sent = publication.tables.get(table.name) if publication is not None else None
        if sent is None or sent.row_filter != spec.row_filter:
            return True
        if _related_outdated(spec, catalog, table):
            return True
    return False


def _related_outdated(spec: IndexSpec, catalog: Catalog, table: Table) -> bool:
    """Say whether a related table is another one than the statements were made for, or one of them is not sent."""
    if any(catalog.tables[name].oid != oid for name, oid in spec.oids.items() if name in catalog.tables):
        return True
    sent = catalog.publication.tables if catalog.publication is not None else {}
    return not spec.facts.keys() <= sent.keys() or facts_of(catalog, table, spec.documents.related) != spec.facts


async def set_up_indexes(
    target: Connection,
    config: Config,
    specs: Sequence[IndexSpec],
    catalog: Catalog,
    waiting: Mapping[str, Pause] | None = None,
    *,
    known: set[str] | None = None,
) -> list[IndexFault]:
    """Create or extend each index's relations, and ask for what its state calls for.

    The relations, the index's row, its fingerprint and the request commit together.

    :param catalog: the tables as they are now, which have been read since they were published.
    :param waiting: why new indexes are not loaded yet.
    :param known: the indexes that this process has set up, which are added to. An index among them for which there is
        nothing to do is left alone: a change of one table is not to hold up all the others for long.
    :returns: why indexes could not be set up, of which nothing was changed; the others were.
    """
    known = set() if known is None else known
    refused = []
    # The search function of an index looks into what stands beside it, too.
    for spec in sorted(specs, key=lambda one: not one.hidden):
        pause = (waiting or {}).get(spec.name)
        try:
            with speaking_of("target", where=f"index {spec.name}", index=spec.name):
                if spec.name in known and pause is None and await _stands(target, config, spec, catalog):
                    continue
                await _set_up_one(target, config, spec, catalog, pause)
                known.add(spec.name)
        except IndexFault as error:
            known.discard(spec.name)
            refused.append(error)
    return refused


async def _set_up_one(
    target: Connection, config: Config, spec: IndexSpec, catalog: Catalog, pause: Pause | None
) -> None:
    """Set up one index, once nobody is in the way.

    :raises IndexFault: somebody stays in the way, other objects depend on what has to change, or the tables that the
        index has are not as it needs them.
    """
    try:
        await upgrade_vectors(target, config.target.schema, spec, LOCK_ATTEMPTS)
        await drop_generations(target, config.target.schema, spec)
        await until_locked(
            lambda: _set_up(target, config, spec, catalog, pause),
            table=f"{spec.relations}_chunks",
            attempts=LOCK_ATTEMPTS,
            vacuumed=Vacuumed(target, [(config.target.schema, spec.relations)]),
        )
    except SetupError as error:
        if await Registry(config.target.schema).find(target, spec.name) is None:
            raise
        raise IndexFault(error.message, index=spec.name, where=error.where, hint=error.hint) from error
    except LOCKED_OUT as error:
        used = [spec.config.view_name, *written_tables(config.target.schema, spec)]
        locks = await exclusive_locks(target, used, modes=REPLACING_WAITS, open_for_s=OPEN_FOR_S)
        raise IndexFault(
            "its tables or views in the target have to change, and a transaction there does not let go of them"
            + "".join(f": {lock}" for lock in locks[:1]),
            index=spec.name,
            where=str(spec.config.view_name),
            hint=locks[0].remedy if locks else "end the transaction that holds the lock: pg_locks names it",
        ) from error
    except psycopg.errors.DependentObjectsStillExist as error:
        raise IndexFault(
            f"the view {spec.config.view_name} has to change, and other objects depend on it",
            index=spec.name,
            where=str(spec.config.view_name),
            hint=f"drop them, then create them again: {error.diag.message_detail}",
        ) from error


async def _set_up(target: Connection, config: Config, spec: IndexSpec, catalog: Catalog, pause: Pause | None) -> None:
    """Set up one index in a transaction; what locks out searches gives way to them.

    :param pause: why it is not loaded yet, if it is new and waits.
    :raises LockNotAvailable, DeadlockDetected: somebody uses what has to change.
    """
    async with target.transaction():
        await target.execute(BRIEFLY)
        before = await _as_examined(target, config, spec)
        view = None if before is None else before.view
        missing = await missing_relations(target, config.target.schema, spec, view=view)
        missing.refuse_unsafe(config.target.schema)
        await create_index_relations(target, config.target.schema, spec)
        created = await create_generations(target, config.target.schema, spec)
        await put_policy(target, config.target.schema, spec, config.serve)
        if not spec.hidden:
            await grant_serving(target, config.target.schema, spec, config.serve.role, new=before is None)
        if spec.hidden and spec.beside is not None:
            searched = msgspec.structs.replace(spec.beside, beside=spec)
            await open_beside(target, config.target.schema, searched, created=bool(missing.tables))
        await _register(target, config, spec, catalog, missing)
        settings = await settings_to_note(target, config.target.schema, spec.name)
        await Registry(config.target.schema).note_settings(target, spec.name, settings)
        for generation in created:
            await Generations(config.target.schema).begin_again(target, spec.name, generation)
        if pause is not None:
            await Registry(config.target.schema).pause(target, spec.name, pause)
        crash_point("index relations written")
    crash_point("index relations committed")


async def _stands(target: Connection, config: Config, spec: IndexSpec, catalog: Catalog) -> bool:
    """Say whether an index that this process has set up before is as it should be, so that nothing is to be done."""
    schema = config.target.schema
    entry = await Registry(schema).find(target, spec.name)
    if entry is None or entry.state != "live" or entry.unfollowed_at is not None:
        return False
    if spec.hidden or spec.beside is not None or not made_by(entry, spec):
        return False
    if present_fingerprint(catalog, spec) != stored_fingerprint(entry):
        return False
    if [one.generation for one in await Generations(schema).of(target, spec.name)] != [spec.generation]:
        return False
    return not (await missing_relations(target, schema, spec) or await search_outdated(target, schema, spec))


async def _as_examined(target: Connection, config: Config, spec: IndexSpec) -> Entry | None:
    """Return the index's row if it still has the generations that it was examined with, and see that it keeps them.

    :param config: with the indexes that stood beside others then.
    :raises TablesChanged: somebody switched from one to another, began or ended a migration, or has another pipeline
        keep the index.
    """
    schema = config.target.schema
    entry = await Registry(schema).find(target, spec.name, lock=True)
    if entry is not None and entry.slot != config.source.slot:
        raise TablesChanged("another pipeline has begun to keep the index", where=f"index {spec.name}")
    beside = beside_name(spec.name)
    stands = await Registry(schema).find(target, beside, lock=True) is not None
    if (stands, spec.hidden and entry is None) != (beside in config.indexes, False):
        raise TablesChanged("a migration to other chunks began or ended", where=f"index {spec.name}")
    if entry is None:
        return None
    wanted = {one.generation for one in await Generations(schema).of(target, spec.name) if one.state != "dropping"}
    wanted.add(entry.generation)
    if (entry.generation, entry.stem) != (spec.generation, spec.stem) or wanted != {
        one.generation for one in spec.generations
    }:
        raise TablesChanged("the index has other generations of vectors", where=f"index {spec.name}")
    return entry


async def drop_generations(target: Connection, schema: str, spec: IndexSpec) -> None:
    """Drop the generations of an index that somebody asked to be dropped.

    If others use one, or have built on it, it stays and says why: the index can be followed with it. Only the holder of
    the pipeline's lock may do this, and only before it writes: see `target/generations`.
    """
    generations = Generations(schema)
    kept = {one.generation for one in spec.generations}

    async def drop(generation: int) -> bool:
        """Drop a generation; returns False if that is not asked any more, or the index is not as it was examined."""
        async with target.transaction():
            entry = await Registry(schema).find(target, spec.name, lock=True)
            if entry is None or (entry.generation, entry.stem) != (spec.generation, spec.stem):
                return False  # other chunks took its place: `_as_examined` has it examined again
            states = {one.generation: one.state for one in await generations.of(target, spec.name, lock=True)}
            if states.get(generation) != "dropping":
                return False
            await drop_relations(target, schema, spec, generation)
            await generations.remove(target, spec.name, generation)
            await evaluations.forget(target, schema, spec.name, generation)
            crash_point("generation dropped")
        crash_point("dropped generation committed")
        return True

    for one in await generations.of(target, spec.name):
        if one.state == "dropping" and one.generation not in kept:
            table = QualifiedName(schema, f"{spec.relations}_vectors_{one.generation}")
            try:
                with speaking_of("target", where=f"index {spec.name}"):
                    dropped = await attempt(
                        target,
                        lambda: drop(one.generation),  # noqa: B023 - awaited here
                        [table],
                        where=f"index {spec.name}",
                        vacuumed=Vacuumed(target, [(table.schema, table.name)]),
                    )
            except SetupError as error:
                if await withdraw(target, schema, spec.name, one.generation, error.with_fix, drop=True):
                    log.error("migration_refused", index=spec.name, error=error.message, fix=error.hint)
                continue
            if dropped:
                log.info("generation_dropped", index=spec.name, generation=one.generation)


async def let_go(target: Connection, config: Config) -> None:
    """Note which indexes of this pipeline the configuration no longer has: nothing keeps them in step from now on."""
    with speaking_of("target"):
        registry = Registry(config.target.schema)
        # Chunks that a migration has begun to make since the examination are followed with their index.
        names = {name for index in config.indexes for name in (index, beside_name(own_name(index)))}
        gone = await registry.note_followed(target, config.source.slot, sorted(names))
        crash_point("indexes let go")
        for index in gone:
            log.warning("index_unfollowed", index=index, fix=f"put it back, or remove it: cdcsync drop {index}")


async def pause_indexes(target: Connection, config: Config, broken: Mapping[str, Pause]) -> None:
    """Note why these indexes cannot be followed: in their rows, or, if they have none yet, in the pipeline's."""
    registry = Registry(config.target.schema)
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        stored = await registry.all(target)
        for index in broken.keys() & stored.keys():
            await registry.pause(target, index, broken[index])
            crash_point("broken index paused")
        unstored = [index for index in config.indexes if index not in stored]
        await pipelines.note_waiting(target, {one: broken[one] for one in unstored if one in broken}, unstored)
        crash_point("waiting indexes noted")


async def _register(target: Connection, config: Config, spec: IndexSpec, catalog: Catalog, missing: Missing) -> None:
    schema = config.target.schema
    registry, requests = Registry(schema), Requests(schema)
    now = present_fingerprint(catalog, spec)
    assert now is not None
    before = await registry.find(target, spec.name)
    begun = before is not None and not await History(schema).still_to_begin(target, spec)
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
        lost = [one for one in missing.built if one not in newly_asked_for(schema, spec, before.configuration or {})]
        if missing.tables or lost:
            log.error("relations_missing", index=spec.name, tables=missing.tables, built=lost)
        await registry.load_again(target, spec.name)
    if fixed_in(catalog.version) is not None:
        sent = None if before is None else stored_fingerprint(before)
        if sent is None or any(sent.sent_by.tables.get(name) != by for name, by in now.sent_by.tables.items()):
            # Transactions that wrote to a table before it was published may keep it from being sent.
            await requests.compare(target, spec.name)
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
