"""A table that somebody holds locked costs the index that needs it, and no other; then that index is right, too."""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
from collections.abc import Callable, Iterator
from functools import partial

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.configs import NO_AUDIT, configuration
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server]

CUSTOMER = """
[indexes.NAME.related.customer]
table = "customers"
on = { id = "customer_id" }
"""

TABLES = [
    "CREATE TABLE sound (id int PRIMARY KEY, title text)",
    "INSERT INTO sound SELECT i, 'title ' || i FROM generate_series(1, 20) i",
    "CREATE TABLE big (id int PRIMARY KEY, title text, body text)",
    "ALTER TABLE big ALTER COLUMN body SET STORAGE EXTERNAL",
    "INSERT INTO big SELECT i, 'title ' || i, repeat('body ' || i || ' ', 500) FROM generate_series(1, 5) i",
    "CREATE TABLE parted (id int PRIMARY KEY, title text, body text) PARTITION BY RANGE (id)",
    "CREATE TABLE parted_low PARTITION OF parted FOR VALUES FROM (0) TO (100)",
    "CREATE TABLE parted_high PARTITION OF parted FOR VALUES FROM (100) TO (200)",
    "ALTER TABLE parted ALTER COLUMN body SET STORAGE EXTERNAL",
    "INSERT INTO parted SELECT i, 'title ' || i, repeat('body ' || i || ' ', 500) FROM generate_series(98, 103) i",
    "CREATE TABLE chosen (id int PRIMARY KEY, title text, stars int)",
    "INSERT INTO chosen SELECT i, 'title ' || i, i FROM generate_series(1, 20) i",
    "CREATE TABLE customers (id int PRIMARY KEY, name text)",
    "CREATE TABLE orders (id int PRIMARY KEY, title text, customer_id int)",
    "INSERT INTO customers SELECT i, 'customer ' || i FROM generate_series(1, 5) i",
    "INSERT INTO orders SELECT i, 'order ' || i, 1 + i % 4 FROM generate_series(1, 30) i",
    """CREATE VIEW orders_expected AS SELECT o.*, c.name AS "customer.name"
       FROM orders o LEFT JOIN customers c ON c.id = o.customer_id""",
]

INDEXES = {
    "sound": Followed("sound"),
    "big": Followed("big", "{title} {body}"),
    "parted": Followed("parted", "{title} {body}"),
    "chosen": Followed("chosen", where="abs(stars) % 2 = 0"),
    "orders": Followed("orders", "{title} of {customer.name}", more=CUSTOMER),
}

HURRY = {"cdcsync.postgres.locking.LOCKED_OUT_S": 0.5, "cdcsync.status.stream.LOCKED_S": 0.1}


@pytest.fixture(scope="module")
def locked(make_scene: MakeScene) -> Scene:
    made = make_scene(TABLES, INDEXES, worker_lines=NO_AUDIT, hurry=HURRY)
    made.oracle_reads("orders", "orders_expected")
    return made


@contextlib.contextmanager
def held(made: Scene, table: str, *changes: str, mode: str = "ACCESS EXCLUSIVE") -> Iterator[psycopg.Connection]:
    """Hold a table locked exclusively from the moment on that some changes are committed; nobody gets in between."""
    dsn = made.pipeline.config.source.dsn
    with (
        psycopg.connect(dsn, application_name="migration") as holder,
        psycopg.connect(dsn) as writer,
    ):
        for change in changes:
            writer.execute(change)
        locking = threading.Thread(target=holder.execute, args=[f"LOCK TABLE ONLY {table} IN {mode} MODE"])
        locking.start()
        until(partial(asked, made, holder, table), "the lock to be asked for")
        writer.commit()
        locking.join()
        try:
            yield holder
        finally:
            holder.rollback()


def asked(made: Scene, holder: psycopg.Connection, table: str) -> bool:
    statement = "SELECT FROM pg_locks WHERE pid = %s AND relation = %s::regclass"
    return made.pipeline.source.execute(statement, [holder.info.backend_pid, table]).rowcount > 0


def owed(made: Scene, index: str) -> bool:
    """Say whether documents of an index are still to be read."""
    statement = "SELECT FROM cdcsync.backfills WHERE index_name = %s AND kind = 'related' AND finished_at IS NULL"
    return made.pipeline.target.execute(statement, [index]).rowcount > 0


