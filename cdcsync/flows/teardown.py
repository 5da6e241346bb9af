"""The teardown flow: takes away what a pipeline left on the source, and on request the index itself; or one index.

    ask ─► see that the source's locks are free ─► in the target: rows, view, tables
        ─► on the source: publication, then slot ─► commit in the target

1. The pipeline's lock is held throughout: a worker that runs is never pulled the rug from under, and none can start.
   What a worker that is just ending still holds, the lock or the slot, is waited for.
2. Everything that could refuse is asked before anything is dropped.
3. Each step finds its work done or does it, so an interrupted teardown is finished by the next one. Only the rows in
   the target tell what there is on the source and which server that is, so they go last: after everything in the
   target is dropped, so that nothing there can refuse any more, the source's part is done, and then the target commits.
4. What is searched meanwhile is locked only briefly, and tried again: each search locks these tables in an order of its
   own, and none may fail by a deadlock with us or wait behind us for others.
5. While we wait on one server we hold no lock on the other. So the statement on the publication is first tried and
   rolled back, which waits for who is in its way. Once the target's tables are locked, the source has `LET_GO_S`.
6. The publication goes before the slot: only for the former may a lock be in the way, and an index whose slot is gone
   has to be read again.

Source: PostgreSQL, "Replication Management Functions", "DROP PUBLICATION", "Dependency Tracking".
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Literal, TypeVar

import msgspec
from psycopg import sql

from cdcsync.config import Config, QualifiedName
from cdcsync.config.names import beside_name, quote
from cdcsync.errors import AnotherServer, CdcsyncError, SetupError, SlotInUse
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import LOCKED_OUT, speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.locking import ATTEMPTS, BRIEFLY, PUBLISHING_WAITS, attempt, exclusive_locks, until_locked
from cdcsync.postgres.sessions import Connection, Session, connect
from cdcsync.preflight.identity import connect_followed
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import Slot, other_readers, read_slot, released_slot
from cdcsync.source.families import single_names
from cdcsync.source.publications import Publication, named_tables, published_names, read_publication
from cdcsync.target.approvals import Approvals
from cdcsync.target.belongings import (
    Belongings,
    Relations,
    belongings_of,
    drop_pipeline,
    drop_relations,
    own_dependents,
    pipelines_sharing,
    relations_of,
)
from cdcsync.target.embedders import forget_embedders
from cdcsync.target.entries import Entry
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry
from cdcsync.target.version import open_target

T = TypeVar("T")

ENDING_S = 5.0
"""How long to wait for what a worker that has just ended holds: a server notices that within a moment, or a busy one
within some seconds."""

LET_GO_S = 3.0
"""How long the source may take for its part while the target's tables are locked: searches wait as long. It takes some
milliseconds, and waits for a lock no longer than `BRIEFLY`."""


class Step(msgspec.Struct, frozen=True):
    """The outcome of a teardown for one object. `note` says why it was kept, and what to do."""

    what: str
    outcome: Literal["dropped", "absent", "kept"]
    note: str | None = None


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
        await _lock(target, config)
        source, elsewhere = await _connect_source(config, target, application_name="cdcsync teardown")
        await stack.enter_async_context(source)
        with speaking_of("target"):
            belongings = await belongings_of(target, schema, slot_name)
            sharing = await pipelines_sharing(target, schema, slot_name, config.source.publication)
        with speaking_of("source"):
            slot = await released_slot(source, config.source.slot)
            publication = await read_publication(source, config.source.publication)
        if slot is not None:
            _refuse_slot(slot, elsewhere)
        of_publication = await _of_publication(source, config, publication, belongings, sharing)
        if belongings.set_up:
            await _take_over(target, config)

        drop_publication = None
        if of_publication.outcome == "dropped":
            name = sql.Identifier(config.source.publication)
            drop_publication = sql.SQL("DROP PUBLICATION IF EXISTS {}").format(name)
        part = _SourcePart(source, of_publication.what, drop_publication)

        async def let_go() -> None:
            with speaking_of("target"):
                await target.execute("SELECT")  # whoever has ended this session, because it was silent, has the lock
            if drop_publication is not None:
                with speaking_of("source", where=of_publication.what):
                    await source.execute(drop_publication)
                    crash_point("publication dropped")
                part.done.append(of_publication.what)
            if slot is not None:
                with speaking_of("source", where=f"slot {slot_name}"):
                    await source.execute("SELECT pg_drop_replication_slot(%s)", [slot_name])
                    crash_point("slot dropped")
                part.done.append(f"slot {slot_name}")

        async def drop() -> None:
            """Drop it in the caller's transaction."""
            await drop_pipeline(target, schema, slot_name, belongings)

        if purge and belongings.set_up:
            await _dropped(
                target, config, drop, let_go, part, relations=belongings.relations, where=f"slot {slot_name}"
            )
        else:
            await part.make_room()
            await let_go()
        of_slot = Step(f"slot {slot_name}", "absent" if slot is None else "dropped", _left_elsewhere(elsewhere))
        return [*([_of_purge(config, belongings)] if purge else []), of_slot, of_publication]


