"""Failover of the source: a standby is promoted, and the index follows it, or says why it cannot."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support import forked
from tests.support.clusters import cut_off, several
from tests.support.configs import configuration
from tests.support.outages import (
    MakeSimple,
    all_read,
    configure,
    follows_another_server_once_it_is_approved,
    frozen,
    make_target,
    stops_at_the_gap_and_heals,
)
from tests.support.proxies import Proxy
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.failover]

MakePair = Callable[[Mapping[str, str], Mapping[str, str]], tuple[Cluster, Cluster]]

WAITING = {"synchronized_standby_slots": "near"}
"""Of a primary that sends no worker what the standby does not have yet."""

NOT_WAITING = {"synchronized_standby_slots": ""}
"""Of its standby, for when that is promoted."""


@pytest.fixture
def make_pair() -> Iterator[MakePair]:
    """Makes a primary and its standby, with settings of their own; the standby goes first."""
    with ExitStack() as stack:

        def make(primary: Mapping[str, str], standby: Mapping[str, str]) -> tuple[Cluster, Cluster]:
            first = stack.enter_context(Cluster(settings=primary))
            if first.version < 17:
                pytest.skip("slots survive a failover from PostgreSQL 17 on")
            return first, stack.enter_context(first.standby(slot="near", settings=standby))

        yield make


def start_and_synchronise(pipeline: Pipeline, standby: Cluster) -> forked.Process:
    """Start a worker; return once the index is live and equal, and the standby has the slot.

    Does what `sync_replication_slots = on` does every now and then, until that has done it for good.
    """
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    with psycopg.connect(standby.dsn(), autocommit=True) as connection:

        def synced() -> object:
            pipeline.source.execute("SELECT pg_log_standby_snapshot()")
            try:
                connection.execute("SELECT pg_sync_replication_slots()")
            except psycopg.errors.ObjectNotInPrerequisiteState:
                return None  # the slot is ahead of the standby just now, where nothing makes it wait
            return connection.execute(
                "SELECT 1 FROM pg_replication_slots WHERE slot_name = 's' AND synced AND NOT temporary"
            ).fetchone()

        until(synced, "the standby to have the slot")
    return worker


def until_the_standby_has_synchronised_the_slot(pipeline: Pipeline, standby: Cluster) -> None:
    """Wait until a standby with `sync_replication_slots = on` has the slot as it is on the primary."""
    slot = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = 's' AND NOT temporary"
    with psycopg.connect(standby.dsn(), autocommit=True) as connection:

        def synchronised() -> bool:
            connection.execute("SELECT pg_reload_conf()")  # wakes what synchronises slots
            pipeline.source.execute("SELECT pg_log_standby_snapshot()")
            there = pipeline.source.execute(slot).fetchone()
            return connection.execute(slot).fetchone() == there

        until(synchronised, "the standby to have the slot")


def until_a_status_is_sent(pipeline: Pipeline) -> None:
    """Wait until the worker has reported to the source how far it is, after now."""
    (now,) = pipeline.source.execute("SELECT clock_timestamp()").fetchone() or (None,)
    sent = "SELECT reply_time > %s FROM pg_stat_replication WHERE application_name LIKE 'cdcsync%%'"
    until(lambda: pipeline.source.execute(sent, [now]).fetchone() == (True,), pipeline.tail)


def write_until_it_breaks(dsn: str, broken: threading.Event) -> None:
    """Commit change after change until the server is gone."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        try:
            for number in range(1_000_000):
                connection.execute(
                    "INSERT INTO articles VALUES (%s, 1, 'written')"
                    " ON CONFLICT (id) DO UPDATE SET title = 'over ' || excluded.id || articles.title",
                    [number % 300],
                )
                connection.execute("DELETE FROM articles WHERE id = %s", [(number * 7) % 300])
        except psycopg.OperationalError:
            broken.set()


