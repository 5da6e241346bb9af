"""`replay` on the command line, against real servers: with a running worker, and in its place."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.errors import UsageError
from cdcsync.flows.replay import parse_key
from tests.support.articles import TABLE, articles, fill, live_articles
from tests.support.configs import NO_AUDIT, configuration
from tests.support.indexes import make_spec
from tests.support.migrations import loaded
from tests.support.outages import MakeSimple, frozen, make_target
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

COMPOSITE = (
    "CREATE TABLE articles (region text, id int, tenant int, title text NOT NULL, body text, PRIMARY KEY (region, id))"
)


def make(make_pipeline: Callable[[str], Pipeline], source: Database, target: Database | None = None) -> Pipeline:
    return make_pipeline(articles(source, target))


def refused(pipeline: Pipeline, *arguments: str, typed: str = "") -> str:
    """Run a command that is refused with nothing changed and return what it says."""
    before = pipeline.target.execute("SELECT count(*) FROM cdcsync.backfills").fetchone()
    done = pipeline.command(*arguments, answer=typed)
    assert done.returncode == 2, done.stderr + done.stdout
    assert "error:" in done.stderr
    assert "fix:" in done.stderr
    assert pipeline.target.execute("SELECT count(*) FROM cdcsync.backfills").fetchone() == before
    return done.stderr


def damage(pipeline: Pipeline) -> None:
    """Make the index wrong in ways that only reading rows again can mend."""
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET tenant = -1 WHERE id % 3 = 0")
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET document_hash = '\\x00' WHERE id % 7 = 0")
    pipeline.target.execute("DELETE FROM cdcsync.articles_chunks WHERE id % 11 = 0")


@pytest.fixture
def live(make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """A pipeline of 100 rows in two databases, with its worker."""
    return live_articles(make(make_pipeline, make_database(), make_database()))


def test_a_replay_of_all_rows_mends_what_differs_while_the_worker_runs(live: Pipeline) -> None:
    damage(live)
    done = live.answer("replay", "articles")
    assert (done["state"], done["rows"]) == ("done", 100)
    live.in_step()


def test_only_the_rows_of_a_condition_are_read_again(live: Pipeline) -> None:
    live.target.execute("UPDATE cdcsync.articles_chunks SET tenant = -1")
    done = live.answer("replay", "articles", "--where", "tenant = 2 AND title LIKE '%7'")
    assert done["rows"] == 10
    left = live.target.execute("SELECT array_agg(DISTINCT id ORDER BY id) FROM public.articles_index WHERE tenant = 2")
    assert left.fetchone() == ([7, 17, 27, 37, 47, 57, 67, 77, 87, 97],)


def test_keys_come_from_the_command_line_and_from_standard_input(live: Pipeline) -> None:
    live.target.execute("UPDATE cdcsync.articles_chunks SET tenant = -1")
    done = live.answer("replay", "articles", "--key", "007", "--key", "-", answer="12\n13\n\n12\n")
    assert done["rows"] == 3
    left = live.target.execute("SELECT array_agg(DISTINCT id ORDER BY id) FROM public.articles_index WHERE tenant >= 0")
    assert left.fetchone() == ([7, 12, 13],)
    until(lambda: live.target.execute("SELECT count(*) = 0 FROM cdcsync.backfill_keys").fetchone() == (True,), "keys")


def test_a_key_that_the_source_does_not_have_leaves_the_index(live: Pipeline) -> None:
    live.target.execute(
        "INSERT INTO cdcsync.articles_chunks (id, chunk_no, content, content_hash, document_hash, commit_lsn)"
        " VALUES (999, 0, 'x', '\\x00', '\\x00', '0/0')"
    )
    live.answer("replay", "articles", "--key", "999")
    live.in_step()


def test_keys_are_found_however_they_are_written(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, make_database(), make_database())
    pipeline.source.execute(TABLE.replace("bigint", "numeric"))
    pipeline.source.execute(
        "INSERT INTO articles SELECT x, 1, 'title', 'body' FROM unnest('{1.00,2.0,3.0}'::numeric[]) x"
    )
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET id = 7.0 WHERE id = 1")
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET id = 2.00, document_hash = '\\x00' WHERE id = 2")
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET id = 3.00 WHERE id = 3")

    pipeline.answer("replay", "articles", *(f"--key={key}" for key in ("1.00", "1", "2", "3", "7", "8")))

    pipeline.in_step()
    held = pipeline.target.execute("SELECT array_agg(id::text ORDER BY id) FROM public.articles_index")
    assert held.fetchone() == (["1.00", "2.0", "3.0"],)


@pytest.mark.proof
def test_force_embed_makes_vectors_again_of_what_it_touches_and_of_nothing_else(live: Pipeline) -> None:
    live.target.execute("UPDATE cdcsync.articles_vectors_1 SET embedding = array_fill(1.0, '{16}')::vector")
    live.answer("replay", "articles", "--where", "id <= 50")
    wrong = "SELECT count(DISTINCT id) FROM public.articles_index WHERE embedding = array_fill(1.0, '{16}')::vector"
    assert live.target.execute(wrong).fetchone() == (100,)

    live.answer("replay", "articles", "--where", "id <= 50", "--force-embed")

    until(lambda: live.target.execute(wrong).fetchone() == (50,), "the vectors of half the rows")
    live.answer("replay", "articles", "--force-embed")
    live.in_step()


@pytest.mark.proof
def test_without_a_worker_the_command_takes_its_place_until_all_vectors_are_there(live: Pipeline) -> None:
    live.stop(live.processes[-1])
    damage(live)
    live.source.execute("UPDATE articles SET title = 'changed while nothing ran' WHERE id = 5")
    live.source.execute("DELETE FROM articles WHERE id = 6")
    done = live.answer("replay", "articles", "--force-embed")
    assert done["state"] == "done"
    live.compare()
    worker = live.start()
    live.in_step()
    assert live.stop(worker) == 0


def test_large_rows_are_read_a_few_at_a_time(live: Pipeline) -> None:
    # Blanks at the end are part of a row and of no chunk.
    live.source.execute("UPDATE articles SET body = repeat(' ', 1300000) WHERE id BETWEEN 41 AND 50")
    live.in_step()
    for arguments in ([], ["--key", "-"]):
        seen = len(live.events())
        done = live.answer("replay", "articles", *arguments, answer="\n".join(map(str, range(1, 101))))
        assert done["rows"] == 100
        until(partial(few_at_a_time, live, seen), "the large rows in pages of three at most")
    live.compare()


def few_at_a_time(pipeline: Pipeline, seen: int) -> bool:
    """Say whether the ten large rows were applied by three at most, since so many events, and all pages are told of."""
    applied = [int(event["rows"]) for event in pipeline.events()[seen:] if event.get("event") == "batch_applied"]
    return sum(applied) >= 100 and sum(rows <= 3 for rows in applied) >= 4


@pytest.mark.proof
def test_the_progress_of_a_resync_goes_on_while_it_looks_for_rows_that_are_gone(live: Pipeline) -> None:
    live.target.execute(
        "INSERT INTO cdcsync.articles_chunks"
        " (id, chunk_no, chunk_total, content, content_hash, document_hash, commit_lsn)"
        " SELECT 1000 + i, 0, 1, 'x', '\\x00', '\\x00', '0/0' FROM generate_series(1, 30) AS i"
    )
    row = live.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind) VALUES ('articles', 'resync') RETURNING id"
    ).fetchone()
    seen: list[int] = []

    def done() -> bool:
        state, rows = live.target.execute(
            "SELECT state, rows_done FROM cdcsync.backfills WHERE id = %s", row
        ).fetchone() or ("", 0)
        seen.append(rows)
        return state == "done"

    until(done, "the resync")
    assert seen == sorted(seen)
    assert seen[-1] == 130
    live.in_step()


def test_requests_are_queued_paused_resumed_and_cancelled(live: Pipeline) -> None:
    live.target.execute("UPDATE cdcsync.articles_chunks SET tenant = -1")
    first = live.answer("replay", "articles", "--detach", "--max-rows-per-s", "1")["request"]
    second = live.answer("replay", "articles", "--detach", "--key", "100")["request"]
    states = "SELECT array_agg(state ORDER BY id) FROM cdcsync.backfills WHERE id >= %s"
    until(lambda: live.target.execute(states, [first]).fetchone() == (["running", "requested"],), "the first to begin")

    paused = live.answer("replay", "articles", "--pause")
    assert paused == {"index": "articles", "action": "pause", "requests": [first, second], "kept": []}
    assert live.answer("replay", "articles", "--resume")["requests"] == [first, second]
    assert live.answer("replay", "articles", "--cancel")["requests"] == [first, second]
    assert "nothing to cancel" in refused(live, "replay", "articles", "--cancel")

    done = live.answer("replay", "articles", "--where", "id <= 10")
    assert done["state"] == "done"
    assert live.target.execute(states, [first]).fetchone() == (["cancelled", "cancelled", "done"],)


def test_a_command_that_is_killed_as_it_asks_for_something_can_be_typed_again_and_the_other_index_goes_on(
    both: Pipeline,
) -> None:
    both.target.execute("UPDATE cdcsync.articles_chunks SET document_hash = '\\x00' WHERE id % 7 = 0")
    asked = []
    for point in ("replay asked for", "request for a replay committed"):
        died = both.command("replay", "articles", "--detach", "--max-rows-per-s", "1", CDCSYNC_CRASH_AT=point)
        assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
        asked.append(both.target.execute("SELECT state FROM cdcsync.backfills WHERE kind = 'replay'").fetchall())
    states = []
    for action, wanted in (("--pause", "paused"), ("--cancel", "cancelled")):
        for point in ("requests changed", "changed requests committed"):
            died = both.command("replay", "articles", action, CDCSYNC_CRASH_AT=point)
            assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
            found = both.target.execute("SELECT state FROM cdcsync.backfills WHERE kind = 'replay'").fetchone()
            states.append(found == (wanted,))
    again = refused(both, "replay", "articles", "--cancel")
    done = both.answer("replay", "articles")

    assert [len(requests) for requests in asked] == [0, 1]
    assert states == [False, True, False, True]
    assert "there is nothing to cancel" in again
    assert done["state"] == "done"
    both.source.execute("UPDATE notes SET title = title || ', too'")
    both.in_step()


def test_a_command_about_failures_that_is_killed_can_be_typed_again_and_the_other_index_keeps_its_own(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    short = {"chunking": {"max_tokens": 8, "overlap_tokens": 0, "max_chunks": 3}}
    indexes: dict[str, dict[str, Any]] = {"articles": short, "notes": short}
    both = make_pipeline(configuration(database.dsn, worker_lines=NO_AUDIT, indexes=indexes))
    loaded(both, "articles", "notes", rows=20)
    for index in indexes:
        both.source.execute(f"UPDATE {index} SET title = repeat('long ', 60) WHERE id = 8".encode())
    both.in_step()
    refuse(both)
    left = []
    for action, point in (
        ("retry", "texts to be tried again"),
        ("discard", "texts discarded"),
        ("discard", "discarded texts committed"),
        ("discard", "failed documents forgotten"),
    ):
        died = both.command("failures", "articles", action, CDCSYNC_CRASH_AT=point)
        assert died.returncode == -signal.SIGKILL, died.stderr + died.stdout
        kinds = [one["kind"] for one in both.answer("failures", "articles", "list")]
        left.append((kinds.count("text"), kinds.count("document")))
        if action == "retry":
            again = both.answer("failures", "articles", "retry")
            assert (again["retry"], again["documents"]["rows"], again["documents"]["failed"]) == (1, 1, 1)
            both.in_step()
            refuse(both)
    assert both.answer("failures", "articles", "discard") == {"discard": 0}

    assert left == [(0, 1), (1, 1), (0, 1), (0, 0)]
    assert [one["kind"] for one in both.answer("failures", "notes", "list")] == ["document"]
    both.answer("failures", "articles", "retry", "--discarded")
    for index in indexes:
        both.source.execute(f"UPDATE {index} SET title = 'short' WHERE id = 8".encode())
    both.in_step()


def refuse(pipeline: Pipeline) -> None:
    """Have a text wait for an operator, as if an embedder had refused it."""
    pipeline.target.execute(
        "INSERT INTO cdcsync.articles_backlog (generation, chunk_id, content_hash, lane, attempts, error)"
        " SELECT 1, chunk_id, content_hash, 0, 8, 'refused' FROM cdcsync.articles_chunks WHERE id = 7"
    )


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("kind", ["related", "compare"])
def test_a_request_that_the_index_is_owed_is_not_cancelled_with_the_others(live: Pipeline, kind: str) -> None:
    (owed,) = live.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state) VALUES ('articles', %s, 'paused') RETURNING id", [kind]
    ).fetchone() or (0,)
    assert f"request {owed} cannot be cancelled" in refused(live, "replay", "articles", "--cancel")

    other = live.answer("replay", "articles", "--detach", "--max-rows-per-s", "1")["request"]
    answer = live.answer("replay", "articles", "--cancel")

    assert (answer["requests"], answer["kept"]) == ([other], [owed])
    assert live.answer("replay", "articles", "--resume")["requests"] == [owed]
    until(
        lambda: (
            live.target.execute("SELECT state FROM cdcsync.backfills WHERE id = %s", [owed]).fetchone() == ("done",)
        ),
        "the request that was kept",
    )


def test_a_paused_request_goes_on_where_it_was(live: Pipeline) -> None:
    request = live.answer("replay", "articles", "--detach", "--max-rows-per-s", "1")["request"]
    how_far = "SELECT rows_done, state FROM cdcsync.backfills WHERE id = %s"
    until(lambda: (live.target.execute(how_far, [request]).fetchone() or (0,))[0] >= 2, "a first page")
    live.answer("replay", "articles", "--pause")
    live.event("backfill_stopped")
    done, state = live.target.execute(how_far, [request]).fetchone() or (0, "")
    assert state == "paused"
    assert done < 100
    live.target.execute("UPDATE cdcsync.backfills SET max_rows_per_s = NULL")

    live.answer("replay", "articles", "--resume")

    until(lambda: live.target.execute(how_far, [request]).fetchone() == (100, "done"), "the rest")
    begun = [event for event in live.events() if event.get("backfill") == request and "resumed_at" in event]
    assert [event["resumed_at"] for event in begun] == [0, done]


@pytest.fixture
def both(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """A worker with two indexes that are loaded."""
    indexes: dict[str, dict[str, Any]] = {"articles": {}, "notes": {}}
    pipeline = make_pipeline(configuration(database.dsn, worker_lines=NO_AUDIT, indexes=indexes))
    loaded(pipeline, "articles", "notes", rows=300)
    return pipeline


@pytest.mark.proof
def test_a_replay_gives_way_to_single_documents_of_another_index_and_resumes_after_them(both: Pipeline) -> None:
    slow = both.answer("replay", "articles", "--detach", "--max-rows-per-s", "1")["request"]
    how_far = "SELECT rows_done, state FROM cdcsync.backfills WHERE id = %s"
    until(lambda: (both.target.execute(how_far, [slow]).fetchone() or (0,))[0] >= 2, "a first page")

    both.target.execute("UPDATE cdcsync.notes_chunks SET document_hash = '\\x00' WHERE id = 7")
    assert both.answer("verify", "notes", "--repair", status=0)["repaired"] == 1
    done, state = both.target.execute(how_far, [slow]).fetchone() or (0, "")
    assert (state, done < 300) == ("running", True)

    both.target.execute("UPDATE cdcsync.backfills SET max_rows_per_s = NULL")
    assert both.answer("replay", "notes", "--key", "8")["rows"] == 1
    until(lambda: both.target.execute(how_far, [slow]).fetchone() == (300, "done"), both.tail)
    begun = [event for event in both.events() if event.get("backfill") == slow and "resumed_at" in event]
    places = [event["resumed_at"] for event in begun]
    assert places[0] == 0
    assert places == sorted(set(places))


@pytest.mark.proof
def test_no_stream_of_short_requests_of_another_index_holds_a_replay_up(both: Pipeline) -> None:
    with both.target.transaction():
        both.target.execute("INSERT INTO cdcsync.backfills (index_name, kind) VALUES ('articles', 'replay')")
        both.target.execute(
            "INSERT INTO cdcsync.backfills (index_name, kind, filter, owed)"
            " SELECT 'notes', 'replay', 'id = ' || i, true FROM generate_series(1, 100) AS i"
        )
    kinds = "SELECT index_name, count(*) FROM cdcsync.backfills WHERE kind = 'replay' AND state = 'done' GROUP BY 1"
    until(lambda: dict(both.target.execute(kinds).fetchall()) == {"articles": 1, "notes": 100}, both.tail)
    ended = [one["index"] for one in both.events() if one["event"] == "backfill_done"][2:]
    assert "articles" in ended[:10]


def test_after_a_first_load_was_cancelled_a_replay_is_refused_with_what_loads_the_index(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    slow = "backfill_page_rows = 5\nbackfill_max_rows_per_s = 5"
    pipeline = make_pipeline(configuration(database.dsn, worker_lines=slow))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 200) i")
    pipeline.start()
    pipeline.event("backfill_started")
    pipeline.answer("replay", "articles", "--cancel")
    paused = "SELECT FROM cdcsync.indexes WHERE state = 'paused'"
    until(lambda: pipeline.target.execute(paused).fetchall(), pipeline.tail)

    told = refused(pipeline, "replay", "articles")
    assert "the index is paused: its load was cancelled" in told
    assert "start the worker again to load it" in told
    assert "by itself" not in told
    pipeline.stop(pipeline.processes[-1])
    pipeline.configure(configuration(database.dsn))
    pipeline.start()
    pipeline.live()
    pipeline.in_step()


FOLLOWING = """
SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'cdcsync replay'
AND query LIKE 'SELECT%backfills%WHERE id = %'
"""


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(("choice", "state"), [("leave", "running"), ("cancel", "cancelled")])
def test_ctrl_c_leaves_the_request_or_cancels_it_as_asked(live: Pipeline, choice: str, state: str) -> None:
    arguments = ["replay", "articles", "--max-rows-per-s", "2", "--on-interrupt", choice, "-c", str(live.path)]
    with subprocess.Popen(
        [sys.executable, "-m", "cdcsync", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as command:
        latest = "SELECT state FROM cdcsync.backfills ORDER BY id DESC LIMIT 1"
        until(lambda: live.target.execute(latest).fetchone() == ("running",), "the request to be served")
        until(lambda: live.target.execute(FOLLOWING).fetchone(), "the command to follow it")
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 130
    assert "is cancelled" in said if choice == "cancel" else "left to the worker" in said
    assert live.target.execute(latest).fetchone() == (state,)


@pytest.mark.proof
def test_ctrl_c_needs_no_answer_from_the_target_to_leave_a_request(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    """It is what one types when the target hangs."""
    source, cluster = make_cluster(), make_cluster()
    pipeline = make_simple(source.dsn(), make_target(cluster))
    pipeline.start()
    pipeline.live()
    arguments = ["replay", "articles", "--max-rows-per-s", "1", "-c", str(pipeline.path)]
    with subprocess.Popen([sys.executable, "-m", "cdcsync", *arguments], stderr=subprocess.PIPE, text=True) as command:
        until(lambda: pipeline.target.execute(FOLLOWING).fetchone(), "the command to follow it")
        assert cluster.pid is not None
        with frozen(cluster.pid):  # whoever connects now waits
            command.send_signal(signal.SIGINT)
            _, said = command.communicate(timeout=60)
    assert "left to the worker" in said
    assert command.returncode == 130


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "no index nosuch"),
        (["articles", "--where", "tenant ="], "it is not complete"),
        (["articles", "--where", "nosuch = 1"], 'column "nosuch" does not exist'),
        (["articles", "--where", "tenant"], "must be type boolean"),
        (["articles", "--where", "true); DELETE FROM articles; SELECT (true"], "cannot insert multiple commands"),
        (["articles", "--where", "true) OR (true"], "syntax error"),
        (["articles", "--where", "true -- "], "syntax error"),
        (["articles", "--where", "nextval('public.s') > 0"], "read-only transaction"),
        (["articles", "--key", "seven"], 'invalid input syntax for type bigint: "seven"'),
        (["articles", "--key", "99999999999999999999"], "out of range"),
        (["articles", "--key", "1", "--where", "true"], "cannot be combined"),
        (["articles", "--pause", "--cancel"], "cannot be combined"),
        (["articles", "--pause", "--force-embed"], "cannot be combined"),
        (["articles", "--pause"], "nothing to pause"),
        (["articles", "--key", "-"], "there is no key"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_changed(
    idle: Pipeline, arguments: list[str], said: str
) -> None:
    assert said in refused(idle, "replay", *arguments, typed="")


def test_a_paused_index_is_not_replayed(idle: Pipeline) -> None:
    idle.source.execute("ALTER TABLE articles RENAME COLUMN title TO headline")
    idle.target.execute("UPDATE cdcsync.indexes SET state = 'paused', reason = 'the column is gone'")
    try:
        assert "the column is gone" in refused(idle, "replay", "articles")
    finally:
        idle.source.execute("ALTER TABLE articles RENAME COLUMN headline TO title")
        idle.target.execute("UPDATE cdcsync.indexes SET state = 'live', reason = NULL")


@pytest.fixture(scope="module")
def idle(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline that was set up and stopped, shared by tests that change nothing."""
    from tests.support.servers import fresh_database

    with fresh_database(server) as database:
        pipeline = Pipeline(
            tmp_path_factory.mktemp("idle"),
            articles(database),
        )
        try:
            fill(pipeline, 5)
            pipeline.source.execute("CREATE SEQUENCE s")
            worker = pipeline.start()
            pipeline.live()
            pipeline.stop(worker)
            yield pipeline
        finally:
            pipeline.close()


