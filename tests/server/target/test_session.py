"""The apply session: chunks, cursors and checkpoint in one transaction, under lock and fence, through broken links."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import psycopg
import pytest
from psycopg.pq import TransactionStatus

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import IndexFault, LeaseLost, SetupError, TargetRewound, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.batch import PageEnd
from cdcsync.model.pauses import Pause
from cdcsync.postgres import temporary
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.apply import IndexWriter
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.requests.submission import Requests
from tests.support.ages import held_back, use_transactions
from tests.support.indexes import SCHEMA, changes, document, make_spec, until, until_blocked, vector_text
from tests.support.servers import Database
from tests.support.sessions import SPECS, Pipeline, apply

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_successor_ends_the_first_ones_writing_and_nothing_of_it_stays(locked: Pipeline) -> None:
    first = await locked.open()
    await apply(first, Lsn(10), articles=changes(document("1", "a")))
    # The lock is gone without the first worker knowing, as after a network partition that the server noticed.
    await first.connection.execute("SELECT pg_advisory_unlock_all()")
    second = await locked.open()

    with pytest.raises(LeaseLost):
        await apply(first, Lsn(20), articles=changes(document("2", "b"), deleted=["1"], inline=["b"]))

    assert await locked.rows("SELECT id FROM cdcsync.articles_chunks") == [(1,)]
    assert await locked.rows("SELECT count(*) FROM cdcsync.articles_vectors_1") == [(0,)]
    assert await locked.checkpoint() == 10
    await apply(second, Lsn(30), articles=changes(document("3", "c")))
    with pytest.raises(LeaseLost):
        await apply(first, Lsn(40))
    assert await locked.checkpoint() == 30


async def test_its_stages_hold_no_transaction_ids_back(
    locked: Pipeline, target: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await locked.open()
    await apply(session, Lsn(10), articles=changes(document("1", "a")))
    use_transactions(target)
    assert held_back(target)
    monkeypatch.setattr(temporary, "FREEZE_EVERY_S", 0.0)
    await apply(session, Lsn(20))
    assert held_back(target) == {}


async def test_a_writer_that_waits_behind_its_successor_writes_nothing(
    locked: Pipeline, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    first, second = await locked.open(), locked.session()
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
        return await locked.rows(f"{waiting} AND cardinality(pg_blocking_pids(pid)) > 0") == [(1,)]

    async with anyio.create_task_group() as tasks, holding.transaction():
        await holding.execute("SELECT FROM cdcsync.pipelines FOR UPDATE")
        tasks.start_soon(second.try_open)
        await until(taking_over)
        tasks.start_soon(write)
        await until_blocked(locked.connection, first.connection)

    assert lost == [True]
    assert await locked.rows("SELECT count(*) FROM cdcsync.articles_chunks") == [(0,)]
    taken = await second.state()
    assert taken.fence > first._held.fence
    assert taken.checkpoint is None


@pytest.mark.parametrize("back", ["checkpoint = '0/A'", "commits = commits - 1", "fence = 0"])
async def test_a_session_writes_nothing_into_a_target_that_went_back(locked: Pipeline, back: str) -> None:
    session = await locked.open()
    for position in (Lsn(10), Lsn(20)):
        await apply(session, position)
    await locked.rows(f"UPDATE cdcsync.pipelines SET {back} RETURNING 1")

    with pytest.raises(TargetRewound):
        await apply(session, Lsn(30), articles=changes(document("1", "a")))
    assert await locked.rows("SELECT FROM cdcsync.articles_chunks") == []
    await locked.broken(session)
    with pytest.raises(TargetRewound):
        await session.reopen(SPECS)
    # Another session begins from what there is.
    await until(locked.session().try_open)


@pytest.mark.parametrize("happened", [True, False])
async def test_a_commit_whose_answer_was_lost_continues_the_chain_whether_it_happened_or_not(
    locked: Pipeline, happened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await locked.open()
    await apply(session, Lsn(10))
    commit = Pipelines.commit

    async def end_the_session(self: Pipelines, *arguments: Any, **options: Any) -> Any:
        lease = await commit(self, *arguments, **options)
        if happened:
            await session.connection.execute("COMMIT")
        await locked.terminate(session)
        return lease

    monkeypatch.setattr(Pipelines, "commit", end_the_session)
    with pytest.raises(TargetUnavailable):
        await apply(session, Lsn(20), articles=changes(document("1", "a")))
    monkeypatch.undo()
    assert await locked.checkpoint() == (20 if happened else 10)

    await session.reopen(SPECS)
    for position in (Lsn(20), Lsn(30)):
        await apply(session, position, articles=changes(document("1", "a", existed=True)))
    assert await locked.checkpoint() == 30
    assert await locked.rows("SELECT content FROM cdcsync.articles_chunks") == [("a",)]


async def test_a_batch_commits_its_indexes_its_cursors_and_its_checkpoint_together(locked: Pipeline) -> None:
    session = await locked.open()
    requests = Requests(SCHEMA)
    first = await requests.add(locked.connection, "articles", "initial", rewrite=False, filter_=None)
    second = await requests.add(locked.connection, "notes", "resync", rewrite=False, filter_=None)

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
    assert await locked.rows("SELECT content, embedding::text FROM public.articles_index") == [("a", vector_text("a"))]
    assert await locked.rows("SELECT content FROM cdcsync.notes_chunks ORDER BY chunk_no") == [("b",), ("c",)]
    assert await locked.rows(
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
    locked: Pipeline, type_: str, value: str, code: str
) -> None:
    await locked.connection.execute("CREATE DOMAIN cdcsync.email AS text CHECK (VALUE LIKE '%@%')")
    await locked.connection.execute(f"ALTER TABLE cdcsync.articles_chunks ADD refused {type_}".encode())
    await locked.connection.execute("CREATE INDEX ON cdcsync.articles_chunks (refused)")
    spec = make_spec(carried={"tenant": "integer", "refused": type_}, search=None)
    session = locked.session()
    assert await session.try_open()
    await session.prepare([spec, SPECS[1]])
    # What is too long for a b-tree must be so after compression, too.
    value = secrets.token_hex(10_000) if value == "long" else value
    with pytest.raises(IndexFault, match=code) as failed:
        await apply(
            session,
            Lsn(10),
            notes=changes(document("x", "b", carried=())),
            articles=changes(document("1", "a", carried=("1", value))),
        )
    assert failed.value.index == "articles"
    assert failed.value.where == "index articles"
    assert value not in str(failed.value)
    assert await locked.rows("SELECT FROM cdcsync.notes_chunks") == []
    assert await locked.checkpoint() is None
    # The session is whole: the next batch gets through.
    await apply(session, Lsn(20), notes=changes(document("y", "c", carried=())))
    assert await locked.checkpoint() == 20


async def test_an_index_that_pauses_does_so_with_the_batch_that_goes_on_without_it(locked: Pipeline) -> None:
    session = await locked.open()
    await session.apply(
        {"notes": changes(document("x", "b", carried=()))},
        [],
        Lsn(10),
        paused={"articles": Pause("its key is gone", "put it back")},
        commit_time=None,
        caught_up=False,
    )
    assert await locked.rows("SELECT name, state, reason FROM cdcsync.indexes ORDER BY name") == [
        ("articles", "paused", "its key is gone; put it back"),
        ("notes", "live", None),
    ]
    assert await locked.rows("SELECT content FROM cdcsync.notes_chunks") == [("b",)]
    assert await locked.checkpoint() == 10


async def test_a_partial_transaction_leaves_the_checkpoint_and_it_never_moves_back(locked: Pipeline) -> None:
    session = await locked.open()
    await session.begin_at(Lsn(10), "system", 1)
    checkpoints = []
    for position in (None, Lsn(30), Lsn(20), None):
        await apply(session, position, articles=changes(document("1", f"text {position}", existed=True)))
        checkpoints.append(await locked.checkpoint())
    assert checkpoints == [10, 30, 30, 30]


async def test_where_the_wal_ends_is_asked_for_only_if_the_changes_come_from_it(
    locked: Pipeline, target: Database, make_cluster: Callable[..., Cluster]
) -> None:
    session = await locked.open()
    await session.begin_at(Lsn(10), "system", 1)
    found = []
    for dsn in (make_cluster().dsn(), target.dsn):
        async with await connect(dsn, "source", application_name="source") as source:
            session.take_changes_of(source)
        await apply(session, Lsn(20))
        found.append((session.one_wal, session.wal_end is not None))
        # Also over another connection.
        await locked.broken(session)
        await session.reopen(SPECS)
        await apply(session, Lsn(30))
        found.append((session.one_wal, session.wal_end is not None))
    assert found == [(False, False), (False, False), (True, True), (True, True)]


async def test_a_pipeline_begins_where_it_is_told_also_further_back(locked: Pipeline) -> None:
    """It is the one thing that may move the checkpoint back: a slot that was made again, say."""
    session = await locked.open()
    for position, timeline in ((Lsn(50), 2), (Lsn(40), 3)):
        await session.begin_at(position, "system", timeline)
        state = await session.state()
        assert (state.checkpoint, state.system_identifier, state.timeline) == (position, "system", timeline)


async def test_a_position_is_forgotten_together_with_the_request_for_resyncs(locked: Pipeline) -> None:
    session = await locked.open()
    await session.begin_at(Lsn(50), "system", 2)
    await session.forget_position(["articles", "notes"])
    assert await locked.checkpoint() is None
    assert await locked.rows("SELECT index_name, kind, rewrite, filter FROM cdcsync.backfills ORDER BY id") == [
        ("articles", "resync", False, None),
        ("notes", "resync", False, None),
    ]


async def test_a_resync_that_cannot_be_asked_for_leaves_the_pipeline_where_it_was(locked: Pipeline) -> None:
    session = await locked.open()
    await session.begin_at(Lsn(50), "system", 2)
    with pytest.raises(SetupError):
        await session.forget_position(["articles", "nosuch"])
    assert await locked.checkpoint() == 50
    assert await locked.rows("SELECT FROM cdcsync.backfills") == []


async def test_who_was_taken_over_cannot_make_the_pipeline_forget(locked: Pipeline) -> None:
    first = await locked.open()
    await first.begin_at(Lsn(50), "system", 2)
    await first.connection.execute("SELECT pg_advisory_unlock_all()")
    await locked.open()
    with pytest.raises(LeaseLost):
        await first.forget_position(["articles"])
    with pytest.raises(LeaseLost):
        await first.begin_at(Lsn(60), "system", 2)
    assert await locked.checkpoint() == 50
    assert await locked.rows("SELECT FROM cdcsync.backfills") == []


async def test_a_transaction_that_was_left_open_is_never_gone_on_with(locked: Pipeline) -> None:
    """As after a cancellation in the middle: what is in it must not commit with the next batch."""
    session = await locked.open()
    await session.connection.execute("BEGIN")
    await session.writer("articles").apply(changes(document("1", "left over")))
    assert session.connection.info.transaction_status == TransactionStatus.INTRANS

    with pytest.raises(TargetUnavailable, match="not usable"):
        await apply(session, Lsn(10), articles=changes(document("2", "b")))
    await session.reopen(SPECS)
    await apply(session, Lsn(10), articles=changes(document("2", "b")))

    assert await locked.rows("SELECT id FROM cdcsync.articles_chunks") == [(2,)]


async def test_a_session_whose_stages_cannot_be_made_is_closed_and_opened_again(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await locked.open()
    await locked.broken(session)
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
    assert await locked.checkpoint() == Lsn(9)


LOST = {
    "its table": "DROP TABLE cdcsync.articles_chunks CASCADE",
    "the name of its table": "ALTER TABLE cdcsync.articles_chunks RENAME TO elsewhere",
    "a column": "ALTER TABLE cdcsync.articles_chunks DROP COLUMN tenant CASCADE",
    "the schema of the others": "ALTER TABLE cdcsync.articles_chunks SET SCHEMA public",
}


@pytest.mark.parametrize("lost", LOST)
async def test_an_index_that_lost_what_its_stage_is_made_of_keeps_no_other_from_being_written_to(
    locked: Pipeline, lost: str
) -> None:
    session = await locked.open()
    await locked.connection.execute(LOST[lost].encode())
    await locked.broken(session)

    await session.ensure(SPECS)
    await session.open_writers(["notes"])
    await apply(session, Lsn(9), notes=changes(document("1", "x", carried=())))

    for _ in range(2):
        with pytest.raises(IndexFault) as caught:
            await session.open_writers(["articles", "notes"])
        assert caught.value.index == "articles"
    assert await locked.checkpoint() == Lsn(9)


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.InsufficientPrivilege,
        psycopg.errors.LockNotAvailable,
        psycopg.errors.ConfigurationLimitExceeded,
    ],
)
async def test_what_is_wrong_with_an_index_alone_leaves_a_new_session_open(
    locked: Pipeline, monkeypatch: pytest.MonkeyPatch, error: type[psycopg.Error]
) -> None:
    session = await locked.open()
    await locked.broken(session)
    opened = IndexWriter.open

    async def failing(writer: IndexWriter) -> None:
        if writer.spec.name == "articles":
            raise error("not now")
        await opened(writer)

    monkeypatch.setattr(IndexWriter, "open", failing)
    await session.ensure(SPECS)
    await apply(session, Lsn(9), notes=changes(document("1", "x", carried=())))
    monkeypatch.setattr(IndexWriter, "open", opened)
    await session.open_writers(["articles"])
    await apply(session, Lsn(12), articles=changes(document("1", "x")))
    assert await locked.checkpoint() == Lsn(12)


async def test_tables_of_before_fingerprints_were_kept_are_brought_up(locked: Pipeline) -> None:
    await locked.connection.execute(f"ALTER TABLE {SCHEMA}.indexes DROP COLUMN made_of".encode())

    await create_shared(locked.connection, SCHEMA)

    assert await locked.rows(f"SELECT count(made_of) FROM {SCHEMA}.indexes") == [(0,)]
