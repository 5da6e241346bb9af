"""`verify`: finds every way in which an index can differ, only those, and mends exactly them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests import ROOT
from tests.support.articles import articles
from tests.support.migrations import filled, migrate
from tests.support.servers import Database, Server
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

AWKWARD: dict[str, Any] = {"text": "{title}: 100% {{of}} it's\n\n{body}", "columns": ["tenant", "price", "at"]}

TABLE = """
CREATE TABLE articles (
    region text, id int, tenant int, price numeric, at timestamptz, title text, body text, PRIMARY KEY (region, id)
)
"""


def make(make_pipeline: Callable[[str], Pipeline], source: Database, target: Database, *, worker: str = "") -> Pipeline:
    return make_pipeline(articles(source, target, worker_lines=worker, **AWKWARD))


def fill(pipeline: Pipeline, rows: int) -> None:
    """Rows with what renders awkwardly: NULLs, blanks, quotes, separators, text in several scripts."""
    pipeline.source.execute(TABLE)
    pipeline.source.execute(
        "INSERT INTO articles SELECT (ARRAY['eu', 'a,b', '(x)', 'ÄÖ \"q\"'])[i %% 4 + 1], i, nullif(i %% 5, 0),"
        " i * 1.10, to_timestamp(i * 86400.5), nullif('title ' || i, 'title 3'),"
        " CASE i %% 6 WHEN 0 THEN NULL WHEN 1 THEN ' ' ELSE repeat('Satz \\ ☃ ' || i || '. ', i %% 17) END"
        " FROM generate_series(1, %s) AS i",
        [rows],
    )


def verify(pipeline: Pipeline, *arguments: str, status: int = 0) -> Any:
    done = pipeline.command("verify", "articles", "--json", *arguments)
    assert done.returncode == status, done.stderr + done.stdout
    return json.loads(done.stdout) if done.stdout else done.stderr


@pytest.fixture
def live(make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """A pipeline of 120 rows in two databases, with its worker."""
    pipeline = make(make_pipeline, make_database(), make_database())
    fill(pipeline, 120)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    return pipeline


DAMAGE = {
    "missing": "DELETE FROM cdcsync.articles_chunks WHERE id IN (5, 6)",
    "stale": "UPDATE cdcsync.articles_chunks SET document_hash = '\\x00' WHERE id IN (7, 8, 9)",
    "orphaned": "UPDATE cdcsync.articles_chunks SET id = 1000 + id WHERE id = 10",
    "carried": "UPDATE cdcsync.articles_chunks SET price = price + 1 WHERE id = 11",
    "damaged": "UPDATE cdcsync.articles_chunks SET content = 'tampered' WHERE id = 12",
    "vector_missing": "DELETE FROM cdcsync.articles_vectors_1 WHERE chunk_id IN"
    " (SELECT chunk_id FROM cdcsync.articles_chunks WHERE id = 13)",
    "vector_stale": "UPDATE cdcsync.articles_vectors_1 SET content_hash = '\\x00' WHERE chunk_id IN"
    " (SELECT chunk_id FROM cdcsync.articles_chunks WHERE id = 14)",
    "vector_twice": "INSERT INTO cdcsync.articles_vectors_1_fresh (chunk_id, content_hash, embedding)"
    " SELECT chunk_id, content_hash, embedding FROM cdcsync.articles_vectors_1_settled WHERE chunk_id ="
    " (SELECT min(chunk_id) FROM cdcsync.articles_chunks WHERE id = 15)",
}


@pytest.mark.proof
def test_a_worker_that_dies_while_an_index_is_verified_is_stood_in_for(live: Pipeline) -> None:
    (worker,) = live.processes
    worker.send_signal(signal.SIGSTOP)  # it has the lock, and serves nothing
    live.target.execute(DAMAGE["carried"])
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(verify, live, status=1)
        asked = "SELECT EXISTS (SELECT FROM cdcsync.backfills WHERE kind = 'verify')"
        until(lambda: live.target.execute(asked).fetchone() == (True,), live.tail)
        assert live.stop(worker, signal.SIGKILL) == -signal.SIGKILL
        assert found.result()["differences"] == {"carried": 1}


@pytest.mark.proof
def test_nothing_is_said_of_an_index_that_is_switched_while_it_is_verified(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = filled(make_pipeline, database)
    worker = pipeline.processes[-1]
    worker.send_signal(signal.SIGSTOP)
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET document_hash = '\\x00' WHERE id = 7")
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(pipeline.command, "verify", "articles", "--json", PYTHONPATH=str(ROOT))
        asked = "SELECT EXISTS (SELECT FROM cdcsync.backfills WHERE kind = 'verify')"
        until(lambda: pipeline.target.execute(asked).fetchone() == (True,), pipeline.tail)
        assert migrate(pipeline, "activate")["live"] == 2
        worker.send_signal(signal.SIGCONT)
        done = found.result()
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert "switched to another generation while it was compared" in " ".join(done.stderr.split())


def test_an_index_that_equals_its_source_verifies(live: Pipeline) -> None:
    found = verify(live)
    assert found["equal"] is True
    assert (found["documents"], found["candidates"], found["differences"]) == (120, 0, {})


def test_every_kind_of_difference_is_found_and_mended_and_nothing_else_is_touched(live: Pipeline) -> None:
    for statement in DAMAGE.values():
        live.target.execute(statement)
    untouched = "SELECT chunk_id, applied_at, xmin::text FROM cdcsync.articles_chunks WHERE id BETWEEN 20 AND 120"
    before = live.target.execute(untouched).fetchall()

    found = verify(live, status=1)
    assert found["equal"] is False
    # A document that was moved to another key is missing under its own.
    assert found["differences"] == {
        "missing": 3,
        "stale": 3,
        "orphaned": 1,
        "carried": 1,
        "damaged": 1,
        "vector_missing": 1,
        "vector_stale": 1,
        "vector_twice": 1,
    }
    assert found["vectors_orphaned"] > 0
    assert sorted(int(key[1]) for key in found["examples"]["missing"]) == [5, 6, 10]
    assert [key[1] for key in found["examples"]["orphaned"]] == ["1010"]

    repaired = verify(live, "--repair")
    assert repaired["differences"] == found["differences"]
    assert repaired["repaired"] == 12
    assert repaired["after_repair"]["equal"] is True
    live.in_step()
    assert live.target.execute(untouched).fetchall() == before
    assert verify(live)["equal"] is True


def test_a_last_chunk_that_is_missing_or_one_too_many_is_found_and_mended(live: Pipeline) -> None:
    last = (
        "SELECT c.chunk_id FROM cdcsync.articles_chunks AS c WHERE c.id = %s AND c.chunk_no > 0 AND NOT EXISTS"
        " (SELECT FROM cdcsync.articles_chunks AS n WHERE n.id = c.id AND n.chunk_no > c.chunk_no)"
    )
    assert live.target.execute(f"DELETE FROM cdcsync.articles_chunks WHERE chunk_id IN ({last})", [32]).rowcount == 1
    columns = "region, id, tenant, price, at, chunk_total, content, content_hash, document_hash, commit_lsn"
    added = live.target.execute(
        f"INSERT INTO cdcsync.articles_chunks ({columns}, chunk_no)"
        f" SELECT {columns}, chunk_no + 1 FROM cdcsync.articles_chunks WHERE chunk_id IN ({last})"
        " RETURNING chunk_id, content_hash",
        [33],
    ).fetchall()
    live.target.execute(
        "INSERT INTO cdcsync.articles_vectors_1 SELECT %s, content_hash, embedding FROM cdcsync.articles_vectors_1"
        " WHERE content_hash = %s LIMIT 1",
        added[0],
    )

    found = verify(live, status=1)

    assert (found["differences"], found["vectors_orphaned"]) == ({"damaged": 2}, 1)
    assert sorted(key[1] for key in found["examples"]["damaged"]) == ["32", "33"]
    assert verify(live, "--repair")["after_repair"]["equal"] is True
    live.in_step()


def test_a_place_in_the_backlog_of_a_chunk_that_is_gone_is_found_and_given_up(live: Pipeline) -> None:
    live.target.execute(
        "INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane)"
        " SELECT 1, 10 * max(chunk_id), '\\x00', 0 FROM cdcsync.articles_chunks"
    )

    found = verify(live, status=1)

    assert (found["differences"], found["vectors_orphaned"]) == ({}, 1)
    assert verify(live, "--repair")["after_repair"]["equal"] is True
    assert live.target.execute("SELECT count(*) FROM cdcsync.articles_backlog").fetchone() == (0,)


@pytest.mark.proof
def test_a_repair_does_not_call_equal_what_still_lacks_its_view(live: Pipeline) -> None:
    live.stop(live.processes[-1])
    live.hurry |= {"cdcsync.flows.watch.WATCH_S": 600.0}  # it makes the view again only then
    live.start()
    live.in_step()
    view = str(live.config.indexes["articles"].view_name)
    live.target.execute(f"DROP VIEW {view}")
    live.target.execute(DAMAGE["carried"])

    found = verify(live, "--repair", status=1)

    assert (found["differences"], found["missing"]) == ({"carried": 1}, [view])
    after = found["after_repair"]
    assert (after["differences"], after["missing"], after["equal"]) == ({}, [view], False)
    live.stop(live.processes[-1])
    live.hurry |= {"cdcsync.flows.watch.WATCH_S": 0.5}
    live.start()
    until(lambda: live.command("verify", "articles").returncode == 0, live.tail)


@pytest.mark.proof
def test_without_a_worker_what_was_not_applied_yet_is_no_difference(live: Pipeline) -> None:
    live.stop(live.processes[-1])
    live.source.execute("UPDATE articles SET title = 'changed while nothing ran' WHERE id < 9")
    live.source.execute("DELETE FROM articles WHERE id = 20")
    live.target.execute(DAMAGE["carried"])

    found = verify(live, status=1)

    assert found["differences"] == {"carried": 1}
    assert found["candidates"] >= 10
    assert verify(live, "--repair")["after_repair"]["equal"] is True
    live.compare()


def test_changes_made_while_it_compares_are_no_difference(live: Pipeline) -> None:
    """Some rows change all the time, in both directions; only what is truly wrong is reported."""
    live.target.execute(DAMAGE["stale"])
    script = f"""