async def drop_index(config: Config, index: str) -> list[Step]:
    """Drop one index: its view, its tables and its entry in the target, and its table's place in our publication.

    Slot and pipeline stay. A worker that still follows the index must have released it first.

    :raises SetupError: there is no such index, a worker follows it, or something depends on it; nothing was dropped.
    :raises SourceUnavailable, TargetUnavailable: a server does not answer; dropping again continues from there.
    """
    schema = config.target.schema
    async with (
        await open_target(config.target, application_name="cdcsync drop") as target,
        contextlib.AsyncExitStack() as stack,
    ):
        source, elsewhere = await _connect_source(config, target, application_name="cdcsync drop")
        await stack.enter_async_context(source)
        with speaking_of("target"):
            entries = await Registry(schema).all(target)
            entry = entries.get(index)
            if entry is None or entry.hidden or entry.slot != config.source.slot:
                owner = "" if entry is None else f" of this pipeline: it belongs to slot {entry.slot}"
                known = (
                    ", ".join(
                        name for name, one in entries.items() if one.slot == config.source.slot and not one.hidden
                    )
                    or "none"
                )
                raise SetupError(
                    f"there is no index {index}{owner}", where=f"schema {schema}", hint=f"those there are: {known}"
                )
            if await _let_go(target, config, entry, wait_s=ENDING_S):
                await _take_over(target, config)
            both = [index, beside_name(index)]
            relations = await relations_of(target, schema, both)
            others = {table for name, one in entries.items() if name not in both for table in one.tables}
            own = {table for name in both if name in entries for table in entries[name].tables}
        others |= {str(table) for name, one in config.indexes.items() if name != index for table in one.followed}
        with speaking_of("source"):
            others = await single_names(source, others)
            mine = await single_names(source, own)
            steps, leaving = await _of_tables(source, config, mine, others, elsewhere)
        unpublish = _without(config.source.publication, leaving) if leaving else None
        part = _SourcePart(source, f"publication {config.source.publication}", unpublish, leaving)

        async def let_go() -> None:
            if unpublish is not None:
                with speaking_of("source", where=part.where):
                    async with source.transaction():
                        await source.execute(unpublish)
                        crash_point("table taken from its publication")
                    crash_point("publication without the table committed")

        async def drop() -> bool:
            """Drop it in the caller's transaction."""
            await drop_relations(target, schema, both, relations)
            # Last, as the tables may have been waited for: a worker may have begun to follow it meanwhile.
            now = await Registry(schema).find(target, index, lock=True)
            locked = now is not None and await _let_go(target, config, now)
            for name in both:
                await Registry(schema).remove(target, name)
            await Approvals(schema).remove(target, index)
            used = {one.embedder for name, one in config.indexes.items() if name != index}
            await forget_embedders(target, schema, config.source.slot, keep=used)
            return locked

        if await _dropped(target, config, drop, let_go, part, relations=relations, where=f"index {index}"):
            await _take_over(target, config)
        dropped = [Step(f"index {index} in the target", "dropped")]
        if index in config.indexes:
            dropped.append(
                Step(
                    f"[indexes.{index}] in the configuration",
                    "kept",
                    "remove it, or the next `cdcsync run` builds the index anew",
                )
            )
        return [*dropped, *steps]


