"""Statuses as they are read from real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import pytest
from psycopg import pq, sql

from cdcsync.config import Config, HashEmbedder, Index, Source, Target
from cdcsync.demo.cluster import Cluster
from cdcsync.errors import SetupError, TargetUnavailable
from cdcsync.lsn import Lsn
from cdcsync.postgres.sessions import connect
from cdcsync.status import read_status
from cdcsync.status.reading import FRESH
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.requests.submission import Requests
from cdcsync.worker.state import WorkerState
from tests.support.statuses import ARTICLES, Pipeline, begun, pipelines, problem

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def make(database: Database) -> AsyncIterator[Callable[..., Awaitable[Pipeline]]]:
    async with pipelines(database) as made:
        yield made


@pytest.fixture
async def pipeline(make: Callable[..., Awaitable[Pipeline]]) -> Pipeline:
    return await begun(await make())


# -- before and after set-up ------------------------------------------------------------------------------------


async def test_before_the_first_start_everything_is_absent(make: Callable[..., Awaitable[Pipeline]]) -> None:
    status = await (await make()).status()
    assert status.problems == [
        f"schema cdcsync of the target holds no pipeline {status.pipeline}: run `cdcsync run` first"
    ]
    assert (status.checkpoint, status.lag_bytes, status.caught_up, status.slot) == (None, None, None, None)
    assert (status.worker.name, status.worker.running) == (None, False)
    index = status.indexes["articles"]
    assert (index.state, index.reason) == ("absent", "not set up yet: `cdcsync run` does it")
    assert (index.table, index.view, index.model) == ("public.articles", "public.articles_index", None)


async def test_another_pipelines_tables_are_not_ours(make: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make()
    await pipeline.set_up()
    await pipeline.target.execute("UPDATE cdcsync.pipelines SET slot = 'other'")
    assert problem(await pipeline.status(), "run `cdcsync run` first")


async def test_a_pipeline_that_has_not_begun_is_not_caught_up(make: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make()
    await pipeline.set_up("articles")
    status = await pipeline.status()
    assert (status.checkpoint, status.lag_bytes, status.lag_seconds, status.caught_up) == (None, None, None, False)
    assert status.problems == [f"no worker runs for slot {status.pipeline}: start `cdcsync run`"]


async def test_the_last_recall_is_told_for_as_long_as_its_vectors_are_in_use(pipeline: Pipeline) -> None:
    handle = WorkerState(pipeline.config)
    one = "cdcsync_recall", {"index": "articles"}
    assert (await pipeline.status()).indexes["articles"].recall is None
    await pipeline.target.execute(
        "INSERT INTO cdcsync.evaluations VALUES ('articles', 1, 10, 40, true, true, 100, 0.97, 1, 2, 3, 4, now()),"
        " ('articles', 1, 10, 20, false, true, 100, 0.5, 1, 2, 3, 4, now()),"
        " ('articles', 1, 99, 40, true, true, 100, 0.4, 1, 2, 3, 4, now()),"
        " ('articles', 2, 10, 40, true, true, 100, 0.99, 1, 2, 3, 4, now())"
    )
    status = await pipeline.status()
    index = status.indexes["articles"]
    assert index.generation == 1
    assert index.recall is not None
    assert (index.recall.recall, index.recall.k, index.recall.ef_search) == (0.97, 10, 40)
    handle._set_gauges(status)
    assert handle.metrics.registry.get_sample_value(*one) == 0.97

    # An older version's schema has no such table; neither is anything told of vectors that are out of use.
    await pipeline.target.execute("DROP TABLE cdcsync.evaluations")
    status = await pipeline.status()
    assert status.indexes["articles"].recall is None
    handle._set_gauges(status)
    assert handle.metrics.registry.get_sample_value(*one) is None
    await handle.aclose()


async def test_an_index_that_is_new_in_the_configuration_is_absent(make: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make(articles=ARTICLES, notes=Index(table="notes", text="{t}", embedder="e", view="notes_index"))
    await pipeline.set_up("articles")
    status = await pipeline.status()
    assert [index.state for index in status.indexes.values()] == ["live", "absent"]
    assert problem(status, "not set up yet: notes; start the worker again")


async def test_an_index_that_left_the_configuration_is_told(make: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make()
    await pipeline.set_up("articles", "old")
    status = await pipeline.status()
    assert list(status.indexes) == ["articles"]
    assert problem(status, "index old is not in the configuration")


async def test_an_index_of_another_pipeline_is_told(pipeline: Pipeline) -> None:
    await pipeline.target.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('other', 'p')")
    await pipeline.target.execute("UPDATE cdcsync.indexes SET slot = 'other'")
    assert problem(await pipeline.status(), "index articles belongs to the pipeline of slot other")


async def test_an_index_without_its_tables_is_absent(pipeline: Pipeline) -> None:
    await pipeline.target.execute("DROP TABLE cdcsync.articles_backlog")
    status = await pipeline.status()
    assert status.indexes["articles"].state == "absent"
    assert status.indexes["articles"].reason == "tables are missing: articles_backlog"
    assert problem(status, "tables are missing: articles_backlog; `cdcsync run` creates them")


async def test_a_paused_index_says_why(pipeline: Pipeline) -> None:
    await pipeline.target.execute("UPDATE cdcsync.indexes SET state = 'paused', reason = 'column body is gone'")
    status = await pipeline.status()
    assert (status.indexes["articles"].state, status.indexes["articles"].reason) == ("paused", "column body is gone")
    assert problem(status, "index articles is paused: column body is gone")


async def test_an_index_names_its_model(pipeline: Pipeline) -> None:
    index = (await pipeline.status()).indexes["articles"]
    assert (index.state, index.model, index.dimensions) == ("live", "feature hashing", 3)


# -- slot and worker --------------------------------------------------------------------------------------------


async def test_the_slot_is_as_the_source_sees_it(pipeline: Pipeline) -> None:
    slot = (await pipeline.status()).slot
    assert slot is not None
    assert (slot.name, slot.active, slot.wal_status) == (pipeline.config.source.slot, False, "reserved")
    assert slot.confirmed_flush is not None
    assert slot.retained_bytes is not None
    assert slot.retained_bytes > 0


async def test_a_slot_that_is_gone_is_a_gap(pipeline: Pipeline) -> None:
    await pipeline.source.execute("SELECT pg_drop_replication_slot(%s)", [pipeline.config.source.slot])
    status = await pipeline.status()
    assert status.slot is None
    assert problem(status, f"is gone, and with it the changes since {status.checkpoint}")


async def test_a_slot_that_others_moved_is_a_gap(pipeline: Pipeline) -> None:
    await pipeline.target.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/1'")
    assert problem(await pipeline.status(), "is ahead of the checkpoint")


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


async def test_without_the_lock_no_worker_runs(pipeline: Pipeline) -> None:
    status = await pipeline.status()
    assert (status.worker.name, status.worker.running, status.worker.since) == ("host:42", False, None)
    assert problem(status, "no worker runs for slot")


async def test_the_locks_holder_is_the_worker(pipeline: Pipeline) -> None:
    async with pipeline.worker():
        status = await pipeline.status()
    assert (status.worker.name, status.worker.running) == ("host:42", True)
    assert status.worker.since is not None
    assert status.worker.since < status.read_at
    assert problem(status, "worker host:42 runs and is not reading slot")


async def test_the_lock_of_another_pipeline_is_not_ours(pipeline: Pipeline) -> None:
    async with await connect(pipeline.dsn, "target") as session:
        assert await Pipelines("cdcsync", "other").try_lock(session)
        assert not (await pipeline.status()).worker.running


async def test_a_slot_read_by_others_is_told(pipeline: Pipeline) -> None:
    dsn = f"{pipeline.dsn} replication=database"
    await pipeline.source.execute("CREATE PUBLICATION p")
    walsender = pq.PGconn.connect(dsn.encode())
    try:
        started = walsender.exec_(
            f"START_REPLICATION SLOT {pipeline.config.source.slot} LOGICAL 0/0"
            " (proto_version '1', publication_names 'p')".encode()
        )
        assert started.status == pq.ExecStatus.COPY_BOTH
        status = await pipeline.status()
    finally:
        walsender.finish()
    assert status.slot is not None
    assert status.slot.active
    assert problem(status, "is read by a process that is not this pipeline's worker")


# -- lag --------------------------------------------------------------------------------------------------------


async def test_a_checkpoint_at_the_end_of_the_wal_is_caught_up_without_a_worker(pipeline: Pipeline) -> None:
    await pipeline.reach_the_end()
    await pipeline.age(3600)
    status = await pipeline.status()
    assert (status.lag_bytes, status.lag_seconds, status.caught_up) == (0, 0.0, True)


async def test_without_a_worker_the_lag_is_the_time_since_nothing_was_left(pipeline: Pipeline) -> None:
    await pipeline.age(3600)
    status = await pipeline.status()
    assert status.caught_up is False
    assert status.lag_bytes is not None
    assert status.lag_bytes > 0
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 3600


async def test_a_running_workers_word_is_good_for_a_while(pipeline: Pipeline) -> None:
    async with pipeline.worker():
        said = await pipeline.status()
        await pipeline.age(FRESH.total_seconds())
        stale = await pipeline.status()
    assert (said.lag_seconds, said.caught_up) == (0.0, True)
    assert said.lag_bytes is not None
    assert said.lag_bytes > 0
    assert stale.caught_up is False
    assert stale.lag_seconds is not None
    assert stale.lag_seconds >= FRESH.total_seconds()


async def test_a_worker_that_has_more_to_apply_is_not_caught_up(pipeline: Pipeline) -> None:
    begin = Lsn.parse(str((await pipeline.status()).checkpoint))
    await pipeline.age(5)
    async with pipeline.worker():
        await pipeline.checkpoint(Lsn(begin + 1), caught_up=False)
        status = await pipeline.status()
    assert status.caught_up is False
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 5


async def test_one_that_never_caught_up_lags_since_its_oldest_index(pipeline: Pipeline) -> None:
    await pipeline.target.execute("UPDATE cdcsync.pipelines SET caught_up_at = NULL")
    await pipeline.target.execute("UPDATE cdcsync.indexes SET created_at = now() - interval '2 h'")
    status = await pipeline.status()
    assert status.lag_seconds is not None
    assert status.lag_seconds >= 7200


async def test_a_source_that_is_away_leaves_lag_and_slot_unknown(pipeline: Pipeline) -> None:
    without = await read_status(pipeline.config, None, pipeline.target)
    await pipeline.source.close()
    broken = await pipeline.status()
    for status in (without, broken):
        assert (status.lag_bytes, status.lag_seconds, status.caught_up, status.slot) == (None, None, None, None)
        assert problem(status, "the source cannot be reached")
        assert problem(status, "no worker runs")
        assert status.indexes["articles"].state == "live"
        assert status.checkpoint is not None


async def test_a_target_that_is_away_is_an_error(pipeline: Pipeline) -> None:
    await pipeline.target.close()
    with pytest.raises(TargetUnavailable):
        await pipeline.status()


async def test_a_role_that_may_not_read_our_tables_is_told_to_be_granted_that(pipeline: Pipeline) -> None:
    await pipeline.target.execute("SET ROLE pg_read_all_settings")  # on every server, and without rights to our tables
    with pytest.raises(SetupError, match="permission denied") as refused:
        await pipeline.status()
    assert "config roles" in str(refused.value.hint)


# -- figures ----------------------------------------------------------------------------------------------------


async def test_rows_that_no_document_could_be_made_of_are_counted_and_told(pipeline: Pipeline) -> None:
    assert (await pipeline.status()).indexes["articles"].failed_documents == 0
    await pipeline.target.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, commit_lsn)"
        " VALUES ('articles', '{7}', '', '0/1')"
    )
    assert problem(await pipeline.status(), "index articles: 1 row is left out: no document could be made")
    await pipeline.target.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, attempts, commit_lsn)"
        " VALUES ('articles', '{8}', '', 1, '0/1'), ('articles', '{}', '', 50, '0/1')"
    )

    status = await pipeline.status()

    assert status.indexes["articles"].failed_documents == 3  # at least
    said = problem(status, "2 rows are left out, and more than are listed")
    assert said.endswith("see `cdcsync failures articles list`")


async def test_what_the_role_may_not_read_is_left_out_and_told(pipeline: Pipeline) -> None:
    role = f"{pipeline.target.info.dbname}_reader"
    reader = sql.Identifier(role)
    await pipeline.target.execute(sql.SQL("CREATE ROLE {}").format(reader))
    try:
        await pipeline.target.execute(sql.SQL("GRANT USAGE ON SCHEMA cdcsync TO {}").format(reader))
        await pipeline.target.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {}").format(reader))
        await pipeline.target.execute(sql.SQL("REVOKE SELECT ON cdcsync.failed_documents FROM {}").format(reader))
        await pipeline.target.execute(sql.SQL("SET ROLE {}").format(reader))

        status = await pipeline.status()

        assert status.indexes["articles"].failed_documents == 0
        assert problem(status, 'this role may not read "cdcsync"."failed_documents"').endswith(
            'GRANT SELECT ON "cdcsync"."failed_documents"'
        )
    finally:
        await pipeline.target.execute("RESET ROLE")
        await pipeline.target.execute(sql.SQL("DROP OWNED BY {}").format(reader))
        await pipeline.target.execute(sql.SQL("DROP ROLE {}").format(reader))


async def test_a_target_of_before_the_list_of_failed_documents_has_none(pipeline: Pipeline) -> None:
    await pipeline.target.execute("DROP TABLE cdcsync.failed_documents")
    status = await pipeline.status()
    assert (status.indexes["articles"].failed_documents, status.indexes["articles"].state) == (0, "live")


async def test_a_running_backfill_has_rate_and_time_left(pipeline: Pipeline) -> None:
    await Requests("cdcsync").add(pipeline.target, "articles", "initial", rewrite=False, filter_=None)
    await pipeline.target.execute(
        "UPDATE cdcsync.backfills SET state = 'running', rows_done = 250, rows_total = 1000,"
        " started_at = now() - interval '100 s'"
    )
    backfill = (await pipeline.status()).indexes["articles"].backfill
    assert backfill is not None
    assert (backfill.kind, backfill.state, backfill.phase) == ("initial", "running", "rows")
    assert (backfill.rows_done, backfill.rows_total) == (250, 1000)
    assert backfill.rate is not None
    assert backfill.eta_s is not None
    assert 0 < backfill.rate <= 2.5
    assert backfill.eta_s == pytest.approx(750 / backfill.rate, rel=0.05)


async def test_what_is_not_known_of_a_backfill_is_null(pipeline: Pipeline) -> None:
    await Requests("cdcsync").add(pipeline.target, "articles", "replay", rewrite=False, filter_="true")
    requested = (await pipeline.status()).indexes["articles"].backfill
    await pipeline.target.execute(
        "UPDATE cdcsync.backfills SET state = 'running', rows_done = 5, started_at = now() - interval '1 s'"
    )
    running = (await pipeline.status()).indexes["articles"].backfill
    await pipeline.target.execute("UPDATE cdcsync.backfills SET rows_total = 5, phase = 'orphans'")
    searching = (await pipeline.status()).indexes["articles"].backfill
    assert requested is not None
    assert (requested.state, requested.rows_total, requested.rate, requested.eta_s) == ("requested", None, None, None)
    assert running is not None
    assert running.rate is not None
    assert running.eta_s is None
    assert searching is not None
    assert (searching.phase, searching.rate, searching.eta_s) == ("orphans", None, None)


@pytest.mark.parametrize(
    ("states", "shown"),
    [
        (["done", "requested", "running"], 3),
        (["done", "requested", "requested"], 2),
        (["paused", "requested"], 2),
        (["paused", "failed"], 1),
        (["done", "failed", "cancelled"], None),
    ],
)
async def test_of_several_backfills_the_one_at_work_is_shown(
    pipeline: Pipeline, states: list[str], shown: int | None
) -> None:
    for state in states:
        await pipeline.target.execute(
            "INSERT INTO cdcsync.backfills (index_name, kind, state) VALUES ('articles', 'replay', %s)", [state]
        )
    backfill = (await pipeline.status()).indexes["articles"].backfill
    assert (None if backfill is None else backfill.id) == shown


async def test_a_failed_backfill_is_a_problem_until_another_follows(pipeline: Pipeline) -> None:
    await pipeline.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state, error)"
        " VALUES ('articles', 'replay', 'done', NULL), ('articles', 'replay', 'failed', 'no such column')"
    )
    assert problem(await pipeline.status(), "its last replay failed (no such column); `cdcsync replay articles`")
    await Requests("cdcsync").add(pipeline.target, "articles", "replay", rewrite=False, filter_=None)
    assert not [one for one in (await pipeline.status()).problems if "failed" in one]


async def test_reading_writes_nothing_and_leaves_no_transaction(pipeline: Pipeline) -> None:
    for connection in (pipeline.source, pipeline.target):
        await connection.execute("SET default_transaction_read_only = on")
    await pipeline.status()
    for connection in (pipeline.source, pipeline.target):
        assert connection.info.transaction_status.name == "IDLE"
