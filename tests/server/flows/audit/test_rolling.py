"""The rolling audit: finds and mends what differs by itself, goes on where it was killed, and says what is proven."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
import pytest

from cdcsync.config import QualifiedName
from cdcsync.flows.audit.rolling import BUSY_ROWS_PER_S, ESTIMATED_S, RollingAudit
from cdcsync.metrics import Metrics
from cdcsync.postgres.sessions import Connection
from tests.support.configs import configuration
from tests.support.forked import Process
from tests.support.indexes import SCHEMA, make_spec
from tests.support.migrations import loaded
from tests.support.outages import MakeSimple
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

CHUNKS, VECTORS = "cdcsync.articles_chunks", "cdcsync.articles_vectors_1"
OF = f"chunk_id IN (SELECT chunk_id FROM {CHUNKS} WHERE id"

DAMAGE = {
    "missing": f"DELETE FROM {CHUNKS} WHERE id IN (5, 6)",
    "stale": f"UPDATE {CHUNKS} SET document_hash = '\\x00' WHERE id = 7",
    # With its vector, as it would otherwise be found for that, if the comparison has just looked for orphans.
    "orphaned": f"WITH added AS (INSERT INTO {CHUNKS} (id, tenant, chunk_no, chunk_total, content, content_hash,"
    f" document_hash, commit_lsn) SELECT 1000, tenant, chunk_no, chunk_total, content, content_hash, document_hash,"
    f" commit_lsn FROM {CHUNKS} WHERE id = 8 RETURNING chunk_id, content_hash)"
    f" INSERT INTO {VECTORS} (chunk_id, content_hash, embedding) SELECT added.chunk_id, content_hash, embedding"
    f" FROM added, (SELECT embedding FROM {VECTORS} WHERE {OF} = 8)) AS v",
    "carried": f"UPDATE {CHUNKS} SET tenant = tenant + 1 WHERE id = 9",
    "damaged": f"UPDATE {CHUNKS} SET content = 'tampered' WHERE id = 10",
    "vector_missing": f"DELETE FROM {VECTORS} WHERE {OF} = 11)",
    "vectors_orphaned": f"DELETE FROM {CHUNKS} WHERE id = 12",
}


def proven(pipeline: Pipeline, index: str = "articles") -> datetime | None:
    code, body = pipeline.get("/status")
    at = json.loads(body)["indexes"][index]["proven_equal_at"] if code == 200 else None
    return None if at is None else datetime.fromisoformat(at)


def audited(make_database: Callable[[], Database], make_simple: MakeSimple) -> Pipeline:
    """Return a live pipeline of 60 rows that is compared all the time."""
    source = make_database()
    pipeline = make_simple(
        source.dsn, make_database().dsn, slot=source.name, rows=60, worker_lines="verify_every_s = 0.5"
    )
    pipeline.start()
    pipeline.live()
    return pipeline


def test_what_differs_is_found_counted_by_kind_and_read_again_and_the_index_is_proven_equal(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline = audited(make_database, make_simple)
    first = until(lambda: proven(pipeline), pipeline.tail)
    assert first is not None
    for statement in DAMAGE.values():
        pipeline.target.execute(statement.encode())

    until(pipeline.in_step_now, pipeline.tail)

    def counted() -> set[str]:
        _, body = pipeline.get("/metrics")
        prefix = 'cdcsync_audit_differences_total{index="articles",problem="'
        lines = body.decode().splitlines()
        found = [line for line in lines if line.startswith(prefix) and not line.endswith(" 0.0")]
        return {line.removeprefix(prefix).split('"')[0] for line in found}

    until(lambda: counted() >= DAMAGE.keys(), lambda: f"{counted()} {pipeline.tail()}")
    assert pipeline.event("audit_found")["level"] == "error"
    until(lambda: (proven(pipeline) or first) > first, pipeline.tail)
    _, body = pipeline.get("/status")
    status = json.loads(body)
    until(lambda: not json.loads(pipeline.get("/status")[1])["problems"], pipeline.tail)
    assert status["indexes"]["articles"]["differed_at"] is not None


@pytest.mark.proof
def test_an_index_is_proven_equal_while_another_that_differs_is_being_read(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    both = configuration(database.dsn, worker_lines="verify_every_s = 0.5", indexes={"articles": {}, "notes": {}})
    pipeline = loaded(make_pipeline(both), "articles", "notes", rows=200)
    pipeline.answer("replay", "articles", "--detach", "--max-rows-per-s", "1")
    pipeline.event("backfill_started")
    pipeline.target.execute(DAMAGE["damaged"].encode())  # which that does not repair
    for _ in range(2):
        before = proven(pipeline, "notes")
        until(lambda: proven(pipeline, "notes") != before, pipeline.tail)  # noqa: B023 - called in the loop

    pipeline.target.execute("UPDATE cdcsync.backfills SET max_rows_per_s = NULL")
    pipeline.answer("replay", "notes", "--key", "1")  # the other one gives way, and then reads at that pace
    until(pipeline.in_step_now, pipeline.tail)
    assert pipeline.event("audit_found")["index"] == "articles"


def audited_slowly(make_database: Callable[[], Database], make_simple: MakeSimple) -> tuple[Pipeline, Process]:
    """Return a live pipeline whose audit takes some seconds for all rows, and its worker."""
    source = make_database()
    slowly = "audit_max_rows_per_s = 400\nverify_every_s = 0.5"
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name, rows=3_000, worker_lines=slowly)
    pipeline.hurry = {"cdcsync.flows.audit.rolling.NOTE_S": 0.5}
    worker = pipeline.start()
    pipeline.live()
    return pipeline, worker


@pytest.mark.proof
def test_an_audit_whose_worker_is_killed_goes_on_where_it_was(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline, worker = audited_slowly(make_database, make_simple)

    def place() -> int:
        row = pipeline.target.execute("SELECT cursor[1]::int FROM cdcsync.audits WHERE phase = 'rows'").fetchone()
        return 0 if row is None or row[0] is None else int(row[0])

    until(place, pipeline.tail)
    assert pipeline.stop(worker, signal.SIGKILL) == -signal.SIGKILL
    reached = place()
    assert 0 < reached < 2_999
    # What lies behind the place has been compared, and is again by the next comparison only.
    pipeline.target.execute(f"UPDATE {CHUNKS} SET tenant = 99 WHERE id IN (1, 2999)".encode())
    verified = pipeline.times("verified")
    pipeline.path.write_text(pipeline.path.read_text().replace("= 400", "= 100000"))
    pipeline.start()
    until(lambda: pipeline.times("verified") > verified, pipeline.tail)
    ended = [event for event in pipeline.events() if event["event"] == "verified"][verified]
    assert (ended["documents"], ended["differences"]) == (3_000, {"carried": 1})
    until(pipeline.in_step_now, pipeline.tail)


@pytest.mark.proof
def test_a_text_that_was_given_up_is_not_tried_again_and_the_index_is_proven_equal_beside_it(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline = audited(make_database, make_simple)
    with pipeline.target.transaction():
        pipeline.target.execute(f"DELETE FROM {VECTORS} WHERE {OF} = 11)".encode())
        pipeline.target.execute(
            "INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane, attempts, error)"
            f" SELECT 1, chunk_id, content_hash, 0, 8, 'refused' FROM {CHUNKS} WHERE id = 11".encode()
        )
    given_up = "SELECT attempts, error FROM cdcsync.articles_backlog"

    def verified() -> list[dict[str, object]]:
        ended = [event for event in pipeline.events() if event["event"] == "verified"]
        return [event for event in ended if event["differences"] == {"failed": 1}]

    until(lambda: len(verified()) > 1, pipeline.tail)
    assert {event["level"] for event in verified()} == {"warning"}
    assert not pipeline.times("audit_found")
    assert pipeline.target.execute(given_up).fetchall() == [(8, "refused")]
    first = proven(pipeline)
    until(lambda: (proven(pipeline) or first) != first, pipeline.tail)


@pytest.mark.proof
def test_what_changes_at_every_look_is_left_out_of_the_proof_and_counted_until_it_can_be_judged(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(
        source.dsn, make_database().dsn, slot=source.name, rows=60, worker_lines="verify_every_s = 0.5"
    )
    # As if each look came too late, whatever this machine is at.
    pipeline.hurry = {"cdcsync.flows.backfill.engine.CHECK_ROUNDS": 0, "cdcsync.flows.audit.comparison.LATER_S": 0.01}
    worker = pipeline.start()
    pipeline.live()
    pipeline.target.execute(DAMAGE["carried"].encode())

    def left_out() -> int:
        return int(json.loads(pipeline.get("/status")[1])["indexes"]["articles"]["undecided"])

    until(lambda: left_out() == 1, pipeline.tail)
    assert proven(pipeline) is not None
    assert "but for 1 document that changed" in pipeline.command("status").stdout
    until(lambda: 'cdcsync_undecided_documents{index="articles"} 1.0' in pipeline.metrics(), pipeline.tail)
    last = [event for event in pipeline.events() if event["event"] == "verified"][-1]
    assert (last["equal"], last["undecided"], last["differences"]) == (False, 1, {})
    assert not pipeline.times("audit_found")

    assert pipeline.stop(worker, signal.SIGKILL) == -signal.SIGKILL
    pipeline.hurry = {}
    pipeline.start()
    until(pipeline.in_step_now, pipeline.tail)
    assert pipeline.event("audit_found")["differences"] == {"carried": 1}
    until(lambda: left_out() == 0, pipeline.tail)


@pytest.mark.proof
def test_a_comparison_that_a_load_has_overtaken_begins_anew(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    pipeline, worker = audited_slowly(make_database, make_simple)
    under_way = "SELECT FROM cdcsync.audits WHERE phase = 'rows' AND cursor[1]::int > 0 AND finished_at IS NULL"
    until(lambda: pipeline.target.execute(under_way).fetchone() is not None, pipeline.tail)
    assert pipeline.stop(worker, signal.SIGKILL) == -signal.SIGKILL

    pipeline.source.execute("ALTER TABLE articles ALTER title TYPE varchar(200)")
    verified = pipeline.times("verified")
    pipeline.path.write_text(pipeline.path.read_text().replace("= 400", "= 100000"))
    pipeline.start()
    until(lambda: pipeline.times("verified") > verified, pipeline.tail)

    began_anew = pipeline.target.execute(
        "SELECT min(a.began_at) >= max(b.finished_at) FROM cdcsync.audits AS a, cdcsync.backfills AS b"
        " WHERE b.kind = 'resync' AND b.state = 'done'"
    ).fetchone()
    assert began_anew == (True,)
    ended = [event for event in pipeline.events() if event["event"] == "verified"][verified]
    assert (ended["documents"], ended["differences"]) == (3_000, {})


@pytest.mark.anyio
async def test_beside_changes_the_tables_of_an_index_are_estimated_once_in_many_steps(
    database: Database, source_session: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute("CREATE TABLE notes (id bigint PRIMARY KEY)")
    spec = make_spec(name="notes", key={"source_table": "text", "id": "bigint"})
    members = {QualifiedName("public", name): None for name in ("notes", "gone")}
    spec = msgspec.structs.replace(spec, shape=msgspec.structs.replace(spec.shape, many=True), members=members)
    most = 2 * BUSY_ROWS_PER_S
    audit = RollingAudit(
        *(database.dsn, database.dsn, SCHEMA, [spec], Metrics()),
        most_rows_per_s=most,
        every_s=0,
        busy=lambda: True,
    )
    (one,) = audit._comparisons
    assert await audit._rows_per_s(source_session, one) == BUSY_ROWS_PER_S

    database.execute("UPDATE pg_class SET reltuples = 1e9 WHERE oid = 'notes'::regclass")
    asked: list[object] = []
    execute = source_session.execute

    async def noted(*args: Any, **how: Any) -> Any:
        asked.append(args)
        return await execute(*args, **how)

    monkeypatch.setattr(source_session, "execute", noted)
    for _ in range(3):
        one.restart()
        assert await audit._rows_per_s(source_session, one) == BUSY_ROWS_PER_S
    assert asked == []

    one.estimated_at -= ESTIMATED_S
    assert await audit._rows_per_s(source_session, one) == most
    assert asked
