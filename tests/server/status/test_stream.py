"""The stream as statuses tell it: its slot, its worker, and how far it is behind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from psycopg import pq

from cdcsync.config import Config, HashEmbedder, Source, Target
from cdcsync.demo.cluster import Cluster
from cdcsync.lsn import Lsn
from cdcsync.postgres.sessions import connect
from cdcsync.source.slot import FOLLOWER
from cdcsync.status import stream
from cdcsync.status.stream import FRESH
from cdcsync.target.pipelines import Pipelines
from tests.support.servers import Database
from tests.support.statuses import ARTICLES, Pipeline, problem

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_the_slot_is_as_the_source_sees_it(stopped: Pipeline) -> None:
    slot = (await stopped.status()).slot
    assert slot is not None
    assert (slot.name, slot.active, slot.wal_status) == (stopped.config.source.slot, False, "reserved")
    assert slot.confirmed_flush is not None
    assert slot.retained_bytes is not None
    assert slot.retained_bytes > 0


async def test_a_slot_that_is_gone_is_a_gap(stopped: Pipeline) -> None:
    await stopped.source.execute("SELECT pg_drop_replication_slot(%s)", [stopped.config.source.slot])
    status = await stopped.status()
    assert status.slot is None
    assert problem(status, f"is gone, and with it the changes since {status.checkpoint}")


async def test_a_slot_of_another_database_is_told_with_the_fix_and_is_not_shown_as_ours(
    stopped: Pipeline, make_database: Callable[[], Database]
) -> None:
    await stopped.source.execute("SELECT pg_drop_replication_slot(%s)", [stopped.config.source.slot])
    other = make_database()
    other.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [stopped.config.source.slot])
    status = await stopped.status()
    assert status.slot is None
    told = problem(status, f"belongs to the database {other.name}")
    assert f"SELECT pg_drop_replication_slot('{stopped.config.source.slot}')" in told
    assert 'source.on_gap = "resync"' in told
    assert not [one for one in status.problems if "is gone" in one]


async def test_a_slot_that_others_moved_is_a_gap(stopped: Pipeline) -> None:
    await stopped.target.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/1'")
    assert problem(await stopped.status(), "is ahead of the checkpoint")


async def test_a_slot_beyond_its_limit_is_told_before_and_after_it_is_lost(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(settings={"max_slot_wal_keep_size": "1MB"})
    name = "limited"
    config = Config(
        source=Source(dsn=cluster.dsn(), slot=name),
        target=Target(dsn=cluster.dsn()),
        embedders={"e": HashEmbedder(dimensions=3)},
        indexes={"articles": ARTICLES},
    )
    async with (
        await connect(cluster.dsn(), "source") as source,
        await connect(cluster.dsn(), "target") as target,
    ):
        await target.execute("CREATE EXTENSION vector SCHEMA public")
        pipeline = Pipeline(config, source, target, cluster.dsn())
        await pipeline.set_up()
        await pipeline.begin()
        fine = await pipeline.status()
        for _ in range(4):
            await source.execute("SELECT pg_logical_emit_message(true, 'test', 'fills a segment'), pg_switch_wal()")
        endangered = await pipeline.status()
        await source.execute("CHECKPOINT")
        lost = await pipeline.status()
    for status, wal_status in ((fine, "reserved"), (endangered, "unreserved"), (lost, "lost")):
        assert status.slot is not None
        assert status.slot.wal_status == wal_status
    assert fine.slot is not None
    assert fine.slot.safe_bytes is not None
    assert not [one for one in fine.problems if "max_slot_wal_keep_size" in one]
    assert problem(endangered, "is lost at the source's next checkpoint")
    assert problem(lost, "has lost WAL that the index needs")


async def test_without_the_lock_no_worker_runs(stopped: Pipeline) -> None:
    status = await stopped.status()
    assert (status.worker.name, status.worker.running, status.worker.since) == ("host:42", False, None)
    assert problem(status, "no worker runs for slot")


async def test_the_locks_holder_is_the_worker(stopped: Pipeline) -> None:
    async with stopped.worker():
        status = await stopped.status()
    assert (status.worker.name, status.worker.running) == ("host:42", True)
    assert status.worker.since is not None
    assert status.worker.since < status.read_at
    assert problem(status, "worker host:42 runs and is not reading slot")


async def test_the_lock_of_another_pipeline_is_not_ours(stopped: Pipeline) -> None:
    async with await connect(stopped.dsn, "target") as session:
        assert await Pipelines("cdcsync", "other").try_lock(session)
        assert not (await stopped.status()).worker.running


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("psql", "is read by a process that is not this pipeline's worker"),
        (FOLLOWER, "without this pipeline's lock"),
    ],
    ids=["another program", "a worker"],
)
async def test_a_slot_that_is_read_without_the_lock_is_told(stopped: Pipeline, name: str, told: str) -> None:
    dsn = f"{stopped.dsn} replication=database application_name={name}"
    await stopped.source.execute("CREATE PUBLICATION p")
    walsender = pq.PGconn.connect(dsn.encode())
    try:
        started = walsender.exec_(
            f"START_REPLICATION SLOT {stopped.config.source.slot} LOGICAL 0/0"
            " (proto_version '1', publication_names 'p')".encode()
        )
        assert started.status == pq.ExecStatus.COPY_BOTH
        status = await stopped.status()
    finally:
        walsender.finish()
    assert status.slot is not None
    assert status.slot.active
    assert problem(status, told)
    runs = name == FOLLOWER
    assert any(one.startswith("no worker runs") for one in status.problems) != runs
    assert (status.worker.waits is not None) == runs
    assert status.headline is not None
    assert (status.headline.words == status.worker.waits) == runs


async def test_a_checkpoint_at_the_end_of_the_wal_is_caught_up_without_a_worker(stopped: Pipeline) -> None:
    await stopped.reach_the_end()
    await stopped.age(3600)
    status = await stopped.status()
    assert (status.lag_bytes, status.lag_seconds, status.caught_up) == (0, 0.0, True)


async def test_without_a_worker_the_lag_is_the_time_since_nothing_was_left(stopped: Pipeline) -> None:
    await stopped.age(3600)
    status = await stopped.status()
    assert status.caught_up is False
    assert status.lag_bytes is not None
    assert status.lag_bytes > 0
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 3600


async def test_a_running_workers_word_is_good_for_a_while(stopped: Pipeline) -> None:
    async with stopped.worker():
        said = await stopped.status()
        await stopped.age(FRESH.total_seconds())
        stale = await stopped.status()
    assert (said.lag_seconds, said.caught_up) == (0.0, True)
    assert said.lag_bytes is not None
    assert said.lag_bytes > 0
    assert stale.caught_up is False
    assert stale.lag_seconds is not None
    assert stale.lag_seconds >= FRESH.total_seconds()


async def test_a_word_from_before_the_clock_went_back_says_nothing(stopped: Pipeline) -> None:
    await stopped.target.execute("UPDATE cdcsync.pipelines SET commit_time = now() - interval '1 minute'")
    await stopped.age(-3600)
    async with stopped.worker():
        status = await stopped.status()
    assert status.caught_up is False
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 60


async def test_a_worker_that_has_more_to_apply_is_not_caught_up(stopped: Pipeline) -> None:
    begin = Lsn.parse(str((await stopped.status()).checkpoint))
    await stopped.age(5)
    async with stopped.worker():
        await stopped.checkpoint(Lsn(begin + 1), caught_up=False)
        status = await stopped.status()
    assert status.caught_up is False
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 5


async def test_one_that_never_caught_up_lags_since_its_oldest_index(stopped: Pipeline) -> None:
    await stopped.target.execute("UPDATE cdcsync.pipelines SET caught_up_at = NULL")
    await stopped.target.execute("UPDATE cdcsync.indexes SET created_at = now() - interval '2 h'")
    status = await stopped.status()
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 7200


async def test_a_pipeline_that_has_not_begun_is_not_caught_up(make_stopped: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make_stopped()
    await pipeline.set_up("articles")
    status = await pipeline.status()
    assert (status.checkpoint, status.lag_bytes, status.lag_seconds, status.caught_up) == (None, None, None, False)
    assert status.problems == [f"no worker runs for slot {status.pipeline}: start `cdcsync run`"]


@pytest.mark.parametrize(
    "table", ["articles_backlog", "articles_words", "articles_vectors_1_settled", "articles~2_backlog"]
)
@pytest.mark.parametrize("lasts", [True, False])
async def test_who_holds_a_table_that_is_written_to_is_told_unless_the_lock_comes_and_goes(
    stopped: Pipeline, monkeypatch: pytest.MonkeyPatch, table: str, lasts: bool
) -> None:
    await stopped.target.execute(
        'CREATE TABLE cdcsync."articles~2_backlog" (); INSERT INTO cdcsync.indexes SELECT (jsonb_populate_record(i,'
        " jsonb_build_object('name', 'articles~other', 'stem', 'articles~2', 'generation', 2))).*"
        " FROM cdcsync.indexes AS i"
    )
    monkeypatch.setattr(stream, "LOCKED_S", 0.0)
    async with await connect(stopped.dsn, "target", application_name="index build", autocommit=False) as other:
        lock = f'LOCK TABLE cdcsync."{table}" IN SHARE MODE'.encode()
        await other.execute(lock)

        async def pause(_: float) -> None:
            if not lasts:
                await other.rollback()
                await other.execute(lock)

        monkeypatch.setattr("cdcsync.status.stream.anyio.sleep", pause)
        status = await stopped.status()
    locked = status.indexes["articles"].locked
    assert (locked is not None) == lasts
    if locked is not None:
        assert "is locked by pid" in locked
        assert "(index build, role" in locked
        assert locked in problem(status, "index articles cannot use a table: ")