def test_the_key_of_several_columns_is_a_json_array(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    pipeline = make(make_pipeline, make_database(), make_database())
    pipeline.source.execute(COMPOSITE)
    pipeline.source.execute(
        "INSERT INTO articles SELECT region, i, i, 'title ' || i, 'body of ' || region"
        ' FROM generate_series(1, 5) i, unnest(\'{eu,"a,b","[\\""}\'::text[]) AS region'
    )
    pipeline.start()
    pipeline.live()
    pipeline.target.execute("UPDATE cdcsync.articles_chunks SET tenant = -1")

    done = pipeline.answer("replay", "articles", "--key", '["eu", 3]', "--key", '["a,b", "04"]', "--key", '["[\\"",5]')

    assert done["rows"] == 3
    left = pipeline.target.execute("SELECT region, id FROM public.articles_index WHERE tenant >= 0 ORDER BY 2")
    assert left.fetchall() == [("eu", 3), ("a,b", 4), ('["', 5)]
    odd = ('["\\ud800", 1]', '["\\u0000", 1]', "[" * 2_000)
    for key in ("eu", '["eu"]', '["eu", 1, 2]', '["eu", null]', '["eu", [1]]', '{"region": "eu", "id": 1}', *odd):
        assert "(region, id)" in refused(pipeline, "replay", "articles", "--key", key)
    assert "integer" in refused(pipeline, "replay", "articles", "--key", '["eu", "x"]')
    pipeline.answer("replay", "articles")
    pipeline.in_step()


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("kind", ["related", "replay"])
def test_what_the_index_is_owed_is_read_in_another_way_if_its_request_fails(both: Pipeline, kind: str) -> None:
    both.target.execute("DELETE FROM cdcsync.articles_chunks WHERE id = 5")
    both.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, owed, filter)"
        " VALUES ('articles', %s, true, 'no_such_column = 1')",
        [kind],
    )
    both.event("backfill_failed")
    last = "SELECT kind, state FROM cdcsync.backfills WHERE index_name = 'articles' ORDER BY id DESC LIMIT 1"
    until(lambda: both.target.execute(last).fetchone() == ("resync", "done"), both.tail)
    both.in_step("articles", "notes")


def test_a_key_that_cannot_be_read_is_answered_with_the_columns_as_they_are_called() -> None:
    spec = make_spec(key={"Schlüssel": "text", "näme": "text"})
    with pytest.raises(UsageError) as refused:
        parse_key("17", spec)
    hint = str(refused.value.hint)
    assert hint == 'the key is ("Schlüssel", "näme"): give a JSON array such as \'["<Schlüssel>", "<näme>"]\''