def test_the_index_follows_a_standby_promoted_amid_writes_and_not_the_primary_left_behind(
    make_pair: MakePair, database: Database, make_simple: MakeSimple
) -> None:
    # The worker gets what the standby has, and nothing before.
    primary, standby = make_pair(WAITING, NOT_WAITING)
    pipeline = make_simple(several(primary, standby), database.dsn)
    worker = start_and_synchronise(pipeline, standby)
    broken = threading.Event()
    writer = threading.Thread(target=write_until_it_breaks, args=[primary.dsn(), broken])
    writer.start()
    (checkpoint,) = pipeline.target.execute("SELECT checkpoint FROM cdcsync.pipelines").fetchone() or (None,)
    until(
        lambda: (
            pipeline.target.execute(
                "SELECT checkpoint > %s::pg_lsn + 100000 FROM cdcsync.pipelines", [checkpoint]
            ).fetchone()
            == (True,)
        ),
        pipeline.tail,
    )
    primary.kill()
    writer.join()
    assert broken.is_set()
    standby.promote()

    pipeline.connect_source()
    pipeline.source.execute("UPDATE articles SET title = 'after the failover' WHERE id % 5 = 0")
    pipeline.in_step()
    assert pipeline.event("timeline_followed")["timeline"] == 2
    pipeline.event("compared")
    assert worker.poll() is None
    assert pipeline.stop(worker) == 0

    # Its old slot is still there, and nobody must wait for the standby that went its own way.
    primary.settings["synchronized_standby_slots"] = ""
    primary.start()
    configure(pipeline, dsn=primary.dsn())
    pipeline.connect_source(primary.dsn())
    follows_another_server_once_it_is_approved(pipeline, "left behind by a promotion")


@pytest.mark.proof
def test_a_standby_without_the_last_checkpoint_has_no_acknowledgement_of_it_if_the_index_is_in_the_source(
    make_pair: MakePair, make_simple: MakeSimple
) -> None:
    # The standby has the change but not the commit of its checkpoint, which comes later in the same WAL, and it asks
    # for the slot's position over a connection of its own.
    primary, standby = make_pair(WAITING, NOT_WAITING | {"sync_replication_slots": "on"})
    make_target(primary)
    dsn = several(primary, standby)
    pipeline = make_simple(dsn, dsn.replace("dbname=postgres", "dbname=target"))
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    until_the_standby_has_synchronised_the_slot(pipeline, standby)
    with ExitStack() as stopped, psycopg.connect(standby.dsn(), autocommit=True) as watching:
        with pipeline.target.transaction(), psycopg.connect(primary.dsn("target"), autocommit=True) as admin:
            pipeline.target.execute("SELECT FROM cdcsync.articles_chunks WHERE id = 5 FOR UPDATE")
            pipeline.source.execute("UPDATE articles SET title = 'the standby has this' WHERE id = 5")
            until(lambda: admin.execute(f"SELECT count(*) {BLOCKED}").fetchone() != (0,), pipeline.tail)
            (receiver,) = watching.execute("SELECT pid FROM pg_stat_wal_receiver").fetchone() or (0,)
            stopped.enter_context(frozen(receiver))
        applied = "SELECT content = 'the standby has this' FROM cdcsync.articles_chunks WHERE id = 5"
        until(lambda: pipeline.target.execute(applied).fetchone() == (True,), pipeline.tail)
        until_a_status_is_sent(pipeline)
        # The next connection begins at the same checkpoint, which the standby still lacks.
        pipeline.source.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_replication WHERE application_name LIKE 'cdcsync%'"
        )
        until_a_status_is_sent(pipeline)
        until_the_standby_has_synchronised_the_slot(pipeline, standby)
        primary.kill()
        os.kill(receiver, signal.SIGTERM)  # it ends without reading what was sent to it
    standby.promote()

    pipeline.connect_source()
    pipeline.connect_target()
    pipeline.source.execute("UPDATE articles SET title = 'after the failover' WHERE id % 5 = 1")
    pipeline.in_step()
    assert "was promoted before it had everything" in pipeline.event("target_rewound")["error"]
    assert worker.poll() is None


@pytest.mark.proof
def test_a_promoted_standby_without_the_slot_is_a_gap(
    make_pair: MakePair, database: Database, make_simple: MakeSimple
) -> None:
    primary, standby = make_pair({}, {})
    pipeline = make_simple(several(primary, standby), database.dsn, source_lines="failover = false")
    load(pipeline)
    with psycopg.connect(standby.dsn(), autocommit=True) as watching:
        lsn = pipeline.position()
        until(
            lambda: watching.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [lsn]).fetchone() == (True,),
            "the standby to have everything",
        )
    primary.kill()
    standby.promote()
    pipeline.connect_source()
    pipeline.source.execute("DELETE FROM articles WHERE id % 3 = 0")

    stops_at_the_gap_and_heals(pipeline, "the replication slot is gone")


