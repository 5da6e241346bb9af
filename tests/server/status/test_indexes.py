"""Indexes as statuses tell them: missing, paused, of other pipelines, with rows left out and backfills."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cdcsync.config import Index
from cdcsync.model.pauses import Pause
from cdcsync.postgres.sessions import connect
from cdcsync.status import BackfillStatus, Headline
from cdcsync.target.requests.submission import Requests
from cdcsync.worker.gauges import set_gauges
from cdcsync.worker.state import WorkerState
from tests.support.statuses import ARTICLES, Pipeline, problem

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_the_last_recall_is_told_for_as_long_as_its_vectors_are_in_use(stopped: Pipeline) -> None:
    handle = WorkerState(stopped.config)
    one = "cdcsync_recall", {"index": "articles"}
    assert (await stopped.status()).indexes["articles"].recall is None
    await stopped.target.execute(
        "INSERT INTO cdcsync.evaluations VALUES ('articles', 1, 10, 40, true, true, 100, 0.97, 1, 2, 3, 4, now()),"
        " ('articles', 1, 10, 20, false, true, 100, 0.5, 1, 2, 3, 4, now()),"
        " ('articles', 1, 99, 40, true, true, 100, 0.4, 1, 2, 3, 4, now()),"
        " ('articles', 2, 10, 40, true, true, 100, 0.99, 1, 2, 3, 4, now())"
    )
    status = await stopped.status()
    index = status.indexes["articles"]
    assert index.generation == 1
    assert index.recall is not None
    assert (index.recall.recall, index.recall.k, index.recall.ef_search) == (0.97, 10, 40)
    set_gauges(handle, status)
    assert handle.metrics.registry.get_sample_value(*one) == 0.97

    # An older version's schema has no such table; neither is anything told of vectors that are out of use.
    await stopped.target.execute("DROP TABLE cdcsync.evaluations")
    status = await stopped.status()
    assert status.indexes["articles"].recall is None
    set_gauges(handle, status)
    assert handle.metrics.registry.get_sample_value(*one) is None
    await handle.aclose()


async def test_an_index_that_is_new_in_the_configuration_is_absent(
    make_stopped: Callable[..., Awaitable[Pipeline]],
) -> None:
    pipeline = await make_stopped(
        articles=ARTICLES, notes=Index(table="notes", text="{t}", embedder="e", view="notes_index")
    )
    await pipeline.set_up("articles")
    status = await pipeline.status()
    assert [index.state for index in status.indexes.values()] == ["live", "absent"]
    assert problem(status, "not set up yet: notes; start the worker again")


async def test_an_index_that_could_not_be_set_up_is_paused_and_says_why(
    make_stopped: Callable[..., Awaitable[Pipeline]],
) -> None:
    new = {name: Index(table=name, text="{t}", embedder="e", view=f"{name}_index") for name in ("notes", "pages")}
    pipeline = await make_stopped(articles=ARTICLES, **new)
    await pipeline.set_up("articles")
    pauses = {"notes": Pause("tables can have at most 1600 columns", "carry fewer"), "gone": Pause("as before")}
    await pipeline.pipelines.note_waiting(pipeline.target, pauses, list(pauses))
    status = await pipeline.status()
    assert [index.state for index in status.indexes.values()] == ["live", "paused", "absent"]
    assert status.indexes["notes"].reason == "tables can have at most 1600 columns; carry fewer"
    assert status.indexes["notes"].since is not None
    assert problem(status, "index notes is paused: tables can have at most 1600 columns; carry fewer")
    assert problem(status, "not set up yet: pages; start the worker again")


async def test_an_index_that_left_the_configuration_is_told(make_stopped: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make_stopped()
    await pipeline.set_up("articles", "old")
    status = await pipeline.status()
    assert list(status.indexes) == ["articles"]
    assert problem(status, "index old is not in the configuration")


async def test_an_index_of_another_pipeline_is_told(stopped: Pipeline) -> None:
    await stopped.target.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('other', 'p')")
    await stopped.target.execute("UPDATE cdcsync.indexes SET slot = 'other'")
    assert problem(await stopped.status(), "index articles belongs to the pipeline of slot other")


async def test_an_index_without_its_tables_is_absent(stopped: Pipeline) -> None:
    await stopped.target.execute("DROP TABLE cdcsync.articles_backlog")
    status = await stopped.status()
    assert status.indexes["articles"].state == "absent"
    assert status.indexes["articles"].reason == "tables are missing: articles_backlog"
    assert problem(status, "tables are missing: articles_backlog; `cdcsync run` creates them")


async def test_a_paused_index_says_why(stopped: Pipeline) -> None:
    await stopped.target.execute("UPDATE cdcsync.indexes SET state = 'paused', reason = 'column body is gone'")
    status = await stopped.status()
    assert (status.indexes["articles"].state, status.indexes["articles"].reason) == ("paused", "column body is gone")
    assert problem(status, "index articles is paused: column body is gone")


async def test_chunks_beside_an_index_that_wait_to_be_built_say_why(stopped: Pipeline) -> None:
    await stopped.target.execute(
        "INSERT INTO cdcsync.indexes SELECT (jsonb_populate_record(i, jsonb_build_object("
        "'name', 'articles~other', 'stem', 'articles~2', 'generation', 2, 'state', 'building',"
        " 'reason', 'out of memory'))).* FROM cdcsync.indexes AS i"
    )
    status = await stopped.status()
    assert (status.indexes["articles"].state, status.indexes["articles"].reason) == ("live", None)
    assert problem(
        status, "index articles: generation 2, which has chunks of its own, waits to be built: out of memory"
    )


async def test_an_index_names_its_model(stopped: Pipeline) -> None:
    index = (await stopped.status()).indexes["articles"]
    assert (index.state, index.model, index.dimensions) == ("live", "feature hashing", 3)


async def test_rows_that_no_document_could_be_made_of_are_counted_and_told(stopped: Pipeline) -> None:
    assert (await stopped.status()).indexes["articles"].failed_documents == 0
    await stopped.target.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, commit_lsn)"
        " VALUES ('articles', '{7}', '', '0/1')"
    )
    assert problem(await stopped.status(), "index articles: 1 row is left out: no document could be made")
    await stopped.target.execute(
        "INSERT INTO cdcsync.failed_documents (index_name, key, error, attempts, commit_lsn)"
        " VALUES ('articles', '{8}', '', 1, '0/1'), ('articles', '{}', '', 50, '0/1')"
    )

    status = await stopped.status()

    assert status.indexes["articles"].failed_documents == 3  # at least
    said = problem(status, "2 rows are left out, and more than are listed")
    assert said.endswith("see `cdcsync failures articles list`")


async def test_a_target_of_before_the_list_of_failed_documents_has_none(stopped: Pipeline) -> None:
    await stopped.target.execute("DROP TABLE cdcsync.failed_documents")
    status = await stopped.status()
    assert (status.indexes["articles"].failed_documents, status.indexes["articles"].state) == (0, "live")


async def begun(stopped: Pipeline, ago: str) -> BackfillStatus:
    """Return the status of a load that has begun so long ago, and has read 250 of 1,000 rows."""
    await Requests("cdcsync").add(stopped.target, "articles", "initial", rewrite=False, filter_=None)
    await stopped.target.execute(
        "UPDATE cdcsync.backfills SET state = 'running', rows_done = 250, rows_total = 1000,"
        " started_at = now() - %s::interval",
        [ago],
    )
    backfill = (await stopped.status()).indexes["articles"].backfill
    assert backfill is not None
    return backfill


async def test_a_running_backfill_has_rate_and_time_left(stopped: Pipeline) -> None:
    backfill = await begun(stopped, "100 s")
    assert (backfill.kind, backfill.state, backfill.phase) == ("initial", "running", "rows")
    assert (backfill.rows_done, backfill.rows_total) == (250, 1000)
    assert backfill.rate is not None
    assert backfill.eta_s is not None
    assert 0 < backfill.rate <= 2.5
    assert backfill.eta_s == pytest.approx(750 / backfill.rate, rel=0.05)


async def test_of_a_backfill_that_began_before_the_clock_went_back_no_rate_is_known(stopped: Pipeline) -> None:
    backfill = await begun(stopped, "-100 s")
    assert (backfill.rate, backfill.eta_s) == (None, None)


async def test_what_is_not_known_of_a_backfill_is_null(stopped: Pipeline) -> None:
    await Requests("cdcsync").add(stopped.target, "articles", "replay", rewrite=False, filter_="true")
    requested = (await stopped.status()).indexes["articles"].backfill
    await stopped.target.execute(
        "UPDATE cdcsync.backfills SET state = 'running', rows_done = 5, started_at = now() - interval '1 s'"
    )
    running = (await stopped.status()).indexes["articles"].backfill
    await stopped.target.execute("UPDATE cdcsync.backfills SET rows_total = 5, phase = 'orphans'")
    searching = (await stopped.status()).indexes["articles"].backfill
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
    stopped: Pipeline, states: list[str], shown: int | None
) -> None:
    for state in states:
        await stopped.target.execute(
            "INSERT INTO cdcsync.backfills (index_name, kind, state) VALUES ('articles', 'replay', %s)", [state]
        )
    backfill = (await stopped.status()).indexes["articles"].backfill
    assert (None if backfill is None else backfill.id) == shown


async def test_a_failed_backfill_is_a_problem_until_another_follows(stopped: Pipeline) -> None:
    await stopped.target.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, state, error)"
        " VALUES ('articles', 'replay', 'done', NULL), ('articles', 'replay', 'failed', 'no such column')"
    )
    assert problem(await stopped.status(), "its last replay failed (no such column); `cdcsync replay articles`")
    await Requests("cdcsync").add(stopped.target, "articles", "replay", rewrite=False, filter_=None)
    assert not [one for one in (await stopped.status()).problems if "failed" in one]


UNREADABLE = {
    "locked": "LOCK TABLE cdcsync.articles_chunks IN ACCESS EXCLUSIVE MODE",
    "of another form": "ALTER TABLE cdcsync.articles_backlog RENAME COLUMN attempts TO tries",
    "dropped meanwhile": "DROP TABLE cdcsync.articles_backlog",
}


@pytest.mark.parametrize("fault", UNREADABLE)
async def test_an_index_that_cannot_be_read_is_told_and_the_others_are_shown(
    make_stopped: Callable[..., Awaitable[Pipeline]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("cdcsync.status.reading.BRIEFLY", "SET lock_timeout = '20ms'")
    notes = Index(table="notes", text="{t}", embedder="e", view="public.notes_index")
    pipeline = await make_stopped(articles=ARTICLES, notes=notes)
    await pipeline.set_up("articles", "notes")
    await pipeline.target.execute(
        "INSERT INTO cdcsync.notes_chunks (id, chunk_no, content, content_hash, document_hash, commit_lsn)"
        " VALUES (1, 0, 'a note', '', '', '0/1')"
    )
    async with await connect(pipeline.dsn, "target", autocommit=False) as other:
        await other.execute(UNREADABLE[fault])
        if fault == "of another form":
            await other.commit()
        status = await pipeline.status()
    index = status.indexes["articles"]
    assert index.unreadable is not None
    assert index.headline == Headline(f"cannot be read: {index.unreadable}", "bad", "articles")
    assert problem(status, "index articles cannot be read, so its figures are not known").endswith(index.unreadable)
    assert (status.indexes["notes"].unreadable, status.indexes["notes"].chunks) == (None, 1)
    assert status.headline == index.headline or not status.worker.running
