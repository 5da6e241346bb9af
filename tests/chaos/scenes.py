"""How to come to each crash point: a first load and the stream after it meet most; some need a scene of their own.

A scene arms a worker, does what leads to the point, and leaves the worker dead or alive to what comes next.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psycopg

from tests.chaos import commits
from tests.chaos.faults import ask_for_smaller_chunks, end_migration
from tests.chaos.history import History
from tests.chaos.servers import until
from tests.chaos.tables import WISHES
from tests.support import provider as misdeeds
from tests.support.disks import LACKS_MEMORY

Scene = Callable[[History, str], None]

HIT_S = 120.0
"""How long a scene waits for its point."""


def reached(history: History, patience_s: float = HIT_S) -> bool:
    """Wait until the newest worker has died at its point; one that has not is left alive."""
    worker = history.worker
    deadline = time.monotonic() + patience_s
    while worker.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    crashed = worker.crashed
    history.settle_crash()
    return crashed


def at_work(history: History, point: str) -> None:
    """Load and stream until the point is reached for the first, second or third time."""
    often = point.startswith(
        ("batch", "vectors", "status", "mark", "index relations", "search index", "request started")
    )
    history.start(f"{point}#{history.chance.choice((1, 2, 3)) if often else 1}")
    reached(history)


def at_the_end(history: History, point: str) -> None:
    """Ask an armed worker to stop."""
    history.start(point).until_said("streaming")
    if history.worker.alive:
        history.worker.process.terminate()
    reached(history)


def _live(history: History) -> None:
    """Bring every index up, and leave no worker running."""
    history.start()
    until(
        lambda: (
            history.worker.said("streaming")
            and history.execute(history.target, "SELECT count(*) FROM cdcsync.indexes WHERE state = 'live'")[0][0]
            == len(history.indexes)
        ),
        "live indexes",
        300,
    )
    history.stop()


def table_added(history: History, point: str) -> None:
    """Add an index of a table that is not published yet."""
    history.indexes.remove("notes")
    history.write_config()
    _live(history)
    history.indexes.append("notes")
    history.write_config()
    history.start(point)
    reached(history)


def broken_table(history: History, point: str) -> None:
    """Start with a table that has lost a column that an index needs; it comes back later."""
    _live(history)
    history.writer.stop()
    history.writer.finish()
    history.execute(history.source, "ALTER TABLE articles RENAME tenant TO tenancy")
    history.start(point)
    reached(history)
    history.execute(history.source, "ALTER TABLE articles RENAME tenancy TO tenant")
    history.writer.start()
    history.pause_expected = True


def load_cancelled(history: History, point: str) -> None:
    """Cancel a first load."""
    history.settings["page_rows"] = 1
    history.write_config()
    history.start(point).until_said("backfill_started")
    history.execute(
        history.target,
        "UPDATE cdcsync.backfills SET state = 'cancelled', finished_at = now() WHERE index_name = 'notes'",
    )
    reached(history)
    history.settings["page_rows"] = 50
    history.write_config()
    history.kill()
    history.pause_expected = True


def reload_cancelled(history: History, point: str) -> None:
    """Cancel the reload of an index that is live."""
    _live(history)
    history.start(point).until_said("streaming")
    history.execute(
        history.target,
        "INSERT INTO cdcsync.backfills (index_name, kind, state, finished_at)"
        " VALUES ('notes', 'resync', 'cancelled', now())",
    )
    reached(history)
    history.kill()
    history.pause_expected = True


def another_fault(history: History, point: str) -> None:
    """Have a paused index broken by something else than what paused it."""
    _live(history)
    history.writer.stop()
    history.writer.finish()
    history.execute(history.source, "ALTER TABLE articles RENAME tenant TO tenancy")
    history.start(point).until_said("streaming")
    with history.source.connect(history.name) as session, session.transaction():
        session.execute("ALTER TABLE articles RENAME tenancy TO tenant")
        session.execute("ALTER TABLE articles RENAME title TO heading")
    reached(history)
    history.execute(history.source, "ALTER TABLE articles RENAME heading TO title")
    history.writer.start()
    history.pause_expected = True


def audits(history: History, point: str) -> None:
    """Compare every index all the time."""
    history.settings["verify"] = 0.5
    history.write_config()
    history.start(f"{point}#{history.chance.randint(1, 4)}")
    reached(history)


def compared(history: History, point: str) -> None:
    """Have an index compared as a whole."""
    _live(history)
    history.start(point).until_said("streaming")
    history.execute(history.target, COMPARE)
    reached(history)


def incomparable(history: History, point: str) -> None:
    """Have an index compared whose table has just lost a column that the comparison reads.

    The comparison waits for a transaction that is open when it begins. If the worker looks at the catalog before it
    goes on, the index is paused instead: once it is live, that is tried again.
    """
    _live(history)
    history.writer.stop()
    history.writer.finish()
    history.start(point).until_said("streaming")
    # One of another index, asked for by the load, would wait for the open transaction first.
    until(lambda: not history.execute(history.target, ASKED), "the comparisons after the load")
    for _ in range(3):
        with history.source.connect(history.name) as session, session.transaction():
            session.execute("SELECT pg_current_xact_id()")
            history.execute(history.target, COMPARE)
            until(lambda: history.execute(history.target, COMPARING), "the comparison to begin")
            history.execute(history.source, "ALTER TABLE notes RENAME body TO words")
        hit = reached(history, 30.0)
        history.execute(history.source, "ALTER TABLE notes RENAME words TO body")
        if hit:
            break
        until(lambda: not history.execute(history.target, UNSETTLED), "the index to be live again")
    history.writer.start()
    history.pause_expected = True


ASKED = "SELECT FROM cdcsync.backfills WHERE state IN ('requested', 'running')"
COMPARING = "SELECT FROM cdcsync.backfills WHERE index_name = 'notes' AND kind = 'compare' AND state = 'running'"
UNSETTLED = (
    "SELECT FROM cdcsync.indexes WHERE name = 'notes' AND state <> 'live'"
    " UNION ALL SELECT FROM cdcsync.backfills WHERE index_name = 'notes' AND state IN ('requested', 'running')"
)
COMPARE = "INSERT INTO cdcsync.backfills (index_name, kind) VALUES ('notes', 'compare')"


def bad_request(history: History, point: str) -> None:
    """Ask for what cannot be served."""
    _live(history)
    history.start(point).until_said("streaming")
    history.execute(
        history.target,
        "INSERT INTO cdcsync.backfills (index_name, kind, filter) VALUES ('notes', 'replay', 'no_such_column = 1')",
    )
    reached(history)
    history.execute(history.target, "DELETE FROM cdcsync.backfills WHERE filter = 'no_such_column = 1'")


def text_refused(history: History, point: str) -> None:
    """Have the provider answer for some texts with too few vectors, again and again, and properly for all others."""

    def answer(exchange: Any, texts: list[str]) -> None:
        if any(text.endswith("7") for text in texts):
            misdeeds.wrong_count(exchange, texts)
        else:
            exchange.embed(exchange.provider.vectors(texts))

    history.start(point).until_said("streaming")
    history.provider.always = answer
    reached(history)
    history.provider.always = None


def heartbeats(history: History, point: str) -> None:
    """Write heartbeats."""
    history.settings["heartbeat"] = 0.2
    history.write_config()
    history.start(f"{point}#{history.chance.randint(1, 4)}")
    reached(history)


def evaluation(history: History, point: str) -> None:
    """Measure recall every second."""
    history.settings["evaluate"] = 1
    history.write_config()
    history.start(point)
    reached(history)


def gap(history: History, point: str) -> None:
    """Move the slot behind the worker's back, past changes and deletions."""
    history.settings["on_gap"] = "resync"
    history.gap_expected = True
    history.write_config()
    _live(history)
    until(
        lambda: (
            not history.execute(
                history.source, "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND active", history.name
            )
        ),
        "the slot to be free",
    )
    history.writer_finishes()
    history.execute(history.source, "DELETE FROM notes WHERE no % 5 = 2")
    history.execute(history.source, "SELECT pg_logical_emit_message(true, 'x', 'y')")
    history.execute(history.source, "SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", history.name)
    history.start(point)
    reached(history)