@pytest.mark.proof
def test_a_promoted_standby_that_lacks_what_is_indexed_is_a_gap(
    make_pair: MakePair, database: Database, make_simple: MakeSimple
) -> None:
    primary, standby = make_pair({}, {})
    pipeline = make_simple(several(primary, standby), database.dsn)
    load(pipeline)
    with psycopg.connect(standby.dsn(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
        connection.execute("SELECT pg_reload_conf()")
        until(
            lambda: connection.execute("SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)").fetchone() == (True,),
            "the standby to be cut off",
        )
    pipeline.source.execute("UPDATE articles SET title = 'nobody else knows this' WHERE id < 5")
    load(pipeline)
    primary.kill()
    standby.promote()
    pipeline.connect_source()

    stops_at_the_gap_and_heals(pipeline, "branched off at")


@pytest.mark.proof
@pytest.mark.parametrize("put_back", [True, False], ids=["and put back", "for good"])
def test_a_promoted_standby_whose_history_is_gone_is_a_gap(
    make_pair: MakePair, database: Database, make_simple: MakeSimple, put_back: bool
) -> None:
    primary, standby = make_pair(WAITING, NOT_WAITING)
    pipeline = make_simple(several(primary, standby), database.dsn)
    worker = start_and_synchronise(pipeline, standby)
    pipeline.stop(worker)
    primary.kill()
    standby.promote()
    pipeline.connect_source()
    pipeline.source.execute("UPDATE articles SET title = 'after the failover' WHERE id % 2 = 0")
    history = standby.data / "pg_wal" / "00000002.history"
    aside = history.rename(standby.data / "aside")
    reason = "does not tell where its timeline 2 left timeline 1"
    if not put_back:
        stops_at_the_gap_and_heals(pipeline, reason)
        return
    assert pipeline.start().wait(timeout=PATIENCE_S) == 1
    said = " ".join(pipeline.tail().split())
    assert reason in said
    assert f"if pg_wal/{history.name} is missing there, put it back" in said
    aside.rename(history)
    pipeline.start()
    pipeline.event("timeline_followed")
    pipeline.in_step()
    assert pipeline.times("resync_requested") == 0


def test_a_worker_waits_for_the_promotion_of_a_standby_that_its_address_leads_to(
    make_pair: MakePair, database: Database, make_simple: MakeSimple
) -> None:
    # The address moves to the standby before that is promoted: what it says of the slot is not a gap.
    primary, standby = make_pair(WAITING, NOT_WAITING)
    with closing(Proxy(primary.port)) as address:
        pipeline = make_simple(f"host=127.0.0.1 port={address.port} user=postgres dbname=postgres", database.dsn)
        worker = start_and_synchronise(pipeline, standby)
        address.move(standby.port)
        primary.kill()
        until(
            lambda: any("is a standby just now" in event.get("error", "") for event in pipeline.events()),
            pipeline.tail,
        )
        standby.promote()
        pipeline.connect_source()
        pipeline.source.execute("UPDATE articles SET title = 'after the failover' WHERE id % 2 = 0")

        pipeline.in_step()
        assert worker.poll() is None
        pipeline.stop(worker)


@pytest.fixture
def make_beside(make_pipeline: Callable[[str], Pipeline], database: Database) -> Callable[[str], Pipeline]:
    """Makes a pipeline of two indexes: `articles`, whose large titles are read again when another column changes, and
    `notes`, whose changes hold all that it needs."""

    def make(dsn: str) -> Pipeline:
        indexes: dict[str, dict[str, object]] = {"articles": {"columns": ["tenant"]}, "notes": {}}
        pipeline = make_pipeline(configuration(dsn, slot="s", target=database.dsn, indexes=indexes))
        pipeline.source.execute("CREATE TABLE notes (id bigint PRIMARY KEY, title text NOT NULL)")
        pipeline.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL)")
        pipeline.source.execute("ALTER TABLE articles ALTER title SET STORAGE EXTERNAL")
        pipeline.source.execute(f"INSERT INTO articles SELECT i, 1, {LARGE.format('old')} FROM generate_series(1, 9) i")
        pipeline.source.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 9) i")
        pipeline.hurry |= {"cdcsync.flows.address.LOOK_S": 0.1, "cdcsync.postgres.followed.STAYS_S": 0.0}
        return pipeline

    return make


