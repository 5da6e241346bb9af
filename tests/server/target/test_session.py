"""The apply session: chunks, cursors and checkpoint in one transaction, under lock and fence, through broken links."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import psycopg
import pytest
from psycopg.pq import TransactionStatus

import cdcsync.target.session as session_module
from cdcsync.errors import LeaseLost, RunError, SchemaChanged, SetupError, TargetRewound, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import Applied, ChangeSet
from cdcsync.model.pauses import Pause
from cdcsync.postgres.sessions import Connection
from cdcsync.target.apply import IndexWriter
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.requests.submission import Requests
from cdcsync.target.session import ApplySession, worker_name
from tests.support.expiries import EXPIRIES, expire
from tests.support.indexes import SCHEMA, changes, document, make_spec, register, until, until_blocked, vector_text

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SLOT = "slot"
SPECS = [make_spec(search=None), make_spec(name="notes", key={"id": "text"}, carried={}, search=None)]


class Pipeline:
    """A target that is set up for two indexes, and the sessions opened on it."""

    def __init__(self, target: Database, connection: Connection, stack: contextlib.AsyncExitStack) -> None:
        self.connection = connection
        self._target = target
        self._stack = stack

    def session(self) -> ApplySession:
        session = ApplySession(self._target.dsn, SCHEMA, SLOT)
        self._stack.push_async_callback(session.aclose)
        return session

    async def open(self) -> ApplySession:
        session = self.session()
        assert await session.try_open()
        await session.prepare(SPECS)
        return session

    async def rows(self, statement: str) -> list[tuple[Any, ...]]:
        cursor = await self.connection.execute(statement.encode())
        return await cursor.fetchall()

    async def checkpoint(self) -> Lsn | None:
        state = await Pipelines(SCHEMA, SLOT).read(self.connection)
        assert state is not None
        return state.checkpoint

    async def terminate(self, session: ApplySession) -> None:
        """End the session on the server, as an administrator or a crash would, and wait until it is gone."""
        await self.connection.execute("SELECT pg_terminate_backend(%s, 10000)", [session.connection.info.backend_pid])

    async def broken(self, session: ApplySession) -> None:
        """Break the session so that it knows."""
        await self.terminate(session)
        with pytest.raises(psycopg.OperationalError):
            await session.connection.execute("SELECT 1")


@pytest.fixture
async def pipeline(target: Database, connect_target: Callable[[], Awaitable[Connection]]) -> AsyncIterator[Pipeline]:
    connection = await connect_target()
    async with connection.transaction():
        await create_shared(connection, SCHEMA)
        await Pipelines(SCHEMA, SLOT).ensure(connection, "publication")
        for spec in SPECS:
            await create_index_relations(connection, SCHEMA, spec)
            await register(connection, spec, slot=SLOT)
    async with contextlib.AsyncExitStack() as stack:
        yield Pipeline(target, connection, stack)


async def apply(
    session: ApplySession,
    checkpoint: Lsn | None = None,
    pages: Sequence[PageEnd] = (),
    **of_index: ChangeSet,
) -> dict[str, Applied]:
    return await session.apply(of_index, pages, checkpoint, commit_time=None, caught_up=False)


# -- lock and fence --------------------------------------------------------------------------------------------------


async def test_a_session_is_open_to_one_worker_at_a_time(pipeline: Pipeline) -> None:
    first, second = pipeline.session(), pipeline.session()
    assert await first.try_open()
    assert not await second.try_open()
    assert (await first.state()).fence == 1
    assert (await first.state()).worker == worker_name()

    await first.aclose()

    assert await second.try_open()
    assert (await second.state()).fence == 2


async def test_who_does_not_get_the_lock_leaves_no_session_behind(pipeline: Pipeline) -> None:
    first = await pipeline.open()
    for _ in range(3):
        assert not await pipeline.session().try_open()
    # A session that was closed may still be ending; one that was not would stay for ever.

    async def alone() -> bool:
        found = await pipeline.rows("SELECT pid FROM pg_stat_activity WHERE application_name = 'cdcsync apply slot'")
        return found == [(first.connection.info.backend_pid,)]

    await until(alone)


async def test_a_pipeline_that_was_not_set_up_cannot_be_opened_and_stays_unlocked(pipeline: Pipeline) -> None:
    await pipeline.connection.execute("DELETE FROM cdcsync.indexes; DELETE FROM cdcsync.pipelines")
    session = pipeline.session()
    with pytest.raises(LeaseLost, match="row is gone"):
        await session.try_open()
    await pipeline.connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('slot', 'p')")
    other = pipeline.session()
    # The refused session's end takes the server a moment.
    await until(other.try_open)
    assert (await other.state()).fence == 1


async def test_a_successor_ends_the_first_ones_writing_and_nothing_of_it_stays(pipeline: Pipeline) -> None:
    first = await pipeline.open()
    await apply(first, Lsn(10), articles=changes(document("1", "a")))
    # The lock is gone without the first worker knowing, as after a network partition that the server noticed.
    await first.connection.execute("SELECT pg_advisory_unlock_all()")
    second = await pipeline.open()

    with pytest.raises(LeaseLost):
        await apply(first, Lsn(20), articles=changes(document("2", "b"), deleted=["1"], inline=["b"]))

    assert await pipeline.rows("SELECT id FROM cdcsync.articles_chunks") == [(1,)]
    assert await pipeline.rows("SELECT count(*) FROM cdcsync.articles_vectors_1") == [(0,)]
    assert await pipeline.checkpoint() == 10
    await apply(second, Lsn(30), articles=changes(document("3", "c")))
    with pytest.raises(LeaseLost):
        await apply(first, Lsn(40))
    assert await pipeline.checkpoint() == 30


async def test_a_writer_that_waits_behind_its_successor_writes_nothing(
    pipeline: Pipeline, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    first, second = await pipeline.open(), pipeline.session()
    await first.connection.execute("SELECT pg_advisory_unlock_all()")
    holding = await connect_target()
    lost = []

    async def write() -> None:
        try:
            await apply(first, Lsn(20), articles=changes(document("2", "b"), inline=["b"]))
        except LeaseLost:
            lost.append(True)

    async def taking_over() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdcsync apply slot'"
        return await pipeline.rows(f"{waiting} AND cardinality(pg_blocking_pids(pid)) > 0") == [(1,)]

    async with anyio.create_task_group() as tasks, holding.transaction():
        await holding.execute("SELECT FROM cdcsync.pipelines FOR UPDATE")
        tasks.start_soon(second.try_open)
        await until(taking_over)
        tasks.start_soon(write)
        await until_blocked(pipeline.connection, first.connection)

    assert lost == [True]
    assert await pipeline.rows("SELECT count(*) FROM cdcsync.articles_chunks") == [(0,)]
    assert ((await second.state()).fence, await pipeline.checkpoint()) == (2, None)


# -- the chain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", ["checkpoint = '0/A'", "commits = commits - 1", "fence = 0"])
async def test_a_session_writes_nothing_into_a_target_that_went_back(pipeline: Pipeline, back: str) -> None:
    session = await pipeline.open()
    for position in (Lsn(10), Lsn(20)):
        await apply(session, position)
    await pipeline.rows(f"UPDATE cdcsync.pipelines SET {back} RETURNING 1")

    with pytest.raises(TargetRewound):
        await apply(session, Lsn(30), articles=changes(document("1", "a")))
    assert await pipeline.rows("SELECT FROM cdcsync.articles_chunks") == []
    await pipeline.broken(session)
    with pytest.raises(TargetRewound):
        await session.reopen(SPECS)
    # Another session begins from what there is.
    await until(pipeline.session().try_open)


@pytest.mark.parametrize("happened", [True, False])
async def test_a_commit_whose_answer_was_lost_continues_the_chain_whether_it_happened_or_not(
    pipeline: Pipeline, happened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await pipeline.open()
    await apply(session, Lsn(10))
    commit = Pipelines.commit

    async def end_the_session(self: Pipelines, *arguments: Any, **options: Any) -> Any:
        lease = await commit(self, *arguments, **options)
        if happened:
            await session.connection.execute("COMMIT")
        await pipeline.terminate(session)
        return lease

    monkeypatch.setattr(Pipelines, "commit", end_the_session)
    with pytest.raises(TargetUnavailable):
        await apply(session, Lsn(20), articles=changes(document("1", "a")))
    monkeypatch.undo()
    assert await pipeline.checkpoint() == (20 if happened else 10)

    await session.reopen(SPECS)
    for position in (Lsn(20), Lsn(30)):
        await apply(session, position, articles=changes(document("1", "a", existed=True)))
    assert await pipeline.checkpoint() == 30
    assert await pipeline.rows("SELECT content FROM cdcsync.articles_chunks") == [("a",)]


# -- apply -----------------------------------------------------------------------------------------------------------


async def test_a_batch_commits_its_indexes_its_cursors_and_its_checkpoint_together(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    requests = Requests(SCHEMA)
    first = await requests.add(pipeline.connection, "articles", "initial", rewrite=False, filter_=None)
    second = await requests.add(pipeline.connection, "notes", "resync", rewrite=False, filter_=None)

    applied = await session.apply(
        {
            "articles": changes(document("1", "a"), inline=["a"]),
            "notes": changes(document("x", "b", "c", carried=())),
        },
        [PageEnd(first, "rows", ("1", "tab\t"), 1, False), PageEnd(second, "orphans", None, 2, True)],
        Lsn(10),
        commit_time=datetime(2024, 1, 1, tzinfo=UTC),
        caught_up=True,
    )

    assert {index: one.chunks for index, one in applied.items()} == {"articles": 1, "notes": 2}
    assert await pipeline.rows("SELECT content, embedding::text FROM public.articles_index") == [
        ("a", vector_text("a"))
    ]
    assert await pipeline.rows("SELECT content FROM cdcsync.notes_chunks ORDER BY chunk_no") == [("b",), ("c",)]
    assert await pipeline.rows(
        "SELECT state, phase, cursor, rows_done, finished_at IS NOT NULL FROM cdcsync.backfills ORDER BY id"
    ) == [("requested", "rows", ["1", "tab\t"], 1, False), ("done", "orphans", None, 2, True)]
    state = await session.state()
    assert (state.checkpoint, state.commit_time) == (10, datetime(2024, 1, 1, tzinfo=UTC))
    assert state.caught_up_at is not None


@pytest.mark.parametrize(
    ("type_", "value", "code"),
    [
        ("integer", "not a number", "22P02"),
        ("numeric(3,1)", "100", "22003"),
        ("cdcsync.email", "nobody", "23514"),
        ("text", "long", "54000"),
    ],
)
async def test_a_value_that_the_target_refuses_names_its_index_and_nothing_is_written(
    pipeline: Pipeline, type_: str, value: str, code: str
) -> None:
    await pipeline.connection.execute("CREATE DOMAIN cdcsync.email AS text CHECK (VALUE LIKE '%@%')")
    await pipeline.connection.execute(f"ALTER TABLE cdcsync.articles_chunks ADD refused {type_}".encode())
    await pipeline.connection.execute("CREATE INDEX ON cdcsync.articles_chunks (refused)")
    spec = make_spec(carried={"tenant": "integer", "refused": type_}, search=None)
    session = pipeline.session()
    assert await session.try_open()
    await session.prepare([spec, SPECS[1]])
    # What is too long for a b-tree must be so after compression, too.
    value = secrets.token_hex(10_000) if value == "long" else value
    with pytest.raises(SchemaChanged, match=code) as failed:
        await apply(
            session,
            Lsn(10),
            notes=changes(document("x", "b", carried=())),
            articles=changes(document("1", "a", carried=("1", value))),
        )
    assert failed.value.index == "articles"
    assert failed.value.where == "index articles"
    assert value not in str(failed.value)
    assert await pipeline.rows("SELECT FROM cdcsync.notes_chunks") == []
    assert await pipeline.checkpoint() is None
    # The session is whole: the next batch gets through.
    await apply(session, Lsn(20), notes=changes(document("y", "c", carried=())))
    assert await pipeline.checkpoint() == 20


async def test_an_index_that_pauses_does_so_with_the_batch_that_goes_on_without_it(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    await session.apply(
        {"notes": changes(document("x", "b", carried=()))},
        [],
        Lsn(10),
        paused={"articles": Pause("its key is gone", "put it back")},
        commit_time=None,
        caught_up=False,
    )
    assert await pipeline.rows("SELECT name, state, reason FROM cdcsync.indexes ORDER BY name") == [
        ("articles", "paused", "its key is gone; put it back"),
        ("notes", "live", None),
    ]
    assert await pipeline.rows("SELECT content FROM cdcsync.notes_chunks") == [("b",)]
    assert await pipeline.checkpoint() == 10


async def test_a_partial_transaction_leaves_the_checkpoint_and_it_never_moves_back(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    await session.begin_at(Lsn(10), "system", 1)
    checkpoints = []
    for position in (None, Lsn(30), Lsn(20), None):
        await apply(session, position, articles=changes(document("1", f"text {position}", existed=True)))
        checkpoints.append(await pipeline.checkpoint())
    assert checkpoints == [10, 30, 30, 30]


async def test_a_pipeline_begins_where_it_is_told_also_further_back(pipeline: Pipeline) -> None:
    """It is the one thing that may move the checkpoint back: a slot that was made again, say."""
    session = await pipeline.open()
    for position, timeline in ((Lsn(50), 2), (Lsn(40), 3)):
        await session.begin_at(position, "system", timeline)
        state = await session.state()
        assert (state.checkpoint, state.system_identifier, state.timeline) == (position, "system", timeline)


async def test_a_position_is_forgotten_together_with_the_request_for_resyncs(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    await session.begin_at(Lsn(50), "system", 2)
    await session.forget_position(["articles", "notes"])
    assert await pipeline.checkpoint() is None
    assert await pipeline.rows("SELECT index_name, kind, rewrite, filter FROM cdcsync.backfills ORDER BY id") == [
        ("articles", "resync", False, None),
        ("notes", "resync", False, None),
    ]


async def test_a_resync_that_cannot_be_asked_for_leaves_the_pipeline_where_it_was(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    await session.begin_at(Lsn(50), "system", 2)
    with pytest.raises(SetupError):
        await session.forget_position(["articles", "nosuch"])
    assert await pipeline.checkpoint() == 50
    assert await pipeline.rows("SELECT FROM cdcsync.backfills") == []


async def test_who_was_taken_over_cannot_make_the_pipeline_forget(pipeline: Pipeline) -> None:
    first = await pipeline.open()
    await first.begin_at(Lsn(50), "system", 2)
    await first.connection.execute("SELECT pg_advisory_unlock_all()")
    await pipeline.open()
    with pytest.raises(LeaseLost):
        await first.forget_position(["articles"])
    with pytest.raises(LeaseLost):
        await first.begin_at(Lsn(60), "system", 2)
    assert await pipeline.checkpoint() == 50
    assert await pipeline.rows("SELECT FROM cdcsync.backfills") == []


# -- broken connections ----------------------------------------------------------------------------------------------


async def test_a_session_that_broke_is_opened_again_under_the_same_fence(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    await apply(session, Lsn(10), articles=changes(document("1", "a")))
    await pipeline.terminate(session)

    with pytest.raises(TargetUnavailable):
        await apply(session, Lsn(20), articles=changes(document("2", "b")))
    with pytest.raises(TargetUnavailable, match="not usable"):
        await apply(session, Lsn(20), articles=changes(document("2", "b")))
    await session.reopen(SPECS)

    assert (await session.state()).fence == 1
    assert await session.writer("articles").stored_hashes([("2",)]) == {}
    await apply(session, Lsn(20), articles=changes(document("2", "b")))
    assert await pipeline.rows("SELECT id FROM cdcsync.articles_chunks ORDER BY id") == [(1,), (2,)]
    assert await pipeline.checkpoint() == 20
    assert not await pipeline.session().try_open()


@pytest.mark.parametrize("code", EXPIRIES)
async def test_a_session_that_a_time_limit_ended_is_opened_again_under_the_same_fence(
    pipeline: Pipeline, code: str
) -> None:
    session = await pipeline.open()
    fence = (await session.state()).fence
    await expire(session.connection, code)
    with pytest.raises(TargetUnavailable):
        await session.apply({}, (), Lsn(7), commit_time=None, caught_up=True)
    await session.ensure(SPECS)
    await session.apply({}, (), Lsn(7), commit_time=None, caught_up=True)
    assert ((await session.state()).fence, (await session.state()).checkpoint) == (fence, Lsn(7))


async def test_a_transaction_that_was_left_open_is_never_gone_on_with(pipeline: Pipeline) -> None:
    """As after a cancellation in the middle: what is in it must not commit with the next batch."""
    session = await pipeline.open()
    await session.connection.execute("BEGIN")
    await session.writer("articles").apply(changes(document("1", "left over")))
    assert session.connection.info.transaction_status == TransactionStatus.INTRANS

    with pytest.raises(TargetUnavailable, match="not usable"):
        await apply(session, Lsn(10), articles=changes(document("2", "b")))
    await session.reopen(SPECS)
    await apply(session, Lsn(10), articles=changes(document("2", "b")))

    assert await pipeline.rows("SELECT id FROM cdcsync.articles_chunks") == [(2,)]


async def test_a_session_is_not_opened_again_behind_a_successor(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 0.1)
    first = await pipeline.open()
    await pipeline.broken(first)
    second = await pipeline.open()
    with pytest.raises(LeaseLost, match="taken over"):
        await first.reopen(SPECS)

    # Nor when the successor has come and gone.
    await second.aclose()
    with pytest.raises(LeaseLost, match="taken over"):
        await first.reopen(SPECS)
    # What was refused holds no lock.
    third = pipeline.session()
    await until(third.try_open)
    assert (await third.state()).fence == 3


async def test_a_lock_that_the_server_has_not_freed_yet_is_waited_for(
    pipeline: Pipeline,
    connect_target: Callable[[], Awaitable[Connection]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "OLD_SESSION_S", 0.1)
    session = await pipeline.open()
    await pipeline.broken(session)
    lingering = await connect_target()
    assert await Pipelines(SCHEMA, SLOT).try_lock(lingering)

    with pytest.raises(TargetUnavailable, match="still held"):
        await session.reopen(SPECS)
    await lingering.execute("SELECT pg_advisory_unlock_all()")
    await session.reopen(SPECS)
    await apply(session, Lsn(10))
    assert await pipeline.checkpoint() == 10


async def test_a_pipeline_whose_row_is_gone_says_so(pipeline: Pipeline) -> None:
    session = await pipeline.open()
    await pipeline.connection.execute("DELETE FROM cdcsync.indexes; DELETE FROM cdcsync.pipelines")
    with pytest.raises(RunError, match="row is gone"):
        await session.state()
    with pytest.raises(LeaseLost):
        await apply(session, Lsn(10))


async def test_a_closed_session_may_be_closed_again_and_frees_the_lock(pipeline: Pipeline) -> None:
    async with pipeline.session() as session:
        assert await session.try_open()
    await session.aclose()
    with pytest.raises(TargetUnavailable, match="not usable"):
        await apply(session, Lsn(10))
    again = pipeline.session()
    await until(again.try_open)
    assert (await again.state()).fence == 2


async def test_a_target_that_is_away_is_waited_for() -> None:
    session = ApplySession("postgresql://postgres@127.0.0.1:1/nowhere", SCHEMA, SLOT)
    with pytest.raises(TargetUnavailable):
        await session.try_open()


async def test_a_session_whose_stages_cannot_be_made_is_closed_and_opened_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await pipeline.open()
    await pipeline.broken(session)
    opened = IndexWriter.open
    made = 0

    async def failing(writer: IndexWriter) -> None:
        nonlocal made
        made += 1
        if made == 2:
            raise psycopg.errors.DiskFull("no space left on device")
        await opened(writer)

    monkeypatch.setattr(IndexWriter, "open", failing)
    with pytest.raises(TargetUnavailable):
        await session.reopen(SPECS)
    with pytest.raises(TargetUnavailable):
        await session.apply({}, (), Lsn(5), commit_time=None, caught_up=True)

    await session.reopen(SPECS)
    await session.apply({SPECS[0].name: changes(document("1", "x"))}, (), Lsn(9), commit_time=None, caught_up=True)
    assert await pipeline.checkpoint() == Lsn(9)


async def test_tables_of_before_fingerprints_were_kept_are_brought_up(pipeline: Pipeline) -> None:
    await pipeline.connection.execute(f"ALTER TABLE {SCHEMA}.indexes DROP COLUMN made_of".encode())

    await create_shared(pipeline.connection, SCHEMA)

    assert await pipeline.rows(f"SELECT count(made_of) FROM {SCHEMA}.indexes") == [(0,)]
