"""Transactions of every shape, and what in them is ours, someone else's, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from cdcsync.demo.cluster import Cluster
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server]


@pytest.fixture(scope="module", params=["FOR TABLE notes, beat", "FOR ALL TABLES"], ids=["tables", "all tables"])
def notes(make_scene: MakeScene, request: pytest.FixtureRequest) -> Scene:
    """Source and target in one database; the publication may send our own tables too."""
    return make_scene(
        [
            "CREATE TABLE notes (id int PRIMARY KEY, title text, n int)",
            "INSERT INTO notes SELECT i, 'note ' || i, i FROM generate_series(1, 20) i",
            f"CREATE PUBLICATION everyones {request.param}",
        ],
        {"notes": Followed("notes", columns=("n",)), "same": Followed("notes", "{n}: {title}")},
        publication="everyones",
    )


@pytest.fixture(scope="module")
def idle(make_scene: MakeScene) -> Scene:
    """A pipeline that writes its position once after each change, and for a reader who waits; else as good as never."""
    seldom = {
        f"cdcsync.flows.follow.open_batch.{name}": 3600.0 for name in ("PROMPT_CHECKPOINT_S", "IDLE_CHECKPOINT_S")
    }
    return make_scene(
        ["CREATE TABLE notes (id int PRIMARY KEY, title text, n int)", "INSERT INTO notes VALUES (1, 'one', 1)"],
        {"notes": Followed("notes", where="n > 0")},
        apart=True,
        hurry=seldom,
    )


@pytest.fixture
def writer(notes: Scene) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A connection that is not in autocommit."""
    with psycopg.connect(notes.source.dsn) as connection:
        yield connection


def test_a_prepared_transaction_counts_once_it_is_committed(
    notes: Scene, writer: psycopg.Connection[tuple[object, ...]]
) -> None:
    if writer.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
        pytest.skip("max_prepared_transactions is 0 on this server")
    for name, title in (("kept", "prepared"), ("dropped", "never")):
        writer.execute("UPDATE notes SET title = %s WHERE id = %s", [title, len(name)])
        writer.execute("INSERT INTO notes VALUES (%s, %s)", [100 + len(name), title])
        writer.execute(sql.SQL("PREPARE TRANSACTION {}").format(f"{notes.source.name} {name}"))
        writer.commit()
    notes.follows()
    notes.execute("UPDATE notes SET title = 'meanwhile' WHERE id = 1")

    notes.execute(f"ROLLBACK PREPARED '{notes.source.name} dropped'", f"COMMIT PREPARED '{notes.source.name} kept'")

    notes.follows()
    assert notes.pipeline.target.execute("SELECT content FROM notes_index WHERE id = 104").fetchall() == [("prepared",)]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE IF NOT EXISTS elsewhere AS SELECT 1 AS one",
        "INSERT INTO notes VALUES (200, 'is left out', -1)",
        "SELECT pg_logical_emit_message(true, 'of somebody', 'else')",
    ],
    ids=["another table", "a row that no index has", "a message"],
)
def test_whoever_waits_for_what_changes_no_index_does_not_wait_for_the_next_change(idle: Scene, statement: str) -> None:
    idle.execute(statement)
    position = idle.pipeline.source.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
    assert position is not None

    held = idle.pipeline.target.execute("SELECT cdcsync.wait_for('notes', %s, '40 s')", position)

    assert held.fetchone() == (True,), idle.pipeline.tail()


def test_what_was_rolled_back_to_a_savepoint_never_was(
    notes: Scene, writer: psycopg.Connection[tuple[object, ...]]
) -> None:
    writer.execute("INSERT INTO notes VALUES (200, 'before', 0) ON CONFLICT (id) DO UPDATE SET title = 'before'")
    writer.execute("SAVEPOINT a")
    writer.execute("UPDATE notes SET title = 'in a'")
    writer.execute("SAVEPOINT b")
    writer.execute("DELETE FROM notes WHERE id < 10")
    writer.execute("ROLLBACK TO b")
    writer.execute("UPDATE notes SET n = n + 1 WHERE id < 5")
    writer.execute("RELEASE a")
    writer.execute("SAVEPOINT c")
    writer.execute("TRUNCATE notes")
    writer.execute("ROLLBACK TO c")
    writer.execute("UPDATE notes SET id = 201 WHERE id = 200")
    writer.commit()

    notes.follows()


def test_a_transaction_that_was_rolled_back_never_was(
    notes: Scene, writer: psycopg.Connection[tuple[object, ...]]
) -> None:
    writer.execute("UPDATE notes SET title = 'lost'")
    writer.rollback()

    notes.follows()


def test_many_subtransactions_are_one_transaction(notes: Scene) -> None:
    notes.execute(
        """
        DO $$ BEGIN
            FOR i IN 1..2000 LOOP
                BEGIN
                    UPDATE notes SET n = i WHERE id = 1 + i % 10;
                    IF i % 3 = 0 THEN RAISE EXCEPTION 'undone'; END IF;
                EXCEPTION WHEN raise_exception THEN NULL;
                END;
            END LOOP;
        END $$
        """
    )

    notes.follows()


