"""Locks that `teardown` and `drop` meet, and a source that falls silent."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import psycopg
import pytest
from anyio.to_thread import run_sync

from cdcsync.config import Config
from cdcsync.errors import SetupError, SourceUnavailable
from cdcsync.flows.teardown.both_servers import SourcePart
from cdcsync.flows.teardown.one_index import drop_index
from cdcsync.flows.teardown.pipeline import tear_down
from cdcsync.postgres.sessions import connect
from cdcsync.target.belongings import drop_pipeline, drop_relations
from tests.support.proxies import Proxy
from tests.support.servers import Database
from tests.support.teardowns import relations, sent, slots, two_indexes
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

COMMANDS = pytest.mark.parametrize(
    "command", [partial(drop_index, index="notes"), partial(tear_down, purge=True)], ids=["drop", "purge"]
)
EDITED = "publication cdcsync is locked by pid {pid} ("
Command = Callable[[Config], Coroutine[Any, Any, Any]]


def whole(source: Database, target: Database) -> tuple[list[str], list[str], list[tuple[Any, ...]]]:
    """Return the slots, the tables in the publication, and how many rows the index has."""
    return slots(source), sent(source), target.execute("SELECT count(*) FROM notes_index")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("command", "lock", "told"),
    [
        (
            partial(drop_index, index="notes"),
            "LOCK TABLE public.notes IN SHARE UPDATE EXCLUSIVE MODE",
            "public.notes is locked by pid {pid} (",
        ),
        (partial(drop_index, index="notes"), "ALTER PUBLICATION cdcsync ADD TABLE public.other", EDITED),
        (partial(tear_down, purge=True), "ALTER PUBLICATION cdcsync ADD TABLE public.other", EDITED),
        (partial(tear_down, purge=False), "ALTER PUBLICATION cdcsync ADD TABLE public.other", EDITED),
    ],
    ids=["drop: table", "drop: publication", "purge: publication", "teardown: publication"],
)
async def test_who_holds_what_the_source_has_to_lock_is_waited_for_and_named_and_nothing_is_dropped(
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    lock: str,
    told: str,
) -> None:
    source, target = make_database(), make_database()
    pipeline = await run_sync(two_indexes, source, target, make_pipeline)
    source.execute("CREATE TABLE other (id int PRIMARY KEY)")
    monkeypatch.setattr("cdcsync.flows.teardown.both_servers.ATTEMPTS", 2)
    before = whole(source, target)
    async with await connect(source.dsn, "source") as holder:
        async with holder.transaction(force_rollback=True):
            await holder.execute(lock.encode())
            with pytest.raises(SetupError) as refused:
                await command(pipeline.config)
        assert whole(source, target) == before
        # It is waited for: the command that begins while it is held succeeds once it is not.
        monkeypatch.setattr("cdcsync.flows.teardown.both_servers.ATTEMPTS", 60)
        async with anyio.create_task_group() as tasks, holder.transaction(force_rollback=True):
            await holder.execute(lock.encode())
            tasks.start_soon(command, pipeline.config)
            await run_sync(until, lambda: transactions(source, waiting=True), "the command to wait")
        pid = holder.info.backend_pid
    assert told.format(pid=pid) in refused.value.message
    assert "nothing was dropped" in refused.value.message
    assert f"pg_terminate_backend({pid}); then try again" in (refused.value.hint or "")
    assert "notes" not in sent(source)


def transactions(database: Database, *, waiting: bool) -> list[tuple[Any, ...]]:
    """Return when a command of ours began its transactions in a database, or those that wait for a lock."""
    return database.execute(
        "SELECT xact_start FROM pg_stat_activity WHERE application_name IN ('cdcsync drop', 'cdcsync teardown')"
        " AND datname = current_database() AND xact_start IS NOT NULL AND (NOT %s OR wait_event_type = 'Lock')",
        [waiting],
    )


@pytest.mark.anyio
@COMMANDS
async def test_while_a_search_is_waited_for_in_the_target_nothing_is_locked_on_the_source(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], command: Command
) -> None:
    source, target = make_database(), make_database()
    pipeline = await run_sync(two_indexes, source, target, make_pipeline)
    async with (
        await connect(target.dsn, "target") as searcher,
        anyio.create_task_group() as tasks,
        searcher.transaction(),
    ):
        await searcher.execute("SELECT FROM public.notes_index")
        tasks.start_soon(command, pipeline.config)
        there, after = list[tuple[Any, ...]](), [(None,)]
        began = None
        while began != after:  # the same transaction waited in the target before we looked, and after
            began = await run_sync(until, lambda: transactions(target, waiting=True), "the command to wait")
            there = transactions(source, waiting=False)
            after = transactions(target, waiting=True)
    assert there == []
    assert "notes" not in sent(source)


def by_way_of(proxy: Proxy, pipeline: Pipeline, source: Database) -> Config:
    """Return the pipeline's configuration with its source behind a proxy."""
    dsn = psycopg.conninfo.make_conninfo(source.dsn, host="127.0.0.1", port=proxy.port)
    return pipeline.configure(pipeline.path.read_text().replace(source.dsn, dsn))