CASES = {
    "unsent values": ("big", "big", ["UPDATE big SET title = 'another' WHERE id < 3"]),
    "unsent values of a partition": ("parted", "parted_high", ["UPDATE parted SET title = 'another' WHERE id > 99"]),
    "unsent values beside a locked partition": (
        "parted",
        "parted_low",
        ["UPDATE parted SET title = 'yet another' WHERE id > 99"],
    ),
    "a condition that the source decides": (
        "chosen",
        "chosen",
        ["UPDATE chosen SET stars = stars + 1 WHERE id < 6", "DELETE FROM chosen WHERE id = 20"],
    ),
    "the table of documents with related rows": (
        "orders",
        "orders",
        ["UPDATE customers SET name = 'one' WHERE id = 1", "DELETE FROM customers WHERE id = 3"],
    ),
    "the table of related rows": (
        "orders",
        "customers",
        ["UPDATE orders SET title = 'anew' WHERE id < 4", "INSERT INTO orders VALUES (99, 'x', 2)"],
    ),
    "both, changed in one transaction": (
        "orders",
        "orders",
        ["UPDATE customers SET name = 'two' WHERE id = 2", "UPDATE orders SET title = 'x' WHERE id = 9"],
    ),
}


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("case", CASES)
def test_the_stream_goes_on_without_what_is_to_be_read_from_a_locked_table(locked: Scene, case: str) -> None:
    index, table, changes = CASES[case]
    with held(locked, table, *changes):
        for number in range(3):
            locked.execute(f"UPDATE sound SET title = '{case} {number}' WHERE id = {number + 1}")
            until(partial(locked.equal, "sound"), locked.pipeline.tail)
        assert locked.state(index)[0] == "live"
        until(partial(owed, locked, index), locked.pipeline.tail)
    locked.follows()
    assert locked.pipeline.times("stream_waits") == 0


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(("index", "table"), [("big", "big"), ("parted", "parted_low"), ("orders", "customers")])
def test_who_holds_a_table_locked_is_told_by_readiness_and_the_page(locked: Scene, index: str, table: str) -> None:
    with held(locked, table) as holder:
        told = f"public.{table} is locked by pid {holder.info.backend_pid} (migration"
        until(lambda: any(told in one and f"index {index} " in one for one in reasons(locked)), locked.pipeline.tail)
        shown = json.loads(locked.pipeline.get("/status")[1])
        assert told in shown["indexes"][index]["locked"]
        assert shown["indexes"]["sound"]["locked"] is None
        assert any(told in one and "pg_terminate_backend" in one for one in shown["problems"])
    until(lambda: not any("locked" in one for one in reasons(locked)), locked.pipeline.tail)


def reasons(made: Scene) -> list[str]:
    """Return why the worker is not ready, as of a reading that is made now: one that took long is not soon repeated."""
    made.pipeline.get("/status")
    return list(json.loads(made.pipeline.get("/readyz")[1]).get("reasons", []))


@pytest.mark.parametrize(
    "command", ["check", "status", "search sound 'title 3'", "replay sound", "replay sound --key 3", "verify sound"]
)
def test_nothing_waits_for_a_lock_on_what_no_index_is_about(locked: Scene, command: str) -> None:
    databases = {locked.source.dsn: locked.source, locked.target.dsn: locked.target}
    for database in databases.values():
        database.execute("CREATE TABLE IF NOT EXISTS stranger (body text) PARTITION BY LIST (body)")
        database.execute("CREATE TABLE IF NOT EXISTS stranger_a PARTITION OF stranger FOR VALUES IN ('a')")
        # Where catalogs are large, the server asks its functions about each table before it looks at the names.
        database.execute("VACUUM ANALYZE pg_catalog.pg_class, pg_catalog.pg_inherits, pg_catalog.pg_namespace")
    with contextlib.ExitStack() as stack:
        for dsn in databases:
            holder = stack.enter_context(psycopg.connect(dsn, application_name="migration"))
            holder.execute("TRUNCATE stranger")
        done = locked.command(*shlex.split(command))
        assert done.returncode == 0, done.stderr
        locked.follows("sound")
    assert not [one for one in locked.pipeline.events() if one["event"] == "table_locked" and one["index"] == "sound"]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("table", ["big", "parted_low", "chosen", "orders", "customers"])