LARGE = "repeat('{} ', 900)"
"""A text that an update of another column does not send."""

OURS = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%'"


def test_the_stream_follows_its_address_to_another_primary_although_the_one_before_runs(
    make_pair: MakePair, make_beside: Callable[[str], Pipeline]
) -> None:
    primary, standby = make_pair(WAITING, NOT_WAITING)
    with closing(Proxy(primary.port)) as address:
        pipeline = make_beside(f"host=127.0.0.1 port={address.port} user=postgres dbname=postgres")
        worker = start_and_synchronise(pipeline, standby)
        address.move(standby.port)
        assert "on a standby" in pipeline.event("source_sessions_wait")["error"]
        pipeline.source.execute("UPDATE notes SET title = 'over the stream that is open' WHERE id % 2 = 0")
        pipeline.in_step("notes")
        assert pipeline.times("stream_waits") == 0

        standby.promote()
        pipeline.connect_source()
        pipeline.source.execute("UPDATE articles SET tenant = 2 WHERE id % 2 = 0")
        pipeline.source.execute("UPDATE notes SET title = 'on the new primary' WHERE id % 3 = 0")
        asked = "INSERT INTO cdcsync.backfills (index_name, kind) VALUES (%s, 'replay')"
        for index in ("articles", "notes"):
            pipeline.target.execute(asked, [index])
        pipeline.in_step()
        until(lambda: all_read(pipeline), pipeline.tail)
        assert pipeline.event("timeline_followed")["timeline"] == 2
        with psycopg.connect(primary.dsn(), autocommit=True) as left:
            until(lambda: not left.execute(OURS).fetchall(), lambda: f"{left.execute(OURS).fetchall()} to end")
        assert worker.poll() is None
        assert pipeline.times("index_paused") == 0
        assert pipeline.stop(worker) == 0


@pytest.mark.proof
def test_no_row_is_read_from_a_former_primary_that_is_back_while_the_stream_is_on_its_successor(
    make_pair: MakePair, make_beside: Callable[[str], Pipeline]
) -> None:
    primary, standby = make_pair(WAITING, NOT_WAITING)
    pipeline = make_beside(several(primary, standby))
    worker = start_and_synchronise(pipeline, standby)
    primary.kill()
    standby.promote()
    pipeline.connect_source()
    pipeline.source.execute(f"UPDATE articles SET title = {LARGE.format('new')} WHERE id < 5")
    pipeline.in_step()
    pipeline.event("compared")

    # It takes writes, and is named first. Nobody must wait for the standby that went its own way.
    primary.settings["synchronized_standby_slots"] = ""
    primary.start()
    pipeline.source.execute("UPDATE articles SET tenant = 2 WHERE id < 5")
    pipeline.source.execute("UPDATE notes SET title = 'beside' WHERE id < 5")
    pipeline.in_step()
    assert pipeline.times("streaming") == 2  # on the former primary, and on the present one

    # The stream itself goes past it as well, also while a start finds nothing that is open.
    pipeline.source.execute(
        "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_replication WHERE application_name LIKE 'cdcsync%'"
    )
    pipeline.source.execute("UPDATE articles SET tenant = 3 WHERE id < 5")
    pipeline.in_step()
    assert worker.poll() is None
    assert pipeline.stop(worker) == 0
    worker = pipeline.start()
    pipeline.source.execute("UPDATE articles SET tenant = 4 WHERE id < 5")
    pipeline.in_step()

    # While the present primary is away, the former one is no reason to stop, and takes nothing of its place.
    standby.stop("immediate")
    until(lambda: any("former primary" in it or "left behind" in it for it in waits(pipeline)), pipeline.tail)
    assert worker.poll() is None
    standby.start()
    pipeline.connect_source(standby.dsn())
    pipeline.source.execute("UPDATE articles SET tenant = 5 WHERE id < 5")
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    assert pipeline.times("index_paused") == 0
    with psycopg.connect(primary.dsn(), autocommit=True) as connection:
        assert connection.execute(OURS).fetchall() == []


def waits(pipeline: Pipeline) -> list[str]:
    """Return why the stream waited."""
    return [event["error"] for event in pipeline.events() if event["event"] == "stream_waits"]