def test_empty_transactions_and_those_of_other_tables_move_the_position(notes: Scene) -> None:
    notes.execute("CREATE TABLE IF NOT EXISTS other (id int PRIMARY KEY)", "DELETE FROM other")
    for number in range(20):
        notes.at_once(f"INSERT INTO other VALUES ({number})")
        notes.at_once("SELECT pg_current_xact_id()")
        notes.at_once("UPDATE notes SET n = n WHERE false")

    notes.follows()


@pytest.mark.parametrize("transactional", [True, False])
@pytest.mark.parametrize("prefix", ["cdcsync", "someone's"])
def test_logical_messages_of_others_and_such_as_look_like_ours_change_nothing(
    notes: Scene, prefix: str, transactional: bool
) -> None:
    row = "INSERT INTO notes VALUES (300, 'beside', 1) ON CONFLICT (id) DO UPDATE SET n = notes.n + 1"
    emit = sql.SQL("SELECT pg_logical_emit_message({}, {}, {}::bytea)")
    for content in ("", "no mark", "\\xff00", "deadbeef-1"):
        message = emit.format(transactional, prefix, content).as_string(notes.pipeline.source)
        notes.execute(message)
        notes.at_once(message, row, message)

    notes.follows()


def test_rows_that_came_by_replication_from_elsewhere_are_indexed(
    notes: Scene, writer: psycopg.Connection[tuple[object, ...]]
) -> None:
    origin = f"elsewhere {notes.source.name}"
    writer.execute("SELECT pg_replication_origin_create(%s)", [origin])
    writer.commit()
    writer.execute("SELECT pg_replication_origin_session_setup(%s)", [origin])
    for number in range(3):
        writer.execute("SELECT pg_replication_origin_xact_setup(%s, now())", [f"0/{number + 1}"])
        writer.execute("INSERT INTO notes VALUES (%s, 'from elsewhere', 7) ON CONFLICT DO NOTHING", [400 + number])
        writer.execute("UPDATE notes SET title = 'from elsewhere' WHERE id = 2")
        writer.commit()
    writer.execute("SELECT pg_replication_origin_session_reset()")
    writer.execute("SELECT pg_replication_origin_drop(%s)", [origin])
    writer.commit()

    notes.follows()
    assert notes.pipeline.target.execute(
        "SELECT count(*) FROM notes_index WHERE id BETWEEN 400 AND 402"
    ).fetchone() == (3,)


@pytest.mark.proof_from(1)
def test_the_index_does_not_follow_its_own_writes(notes: Scene) -> None:
    """With a publication of all tables the stream brings what apply wrote: the worker has to come to rest."""
    notes.execute("UPDATE notes SET title = title || '.'")
    notes.follows()

    def at_rest() -> bool:
        # Of the pipeline's own row, which every transaction of the worker moves: others write WAL here, too.
        row = notes.pipeline.target.execute(
            "SELECT clock_timestamp() - updated_at > interval '1.5 s' FROM cdcsync.pipelines"
        ).fetchone()
        return row == (True,)

    until(at_rest, "the worker to come to rest")
    counted = notes.pipeline.target.execute("SELECT count(*) FROM cdcsync.indexes").fetchone()
    assert counted == (len(notes.pipeline.config.indexes),)


def test_commits_that_wait_for_a_standby_are_indexed_and_stay_so(
    make_scene: MakeScene, make_cluster: Callable[..., Cluster]
) -> None:
    """Such a commit is delivered before any snapshot sees it: what is read again must wait until one does."""
    cluster = make_cluster()
    big = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) i)"
    scene = make_scene(
        [
            "CREATE TABLE slow (id int PRIMARY KEY, title text, body text)",
            f"INSERT INTO slow SELECT i, 'slow ' || i, {big} FROM generate_series(1, 3) i",
        ],
        {"slow": Followed("slow", "{title} {body}")},
        source=cluster.dsn(),
    )
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin, psycopg.connect(cluster.dsn()) as waiting:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        admin.execute("SELECT pg_reload_conf()")
        until(lambda: admin.execute("SHOW synchronous_standby_names").fetchone() == ("nobody",), "the setting")
        waiting.execute("INSERT INTO slow VALUES (10, 'waits', 'for a standby')")
        waiting.execute("UPDATE slow SET title = 'needs its body' WHERE id = 1")
        waiting.execute("DELETE FROM slow WHERE id = 2")
        waiting.pgconn.send_query(b"COMMIT")
        until(
            lambda: admin.execute("SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'").fetchone() is not None,
            "the commit to wait",
        )
        requested = scene.command("replay", "slow", "--detach")
        assert requested.returncode == 0, requested.stderr

        admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        admin.execute("SELECT pg_reload_conf()")
        while waiting.pgconn.get_result() is not None:
            pass

    scene.follows()
    assert scene.pipeline.target.execute("SELECT count(*) FROM slow_index WHERE id IN (2, 10)").fetchone() == (1,)