def test_a_start_beside_a_locked_table_follows_every_index_at_once(locked: Scene, table: str) -> None:
    pipeline = locked.pipeline
    pipeline.stop(pipeline.processes[-1])
    with held(locked, table):
        streaming = pipeline.times("streaming")
        pipeline.start()
        until(lambda: pipeline.times("streaming") > streaming, pipeline.tail)
        locked.execute(f"UPDATE sound SET title = 'beside {table}' WHERE id = 4")
        until(partial(locked.equal, "sound"), pipeline.tail)
        assert {locked.state(index)[0] for index in INDEXES} == {"live"}
    locked.follows()


NEW = {
    "a condition cannot be tried": ("chosen", "ACCESS EXCLUSIVE", Followed("chosen", where="abs(stars) % 2 = 0")),
    "a related table cannot be read": ("customers", "ACCESS EXCLUSIVE", INDEXES["orders"]),
    "a table cannot be published": ("chosen", "SHARE UPDATE EXCLUSIVE", Followed("chosen")),
}
"""Which table is held how, and the index that is new."""


@pytest.mark.proof
@pytest.mark.parametrize("why", NEW)
def test_a_new_index_whose_table_is_locked_waits_alone_and_the_reason_is_the_lock(
    make_scene: MakeScene, why: str
) -> None:
    table, mode, index = NEW[why]
    name = index.table
    made = make_scene(
        TABLES, {"sound": Followed("sound")}, worker_lines=NO_AUDIT, hurry={"cdcsync.model.pauses.FIRST_DELAY_S": 2.0}
    )
    pipeline = made.pipeline
    pipeline.stop(pipeline.processes[0])
    made.reconfigured(lambda text: f"{text}\n{index.section(name)}\n")
    with held(made, table, mode=mode) as holder:
        pipeline.start()
        made.execute("UPDATE sound SET title = 'meanwhile' WHERE id = 1")
        until(partial(made.equal, "sound"), pipeline.tail)
        assert pipeline.processes[-1].poll() is None
        if mode == "ACCESS EXCLUSIVE":
            said = made.command("check").stdout
            assert f"public.{table} is locked by pid {holder.info.backend_pid} (migration" in said
            said += made.command("plan").stderr
            assert "cannot be used" not in said
            assert "cannot be read" not in said
        else:
            assert "cannot be added to the publication" in made.pipeline.event("index_paused")["error"]
    until(partial(live, made, name), pipeline.tail)
    if name == "orders":
        made.oracle_reads("orders", "orders_expected")
    made.follows()
    assert len(pipeline.processes) == 2


def live(made: Scene, name: str) -> bool:
    """Say whether an index is there and live."""
    row = made.pipeline.target.execute("SELECT state FROM cdcsync.indexes WHERE name = %s", [name]).fetchone()
    return row == ("live",)


SOON_PAUSED = {
    "cdcsync.target.locked_session.LOCK_WAIT_MS": 200,
    "cdcsync.flows.follow.apply.MOST_ATTEMPTS": 3,
    "cdcsync.flows.setup.indexes.LOCK_ATTEMPTS": 2,
    "cdcsync.model.pauses.FIRST_DELAY_S": 5.0,
}


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("broken", [False, True], ids=["", "the connection breaks meanwhile"])
@pytest.mark.parametrize("relation", ["chunks", "backlog", "vectors_1_fresh"])
def test_tables_of_one_index_in_the_target_that_stay_locked_pause_that_index_alone(
    make_scene: MakeScene, relation: str, broken: bool
) -> None:
    made = make_scene(
        TABLES,
        {"sound": Followed("sound"), "chosen": Followed("chosen")},
        worker_lines=NO_AUDIT,
        hurry=SOON_PAUSED,
    )
    with held(made, f"cdcsync.chosen_{relation}") as holder:
        if broken:
            made.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync %'"
            )
        made.execute("UPDATE chosen SET title = 'held up' WHERE id = 1", "UPDATE sound SET title = 'x' WHERE id = 1")
        assert f"is locked by pid {holder.info.backend_pid} (migration" in made.paused("chosen")
        until(partial(made.equal, "sound"), made.pipeline.tail)
    made.heals()
    assert len(made.pipeline.processes) == 1