@pytest.mark.proof
def test_a_backfill_does_not_wait_for_transactions_that_a_failover_lost(
    make_pair: MakePair, database: Database, make_simple: MakeSimple
) -> None:
    # They were delivered and not applied; on the new primary nobody has their ids yet, and nobody writes.
    primary, standby = make_pair({}, {})
    pipeline = make_simple(several(primary, standby), database.dsn)
    worker = start_and_synchronise(pipeline, standby)
    with pipeline.target.transaction():
        (checkpoint,) = pipeline.target.execute("SELECT checkpoint FROM cdcsync.pipelines FOR UPDATE").fetchone() or (
            "",
        )
        cut_off(standby, after=checkpoint)
        for number in range(50):
            pipeline.source.execute("UPDATE articles SET title = 'lost' WHERE id = %s", [1 + number % 20])
        lost = pipeline.source.execute("SELECT pg_current_wal_insert_lsn()").fetchone() or ()
        sent = "SELECT sent_lsn >= %s::pg_lsn FROM pg_stat_replication WHERE application_name LIKE 'cdcsync%%'"
        until(lambda: pipeline.source.execute(sent, lost).fetchone() == (True,), pipeline.tail)
        # A transaction sees of other sessions what there was when it first looked, so another session looks.
        with psycopg.connect(database.dsn, autocommit=True) as admin:
            until(
                lambda: admin.execute(f"SELECT count(*) {BLOCKED}").fetchone() != (0,),
                "what was delivered to be applied",
            )
            primary.kill()
            # What is being written holds the worker up, and must not arrive.
            until(
                lambda: admin.execute(f"SELECT count(pg_terminate_backend(pid)) {BLOCKED}").fetchone() != (0,),
                pipeline.tail,
            )
        pipeline.event("stream_waits")
    standby.promote()
    pipeline.event("timeline_followed")
    pipeline.target.execute("INSERT INTO cdcsync.backfills (index_name, kind) VALUES ('articles', 'replay')")

    until(
        lambda: (
            pipeline.target.execute("SELECT state FROM cdcsync.backfills ORDER BY id DESC LIMIT 1").fetchone()
            == ("done",)
        ),
        pipeline.tail,
    )
    assert worker.poll() is None
    pipeline.connect_source()
    pipeline.in_step()


@pytest.mark.proof
def test_a_failover_that_loses_a_transaction_that_was_applied_in_part_is_a_gap(
    make_pair: MakePair, database: Database, make_simple: MakeSimple
) -> None:
    # The checkpoint is still before the transaction, so it alone would not tell.
    primary, standby = make_pair({}, {})
    pipeline = make_simple(several(primary, standby), database.dsn, rows=60, worker_lines="batch_rows = 10")
    worker = start_and_synchronise(pipeline, standby)
    with pipeline.target.transaction():
        pipeline.target.execute("SELECT FROM cdcsync.articles_chunks WHERE id = 55 FOR UPDATE")
        cut_off(standby, after=pipeline.position())
        pipeline.source.execute("UPDATE articles SET title = 'never happened'")
        with psycopg.connect(database.dsn, autocommit=True) as admin:
            until(
                lambda: admin.execute(f"SELECT count(*) {BLOCKED}").fetchone() != (0,), "the part with the locked row"
            )
            primary.kill()
            until(
                lambda: admin.execute(f"SELECT count(pg_terminate_backend(pid)) {BLOCKED}").fetchone() != (0,),
                pipeline.tail,
            )
        pipeline.event("stream_waits")
    (parts,) = pipeline.target.execute(
        "SELECT count(*) FROM cdcsync.articles_chunks WHERE content = 'never happened'"
    ).fetchone() or (0,)
    assert 0 < parts < 60
    standby.promote()
    pipeline.connect_source()
    assert worker.wait(timeout=PATIENCE_S) == 1, pipeline.tail()

    stops_at_the_gap_and_heals(pipeline, "of which parts are indexed")


BLOCKED = (
    "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'cdcsync apply%'"
    " AND cardinality(pg_blocking_pids(pid)) > 0"
)
"""The session that a lock of ours keeps from writing."""


def load(pipeline: Pipeline) -> None:
    """Run a worker until the index is live and equal, and stop it."""
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    pipeline.stop(worker)