import psycopg, itertools
with psycopg.connect({live.config.source.dsn!r}, autocommit=True) as c:
    print("writing", flush=True)
    for n in itertools.count():
        c.execute("SELECT pg_sleep(0.05)")
        c.execute("UPDATE articles SET tenant = %s WHERE id = %s", [n % 1000, 30 + n % 31])
        c.execute("DELETE FROM articles WHERE id = %s", [61 + n % 9])
        c.execute("INSERT INTO articles (region, id, title) VALUES ('new', %s, 't') ON CONFLICT DO NOTHING", [n % 99])
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            for _ in range(3):
                assert verify(live, status=1)["differences"] == {"stale": 3}
        finally:
            writer.kill()
    assert verify(live, "--repair")["after_repair"]["equal"] is True
    live.in_step()


@pytest.mark.proof
def test_a_commit_that_waits_for_a_standby_is_no_difference(
    make_cluster: Callable[..., Any], database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    """The stream delivers such a transaction while no snapshot sees it: the index is ahead of every query."""
    # Only the writer waits for the standby that never comes.
    cluster = make_cluster(settings={"synchronous_standby_names": "nosuch", "synchronous_commit": "local"})
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        source = Database(cluster.dsn(), "postgres", Server(cluster.dsn(), "cluster"))
        pipeline = make(make_pipeline, source, database)
        fill(pipeline, 40)
        pipeline.start()
        pipeline.live()
        pipeline.in_step()
        with psycopg.connect(cluster.dsn(), autocommit=True) as writer:
            writer.execute("SET synchronous_commit = on")
            writer.pgconn.send_query(b"UPDATE articles SET tenant = 4711 WHERE id = 7")
            delivered = "SELECT EXISTS (SELECT FROM cdcsync.articles_chunks WHERE tenant = 4711)"
            until(lambda: pipeline.target.execute(delivered).fetchone() == (True,), "the update in the index")
            assert admin.execute("SELECT count(*) FROM articles WHERE tenant = 4711").fetchone() == (0,)
            pipeline.target.execute(DAMAGE["carried"])

            with ThreadPoolExecutor() as threads:
                found = threads.submit(verify, pipeline, status=1)
                asked = "SELECT EXISTS (SELECT FROM cdcsync.backfills WHERE kind = 'verify' AND state = 'running')"
                until(lambda: pipeline.target.execute(asked).fetchone() == (True,), "the comparison to begin")
                admin.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
                admin.execute("SELECT pg_reload_conf()")
                assert found.result()["differences"] == {"carried": 1}
            while writer.pgconn.get_result() is not None:
                pass
        assert verify(pipeline, "--repair")["after_repair"]["equal"] is True
        pipeline.in_step()


@pytest.mark.proof
def test_the_worker_verifies_on_a_schedule_and_shows_the_outcome(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, make_database(), make_database(), worker="verify_every_s = 0.2")
    fill(pipeline, 50)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()

    def differences() -> str:
        lines = pipeline.get("/metrics")[1].decode().splitlines()
        return next((line for line in lines if line.startswith("cdcsync_verify_differences{")), "")

    until(lambda: differences().endswith(" 0.0"), "a verification without differences")
    pipeline.target.execute(DAMAGE["stale"])

    def found() -> list[dict[str, int]]:
        return [event["differences"] for event in pipeline.events() if event.get("event") == "verified"]

    # The gauge shows three only until the audit that follows the repair.
    until(lambda: {"stale": 3} in found(), lambda: f"one with three: {found()}")
    until(lambda: differences().endswith(" 0.0"), "a repair")


def test_an_emptied_index_is_mended_by_a_repair(live: Pipeline) -> None:
    live.target.execute("TRUNCATE cdcsync.articles_chunks, cdcsync.articles_vectors_1")
    found = verify(live, "--repair")
    assert found["differences"] == {"missing": 120}
    live.in_step()


def test_relations_that_are_missing_in_the_target_are_named(live: Pipeline) -> None:
    live.stop(live.processes[-1])
    live.target.execute("DROP INDEX cdcsync.articles_vectors_1_hnsw")
    found = verify(live, status=1)
    assert (found["missing"], found["differences"]) == (["articles_vectors_1_hnsw"], {})

    live.target.execute("DROP TABLE cdcsync.articles_backlog")
    assert "articles_backlog" in verify(live, status=1)["missing"]
    assert "missing in the target: articles_backlog" in live.command("verify", "articles").stdout

    live.target.execute("DROP TABLE cdcsync.articles_chunks CASCADE")
    said = verify(live, status=2)
    assert "its table cdcsync.articles_chunks is missing in the target" in said

    live.start()
    until(live.in_step_now, live.tail)
    until(lambda: live.command("verify", "articles").returncode == 0, live.tail)


def test_an_unknown_index_is_a_wrong_argument(live: Pipeline) -> None:
    done = live.command("verify", "artikles")
    assert done.returncode == 2
    assert "did you mean articles?" in done.stderr