@pytest.mark.proof
def test_vectors_that_cannot_be_discarded_for_a_request_pause_that_index_alone_and_are_made_anew_later(
    make_scene: MakeScene,
) -> None:
    made = make_scene(
        TABLES,
        {"sound": Followed("sound"), "chosen": Followed("chosen")},
        worker_lines=NO_AUDIT,
        hurry=SOON_PAUSED,
    )
    stored = "SELECT max(stored_at) < %s FROM cdcsync.chosen_vectors_1"
    with held(made, "cdcsync.chosen_vectors_1_fresh", mode="SHARE"):
        (asked_at,) = made.pipeline.target.execute(
            "INSERT INTO cdcsync.backfills (index_name, kind, force_embed) VALUES ('chosen', 'replay', true)"
            " RETURNING clock_timestamp()"
        ).fetchone() or (None,)
        made.paused("chosen")
        made.execute("UPDATE sound SET title = 'x' WHERE id = 1")
        until(partial(made.equal, "sound"), made.pipeline.tail)
        assert made.pipeline.target.execute(stored, [asked_at]).fetchone() == (True,)
    made.heals()
    oldest = "SELECT min(stored_at) > %s FROM cdcsync.chosen_vectors_1"
    until(lambda: made.pipeline.target.execute(oldest, [asked_at]).fetchone() == (True,), made.pipeline.tail)
    assert len(made.pipeline.processes) == 1


@pytest.mark.proof
def test_requests_and_audits_of_the_others_go_on_beside_an_index_whose_tables_in_the_target_are_locked(
    make_cluster: Callable[..., Cluster], database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    source = make_cluster().dsn()  # another server: comparisons wait for what is open on the source
    names = ("chosen", "sound")
    text = configuration(source, target=database.dsn, indexes={name: {"text": "{title}"} for name in names})
    pipeline = make_pipeline(text)
    pipeline.hurry |= {
        "cdcsync.postgres.locking.LOCKED_OUT_S": 0.5,
        **{f"cdcsync.flows.audit.rolling.{name}": 0.3 for name in ("FIRST_S", "REST_S", "NOT_LIVE_S")},
    }
    for name in names:
        pipeline.source.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)")
        pipeline.source.execute(f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 20) i")
    pipeline.start()
    pipeline.live()
    pipeline.in_step()

    def answered(index: str) -> bool:
        """Whether requests and the audit of an index have all been through since they were asked for."""
        return pipeline.target.execute(
            "SELECT count(*) = 2 AND (SELECT finished_at > max(b.requested_at) FROM cdcsync.audits"
            " WHERE index_name = %s) FROM cdcsync.backfills b WHERE index_name = %s AND kind IN ('resync', 'compare')"
            " AND state = 'done'",
            [index, index],
        ).fetchone() == (True,)

    with psycopg.connect(database.dsn) as holder:
        holder.execute("LOCK TABLE cdcsync.chosen_chunks IN ACCESS EXCLUSIVE MODE")
        for name in names:
            for kind, phase in (("resync", "orphans"), ("compare", "rows")):
                pipeline.target.execute(
                    "INSERT INTO cdcsync.backfills (index_name, kind, phase) VALUES (%s, %s, %s)", [name, kind, phase]
                )
        until(partial(answered, "sound"), pipeline.tail)
        assert not answered("chosen")
    until(partial(answered, "chosen"), pipeline.tail)


@pytest.mark.proof
@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "SHARE UPDATE EXCLUSIVE"])
def test_a_first_start_whose_only_table_is_locked_follows_it_once_it_is_free(
    make_pipeline: Callable[[str], Pipeline], database: Database, mode: str
) -> None:
    pipeline = make_pipeline(configuration(database.dsn, indexes={"notes": {"text": "{title}"}}))
    pipeline.hurry |= {"cdcsync.model.pauses.FIRST_DELAY_S": 2.0}
    pipeline.source.execute("CREATE TABLE notes (id int PRIMARY KEY, title text)")
    pipeline.source.execute("INSERT INTO notes VALUES (1, 'before')")
    with psycopg.connect(database.dsn) as holder:
        holder.execute(f"LOCK TABLE notes IN {mode} MODE")
        pipeline.start()
        pipeline.event("slot_creating")  # which waits for all transactions that have written
    pipeline.live()
    pipeline.source.execute("INSERT INTO notes VALUES (2, 'after')")
    until(pipeline.in_step_now, pipeline.tail)