class _SourcePart:
    """What a command does on the source: a statement about the publication, if any, and what came of it.

    :ivar where: what the statement is about.
    :ivar done: what the source has said to be dropped.
    """

    def __init__(
        self,
        source: WatchedConnection,
        where: str,
        statement: sql.Composed | None,
        tables: Sequence[QualifiedName] = (),
    ) -> None:
        """Hold a statement that locks these tables."""
        self.where = where
        self.done: list[str] = []
        self._source = source
        self._statement = statement
        self._tables = tables

    async def make_room(self) -> None:
        """Wait until the statement gets its locks, and hold none of them: an autovacuum has given way by then.

        :raises SetupError: somebody has held a table, or the publication, for some seconds.
        """
        source, statement = self._source, self._statement
        if statement is None:
            return

        async def rehearse() -> None:
            async with source.transaction(force_rollback=True):
                await source.execute(statement)

        vacuumed = Vacuumed(source, [(one.schema, one.name) for one in self._tables]) if self._tables else None
        with speaking_of("source", where=self.where):
            try:
                await until_locked(rehearse, table=self.where, attempts=ATTEMPTS, vacuumed=vacuumed)
            except LOCKED_OUT as error:
                locks = await exclusive_locks(source, self._tables, modes=PUBLISHING_WAITS) if self._tables else []
                raise SetupError(
                    "another session has held a lock for some seconds that keeps the publication from being changed"
                    + "".join(f": {lock.table} is held by pid {lock.pid} ({lock.session})" for lock in locks[:1])
                    + "; nothing was dropped",
                    where=self.where,
                    hint=f"{locks[0].remedy if locks else 'wait for that session: pg_locks names it'}; then try again",
                ) from error

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Give the source `LET_GO_S` for what it drops in this block, while the target's tables are locked.

        :raises CdcsyncError: it failed. The error says what was dropped.
        """
        try:
            with self._source.cut_after(LET_GO_S):
                yield
        except CdcsyncError as error:
            if self._source.was_cut:
                error.message = f"the server has not answered for {LET_GO_S:g} s"
            error.message += (
                f"; dropped on the source, as far as it has answered: {', '.join(self.done) or 'nothing'};"
                " in the target: nothing"
            )
            again = "then run the command again, which drops what is left"
            error.hint = f"{error.hint}; {again}" if error.hint else again
            raise


async def _dropped(
    target: Connection,
    config: Config,
    drop: Callable[[], Awaitable[T]],
    let_go: Callable[[], Awaitable[None]],
    part: _SourcePart,
    *,
    relations: Relations,
    where: str,
) -> T:
    """Drop something in one transaction, when nobody uses these relations; returns what `drop` does.

    :param let_go: drops what there is on the source, directly before that commits.
    :raises SetupError: others use them for some seconds, or something that is not ours depends on them.
    :raises SourceUnavailable: the source does not do its part in time.
    """

    async def change() -> T:
        await part.make_room()
        async with target.transaction():
            await target.execute(BRIEFLY)
            done = await drop()
            with part.limited():
                await let_go()
            crash_point("drop written")
        crash_point("drop committed")
        return done

    tables = [QualifiedName.parse(one) for one in relations.tables]
    views = [QualifiedName.parse(one) for one in relations.views]
    named = [*tables, *views, QualifiedName(config.target.schema, "pipelines")]
    vacuumed = Vacuumed(target, [(table.schema, table.name) for table in named])
    with own_dependents(), speaking_of("target"):
        return await attempt(target, change, named, where=where, vacuumed=vacuumed)


async def _take_over(target: Connection, config: Config) -> None:
    """Have a worker that was cut off write nothing more before it has examined what there is."""
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        lease = await pipelines.take_over(target)
        crash_point("fence raised to drop")
        await pipelines.end_overtaken(target, lease)


async def _let_go(target: Connection, config: Config, entry: Entry, *, wait_s: float = 0) -> bool:
    """See that no worker follows an index, and that none begins to; returns whether that took the pipeline's lock.

    :param wait_s: how long to wait for a worker that is just ending.
    :raises SetupError: one does.
    """
    pipelines = Pipelines(config.target.schema, config.source.slot)
    if entry.unfollowed_at is not None:
        return False
    if await pipelines.try_lock(target, wait_s=wait_s):
        return True
    holder = await pipelines.holder(target)
    raise SetupError(
        f"a worker follows the index (its session in the target has pid {holder})",
        where=f"index {entry.name}",
        hint=f"remove [indexes.{entry.name}] from its configuration and start it again; then drop the index",
    )


async def _lock(target: Connection, config: Config) -> None:
    """Take the pipeline's lock for as long as the session lasts."""
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        if await pipelines.try_lock(target, wait_s=ENDING_S):
            return
        holder = await pipelines.holder(target)
    raise SetupError(
        "a worker runs for this pipeline" + (f" (its session in the target has pid {holder})" if holder else ""),
        where=f"slot {config.source.slot}",
        hint="stop it, and every standby, then tear down again",
    )