def lost_slot(history: History, point: str) -> None:
    """Lose the slot's WAL before anything was indexed."""
    history.start("slot created")
    reached(history)
    history.source.configure(max_slot_wal_keep_size="1MB")
    try:
        for _ in range(40):
            (status,) = history.execute(
                history.source, "SELECT wal_status FROM pg_replication_slots WHERE slot_name = %s", history.name
            )[0]
            if status == "lost":
                break
            history.execute(history.source, "SELECT pg_logical_emit_message(true, 'x', 'y')")
            history.execute(history.source, "SELECT pg_switch_wal()")
            history.execute(history.source, "CHECKPOINT")
    finally:
        history.source.configure(max_slot_wal_keep_size="-1")
    history.start(point)
    reached(history)


def failover_slot(history: History, point: str) -> None:
    """Ask for a failover slot where there is an ordinary one."""
    history.settings["failover"] = "false"
    history.write_config()
    _live(history)
    history.settings["failover"] = "true"
    history.write_config()
    history.start(point)
    reached(history)


def invalid_index(history: History, point: str) -> None:
    """Leave an index for searches invalid, as a build that was broken off does."""
    history.start("search index built#2")
    reached(history)
    history.execute(
        history.target,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = (SELECT max(indexrelid) FROM pg_index AS i"
        " JOIN pg_class AS c ON c.oid = i.indrelid WHERE c.relnamespace = 'cdcsync'::regnamespace AND"
        " c.relname ~ '(vectors|chunks)')",
    )
    history.start(point)
    reached(history)


def repair(history: History, point: str) -> None:
    """Damage an index and repair it by a command that dies."""
    _damaged(history)
    history.command("verify", "titles", "--repair", crash_at=point)
    history.repair("titles")


def verification(history: History, point: str) -> None:
    """Have an armed worker serve a comparison."""
    _damaged(history, point)
    history.command("verify", "titles")
    reached(history)
    history.repair("titles")


def _damaged(history: History, point: str | None = None) -> None:
    _live(history)
    history.execute(history.target, "DELETE FROM cdcsync.titles_chunks WHERE id % 3 = 1")
    history.start(point).until_said("streaming")


def partitions(history: History, point: str) -> None:
    """Empty a partition by itself."""
    _live(history)
    history.start(point)
    if not reached(history, 3):
        history.writer.finish()
        history.execute(history.source, "TRUNCATE events_2")
        history.settles_late = True
        reached(history)


def migration(history: History, point: str) -> None:
    """Migrate an index, until the command that a step is asked for by dies, or the worker that serves it."""
    _live(history)
    # Only vectors of the provider may stay live.
    converted = point.startswith(("vectors taken over", "switch"))
    history.wish = WISHES["half precision" if converted else "another model"]
    history.write_config()
    step = STEPS.get(point)
    if point == REFUSED:
        history.execute(history.target, "CREATE TABLE cdcsync.titles_vectors_2_hnsw ()")
    history.start(point if step is None else None).until_said("streaming")
    if step == "pace":
        _migrate(history, "start", "--max-rows-per-s", "1")
        _migrate(history, "start", "--max-rows-per-s", "1000", crash_at=point)
    else:
        _migrate(history, "start", crash_at=point if step == "start" else None)
    if step in ("activate", "drop"):
        ready = "SELECT FROM cdcsync.generations WHERE index_name = 'titles' AND generation > 1 AND state = 'ready'"
        until(lambda: history.execute(history.target, ready), "a generation that is ready", HIT_S)
        _migrate(history, step, crash_at=point)
    elif step == "end":
        history.kill()
        history.start(point).until_said("streaming")
        # Whoever holds the pipeline's lock drops it: the worker, or the command while the worker begins anew.
        _migrate(history, "drop", crash_at=point)
        if point not in history.hit:
            reached(history)
    elif step is None:
        reached(history)
    if point == REFUSED:
        history.execute(history.target, "DROP TABLE cdcsync.titles_vectors_2_hnsw")
    if not converted:
        end_migration(history)


def filled_again(history: History, point: str) -> None:
    """Delete vectors of a generation behind the cursor of its fill."""
    _live(history)
    history.wish = WISHES["another model"]
    history.write_config()
    history.start(point).until_said("streaming")
    _migrate(history, "start", "--max-rows-per-s", "20")
    vectors = "cdcsync.titles_vectors_2"
    first = f"SELECT chunk_id FROM {vectors} ORDER BY chunk_id LIMIT 5"

    def deleted() -> bool:
        try:
            gone = f"DELETE FROM {vectors} WHERE chunk_id IN ({first}) RETURNING 1"
            return len(history.execute(history.target, gone)) == 5
        except psycopg.errors.UndefinedTable:
            return False

    until(deleted, "the first vectors of the generation", HIT_S)
    _migrate(history, "start", "--max-rows-per-s", "10000")
    reached(history)
    end_migration(history)


def _migrate(history: History, step: str, *options: str, index: str = "titles", crash_at: str | None = None) -> None:
    history.command("migrate", index, step, "--yes", *options, crash_at=crash_at)


def other_chunks(history: History, point: str) -> None:
    """Migrate an index to smaller chunks, until a command dies, or the worker: whoever holds the pipeline's lock."""
    _live(history)
    step = CHUNKS[point]
    history.start(None if step in ("start", "pace") else point).until_said("streaming")
    ask_for_smaller_chunks(history)
    if step == "pace":
        _migrate(history, "start", "--max-rows-per-s", "1", index="articles")
        _migrate(history, "start", "--max-rows-per-s", "1000", index="articles", crash_at=point)
        return
    _migrate(history, "start", index="articles", crash_at=point if step == "start" else None)
    if step == "start":
        return
    until(lambda: history.execute(history.target, BESIDE_READY), "chunks beside the others", 300)
    with contextlib.ExitStack() as stack:
        if step == "refused":
            reader = stack.enter_context(history.target.connect(history.name))
            stack.enter_context(reader.transaction())
            reader.execute("LOCK TABLE public.articles_index IN ACCESS SHARE MODE")
        _migrate(history, "drop" if step == "drop" else "activate", index="articles", crash_at=point)
    if point not in history.hit:
        reached(history)
    if step == "drop":
        history.provider.calls.clear()  # what is dropped may be made again


BESIDE_READY = (
    "SELECT FROM cdcsync.indexes AS i JOIN cdcsync.generations AS g ON g.index_name = i.name"
    " WHERE i.name = 'articles~other' AND i.state = 'live' AND g.state = 'ready'"
)

CHUNKS = {
    "migration to other chunks asked for": "start",
    "migration to other chunks begun": "start",
    "limit of a load set": "pace",
    "chunks exchanged": "activate",
    "exchange of chunks committed": "activate",
    "request withdrawn": "refused",
    "withdrawn request committed": "refused",
    "chunks dropped": "drop",
    "dropped chunks committed": "drop",
}
"""The steps of a migration to other chunks that lead to its points; `refused` is one that a reader outlasts."""


def settling(history: History, point: str) -> None:
    """Let no vector rest before it moves into the graph."""
    history.settings["settle"] = 0
    history.write_config()
    _live(history)
    history.start(f"{point}#{history.chance.choice((1, 2, 3))}").until_said("streaming")
    history.writer.allow()
    reached(history)


def lacking_memory(history: History, point: str) -> None:
    """Have the target lack the memory for building an index, until the worker has died of it."""
    history.execute(history.target, LACKS_MEMORY)
    history.start(point)
    reached(history)
    history.execute(history.target, "DROP EVENT TRIGGER lacks_memory")


def outdated_ranking(history: History, point: str) -> None:
    """Leave an index for ranking words that was built with other options than the configuration asks for."""
    _live(history)
    history.execute(
        history.target,
        "CREATE INDEX articles_chunks_bm25 ON cdcsync.articles_chunks (content) WITH (fillfactor = 90)",
    )
    history.start(point)
    reached(history)


STEPS = {
    "migration asked for": "start",
    "migration begun": "start",
    "limit of a migration set": "pace",
    "switch written": "activate",
    "switch committed": "activate",
    "end of a generation asked for": "drop",
    "end of a generation committed": "drop",
    "generation dropped": "end",
    "dropped generation committed": "end",
}
"""The commands of a migration that die at their points, and `end`, at whose points the worker does."""

REFUSED = "reason of a migration noted"
"""The point that a migration only comes to where the target refuses something."""

FILL = (
    REFUSED,
    "page of a generation written",
    "page of a generation committed",
    "vectors taken over",
    "vectors taken over committed",
    "generation filled",
    "generation ready",
)

SCENES: dict[str, Scene] = defaultdict(
    lambda: at_work,
    {
        "last status sent": at_the_end,
        "publication extended": table_added,
        "broken index paused": broken_table,
        "ended load noted": load_cancelled,
        "failed load noted": reload_cancelled,
        "reason of a pause corrected": another_fault,
        **dict.fromkeys(("audit begun", "audit advanced", "audit finished"), audits),
        "comparison ended": compared,
        **dict.fromkeys(("comparison given up", "reading in place of a comparison committed"), incomparable),
        **dict.fromkeys(
            ("request failed", "request given up", "request that was given up committed"),
            bad_request,
        ),
        "failure of a text noted": text_refused,
        "heartbeat written": heartbeats,
        "evaluation written": evaluation,
        "evaluation committed": evaluation,
        "position forgotten": gap,
        "forgotten position committed": gap,
        "old slot dropped": gap,
        "lost slot dropped": lost_slot,
        "slot made a failover slot": failover_slot,
        "invalid search index dropped": invalid_index,
        "comparison asked for": repair,
        "request for a comparison committed": repair,
        "repair asked for": repair,
        "request for a repair committed": repair,
        "keys of a served request removed": verification,
        "verified page written": verification,
        "verified page committed": verification,
        "difference written": partitions,
        "difference committed": partitions,
        **dict.fromkeys((*STEPS, *FILL), migration),
        "fill begun again": filled_again,
        **dict.fromkeys(CHUNKS, other_chunks),
        **dict.fromkeys(("vectors moved", "move committed", "tiers noted"), settling),
        "cause of a wait noted": lacking_memory,
        "outdated BM25 index dropped": outdated_ranking,
    },
)
"""The scene of each crash point."""

REBUILDING = "tests/server/target/ddl/test_rebuilding.py"
TIDYING = "tests/server/target/test_tidying.py"
UPGRADING = "tests/server/target/ddl/test_upgrading.py"
REQUESTED = "tests/server/flows/audit/test_requested.py"
PLAN = "tests/server/flows/test_plan.py"
GAPS = "tests/faults/test_gaps.py"
START = "tests/server/flows/setup/test_start.py"
WITHDRAWAL = "tests/server/flows/migrate/test_withdrawal.py"
TEARDOWN = "tests/server/flows/test_teardown.py"
REPLAY = "tests/server/flows/test_replay.py"
CALLS = "tests/server/serve/test_calls.py"
JUDGED_RUNS = "tests/server/target/test_judged_runs.py"

ELSEWHERE: dict[str, str] = {
    "fence raised by a command": "tests/server/scenarios/test_other_chunks.py",
    **dict.fromkeys(
        (
            *("rebuild dropped", "rebuild gone", "rebuild written", "rebuild begun", "tiers copied"),
            *("copy has its key", "copy has its hashes", "copy has its graph", "changes taken out", "copy follows"),
            *("tiers exchanged", "exchange committed"),
        ),
        REBUILDING,
    ),
    **dict.fromkeys(("fresh vacuumed", "fresh list written", "fresh list rebuilt"), TIDYING),
    **dict.fromkeys(
        (
            "tier columns written",
            "tier columns committed",
            "tier proof written",
            "tier proven",
            "tiers written",
            "tiers committed",
        ),
        UPGRADING,
    ),
    **dict.fromkeys(
        ("reading in place of a comparison asked for", "reading in place of a comparison begun"), REQUESTED
    ),
    **dict.fromkeys(("approval given", "approvals removed"), PLAN),
    "source approved": GAPS,
    "slot that is made again dropped": START,
    **dict.fromkeys(("activation withdrawn", "withdrawn activation committed"), WITHDRAWAL),
    **dict.fromkeys(
        (
            *("fence raised to drop", "slot dropped", "publication dropped", "drop written", "drop committed"),
            *("table taken from its publication", "publication without the table committed"),
        ),
        TEARDOWN,
    ),
    **dict.fromkeys(
        (
            *("replay asked for", "request for a replay committed", "requests changed", "changed requests committed"),
            *("texts to be tried again", "texts discarded", "discarded texts committed", "failed documents forgotten"),
        ),
        REPLAY,
    ),
    **dict.fromkeys(("calls written", "calls committed", "old calls deleted"), CALLS),
    **dict.fromkeys(("judged run written", "judged run committed"), JUDGED_RUNS),
}
"""Crash points that a history does not come to, and the tests that kill at them: they need thousands of rows or of
changes, an index of an earlier version, an operator who approves, replays, gives up or drops something, a tool server,
or a table that is created while the slot is."""


def reachable() -> list[str]:
    """Return the crash points that a history can come to."""
    return sorted(set(commits.points()) - ELSEWHERE.keys())