@pytest.mark.anyio
@COMMANDS
async def test_a_source_that_falls_silent_keeps_searches_waiting_for_a_moment_and_the_next_command_finishes(
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    make_proxy: Callable[[int], Proxy],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
) -> None:
    source, target = make_database(), make_database()
    pipeline = await run_sync(two_indexes, source, target, make_pipeline)
    before = whole(source, target)
    proxy = make_proxy(int(psycopg.conninfo.conninfo_to_dict(source.dsn)["port"] or 0))
    config = by_way_of(proxy, pipeline, source)
    searched: list[Any] = []

    async def search() -> None:
        searched.extend(await run_sync(target.execute, "SELECT count(*) FROM notes_index"))

    with monkeypatch.context() as patched:
        patched.setattr("cdcsync.flows.teardown.both_servers.LET_GO_S", 0.5)
        async with anyio.create_task_group() as tasks:

            async def then_silent(drop: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
                await drop(*arguments)
                proxy.freeze()
                tasks.start_soon(search)

            patched.setattr("cdcsync.flows.teardown.one_index.drop_relations", partial(then_silent, drop_relations))
            patched.setattr("cdcsync.flows.teardown.pipeline.drop_pipeline", partial(then_silent, drop_pipeline))
            with pytest.raises(SourceUnavailable) as refused:
                await command(config)
    assert searched == [(1,)]
    assert whole(source, target) == before
    assert refused.value.message == (
        "the server has not answered for 0.5 s; dropped on the source, as far as it has answered: nothing;"
        " in the target: nothing"
    )
    assert "run the command again" in (refused.value.hint or "")

    proxy.heal()
    await command(config)
    assert "notes" not in sent(source)
    assert not [one for one in relations(target) if "notes_" in one]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("command", "lock", "told"),
    [
        (
            partial(drop_index, index="notes"),
            "LOCK TABLE public.notes IN SHARE UPDATE EXCLUSIVE MODE",
            "public.notes is locked by pid {pid} (",
        ),
        (partial(drop_index, index="notes"), "COMMENT ON PUBLICATION cdcsync IS 'edited'", EDITED),
        (partial(tear_down, purge=True), "COMMENT ON PUBLICATION cdcsync IS 'edited'", EDITED),
        (partial(tear_down, purge=False), "COMMENT ON PUBLICATION cdcsync IS 'edited'", EDITED),
    ],
    ids=["drop: table", "drop: publication", "purge: publication", "teardown: publication"],
)
async def test_a_lock_that_comes_on_the_source_at_the_last_moment_is_waited_for_like_one_from_before(
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    lock: str,
    told: str,
) -> None:
    source, target = make_database(), make_database()
    pipeline = await run_sync(two_indexes, source, target, make_pipeline)
    before = whole(source, target)
    make_room = SourcePart.make_room
    waited: set[tuple[Any, ...]] = set()

    async def then_locked(part: SourcePart) -> None:
        await make_room(part)
        monkeypatch.setattr(SourcePart, "make_room", make_room)
        await holder.execute(lock.encode())

    def waits_again() -> bool:
        waited.update(transactions(source, waiting=True))
        return len(waited) > 1

    async with await connect(source.dsn, "source") as holder:
        monkeypatch.setattr("cdcsync.flows.teardown.both_servers.ATTEMPTS", 2)
        monkeypatch.setattr(SourcePart, "make_room", then_locked)
        async with holder.transaction(force_rollback=True):
            with pytest.raises(SetupError) as refused:
                await command(pipeline.config)
        assert whole(source, target) == before
        assert told.format(pid=holder.info.backend_pid) in refused.value.message

        monkeypatch.setattr("cdcsync.flows.teardown.both_servers.ATTEMPTS", 60)
        monkeypatch.setattr(SourcePart, "make_room", then_locked)
        async with anyio.create_task_group() as tasks, holder.transaction(force_rollback=True):
            tasks.start_soon(command, pipeline.config)
            await run_sync(until, waits_again, "the command to wait for the lock, and to begin again")
            assert transactions(target, waiting=False) == []
            assert whole(source, target) == before
    assert "notes" not in sent(source)


@pytest.mark.anyio
async def test_a_publication_that_is_locked_at_the_last_moment_each_time_leaves_the_slot_where_it_is(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make_database(), make_database()
    pipeline = await run_sync(two_indexes, source, target, make_pipeline)
    before = whole(source, target)
    monkeypatch.setattr("cdcsync.postgres.locking.ATTEMPTS", 1)
    async with await connect(source.dsn, "source") as editor, editor.transaction(force_rollback=True):

        async def then_edited(*arguments: Any) -> None:
            await drop_pipeline(*arguments)
            await editor.execute("COMMENT ON PUBLICATION cdcsync IS 'edited'")

        monkeypatch.setattr("cdcsync.flows.teardown.pipeline.drop_pipeline", then_edited)
        with pytest.raises(SourceUnavailable) as refused:
            await tear_down(pipeline.config, purge=True)
    assert whole(source, target) == before
    assert "another session holds a lock; dropped on the source" in refused.value.message