async def _connect_source(
    config: Config, target: Connection, *, application_name: str
) -> tuple[WatchedConnection, AnotherServer | None]:
    """Open a session with the server that the pipeline follows, or with the first host if none of them is that one.

    :returns: with the session, why its server is not the one that was followed.
    """
    try:
        return await connect_followed(config, target, application_name=application_name), None
    except AnotherServer as error:
        return await connect(config.source.dsn, "source", application_name=application_name), error


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


# -- source -----------------------------------------------------------------------------------------------------


async def _of_publication(
    source: Connection, config: Config, publication: Publication | None, belongings: Belongings, sharing: list[str]
) -> Step:
    """Return what is to become of the publication."""
    name = config.source.publication
    what = f"publication {name}"
    if publication is None:
        return Step(what, "absent")
    by_hand = f"if nothing needs it, as its owner: DROP PUBLICATION {quote(name)}"
    ours = {str(table) for index in config.indexes.values() for table in index.followed} | set(belongings.source_tables)
    if sharing:
        return Step(what, "kept", f"the pipeline {', '.join(sharing)} uses it too")
    others, readers = set[str](), list[str]()
    if publication.made:
        with speaking_of("source", where=what):
            ours = await single_names(source, ours)
            others = {str(table) for table in await published_names(source, name)} - set(ours)
            readers = await other_readers(source, config.source.slot)
    if (why := _not_ours(publication, others, readers)) is not None:
        return Step(what, "kept", f"it {why}; {by_hand}")
    return Step(what, "dropped")


def _not_ours(publication: Publication, others: Collection[str], readers: Sequence[str]) -> str | None:
    """Say in a predicate why a publication is not changed; None if it may be.

    :param others: the tables in it that nothing of this pipeline is about.
    :param readers: the other slots that may read it: their streams would fail for good without it.
    """
    if not publication.made:
        return "was not made by a worker"
    if others:
        return f"also sends {', '.join(sorted(others)[:3])}, which is not indexed"
    if readers:
        return f"may be read through {', '.join(readers[:3])}, too"
    return None if publication.owned else "belongs to another role"


async def _of_tables(
    source: Connection,
    config: Config,
    tables: set[str],
    others: set[str],
    elsewhere: AnotherServer | None = None,
) -> tuple[list[Step], list[QualifiedName]]:
    """Return what is to become of an index's tables in the publication, and those that are to leave it.

    :param others: the tables that other indexes need there.
    :param elsewhere: why this is not the server that was followed: no slot is ours there, of whatever name.
    """
    name = config.source.publication
    with speaking_of("source", where=f"publication {name}"):
        publication = await read_publication(source, name)
        listed = {} if publication is None else {str(one): one for one in await published_names(source, name)}
        named = {str(one) for one in await named_tables(source, name)}
        readers = await other_readers(source, config.source.slot if elsewhere is None else None)
    unneeded = listed.keys() & tables - others
    foreign = None if publication is None else _not_ours(publication, listed.keys() - others - unneeded, readers)
    steps, leaving = list[Step](), list[QualifiedName]()
    for table in sorted(tables):
        what = f"{table} in the publication {name}"
        if table not in listed:
            steps.append(Step(what, "absent"))
        elif table in others:
            steps.append(Step(what, "kept", "another index is of the same table"))
        elif foreign is not None or len(listed) == len(unneeded):
            why = "it is the last one there" if len(listed) == 1 else "no table would be left there"
            if foreign is not None:
                why = f"the publication {foreign}"
            if elsewhere is not None:
                why = f"{elsewhere.message}; {why}"
            by_hand = _without(name, [listed[table]]).as_string(source)
            steps.append(Step(what, "kept", f"{why}; if nothing needs it, as its owner: {by_hand}"))
        elif table not in named:
            steps.append(Step(what, "kept", "it is sent with its schema"))
        else:
            leaving.append(listed[table])
            steps.append(Step(what, "dropped"))
    return steps, leaving


def _without(publication: str, tables: Sequence[QualifiedName]) -> sql.Composed:
    """Return the statement that takes tables out of a publication."""
    names = sql.SQL(", ").join(sql.Identifier(one.schema, one.name) for one in tables)
    return sql.SQL("ALTER PUBLICATION {} DROP TABLE {}").format(sql.Identifier(publication), names)
