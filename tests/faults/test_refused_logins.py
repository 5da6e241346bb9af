"""Servers that run and let the worker in no more, while the stream is open and flows on.

The loops beside the stream then work for nobody. If the cause is one that passes, they wait, and the worker says so; if
somebody has to correct it, the worker ends. In neither case is it the fault of an index, or of a request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.outages import make_target
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults]

ROLES = {"source": "reader", "target": "writer"}

CONFIG = """
[source]
dsn = "{source}"
slot = "s"
feedback_every_s = 1
[target]
dsn = "{target}"
[worker]
listen = "127.0.0.1:0"
log_level = "info"
{worker_lines}
[embedders.fake]
type = "hash"
dimensions = 8
[indexes.articles]
table = "articles"
text = "{{title}}"
embedder = "fake"
[indexes.notes]
table = "notes"
text = "{{title}}"
embedder = "fake"
search = "english"
"""


class Refusal(msgspec.Struct, frozen=True):
    """A way to let a role in no more: statements, and lines of pg_hba.conf.

    :ivar told: what the worker says of it.
    """

    told: str
    refuse: str = "SELECT pg_reload_conf()"
    allow: str = "SELECT pg_reload_conf()"
    hba: str = ""

    @contextmanager
    def holds(self, cluster: Cluster, side: str) -> Iterator[None]:
        """Refuse the role of a side, and end its sessions, but for the stream and for the one that holds the lock."""
        names = {"role": ROLES[side], "database": {"source": "app", "target": "target"}[side]}
        file = cluster.data / "pg_hba.conf"
        before = file.read_text()
        with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
            file.write_text(self.hba.format(**names) + before)
            admin.execute(self.refuse.format(**names).encode())
            until(lambda: not lets_in(cluster, side), "the role to be refused")
            admin.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE usename = %s AND backend_type = 'client backend' AND application_name LIKE 'cdcsync%%'"
                " AND application_name NOT LIKE 'cdcsync apply%%'",
                [ROLES[side]],
            )
            yield
            file.write_text(before)
            admin.execute(self.allow.format(**names).encode())
            until(lambda: lets_in(cluster, side), "the role to be let in again")


def dsn_of(cluster: Cluster, side: str) -> str:
    """Return the DSN of a side, whose password nobody asks for at first."""
    database = {"source": "app", "target": "target"}[side]
    return cluster.dsn(database, ROLES[side]).replace("@", ":secret@")


def lets_in(cluster: Cluster, side: str) -> bool:
    try:
        psycopg.connect(dsn_of(cluster, side)).close()
    except psycopg.OperationalError:
        return False
    return True


LASTING = {
    "pg_hba": Refusal("pg_hba.conf", hba="host {database} {role} all reject\n"),
    "password": Refusal("the server refuses the password of role {role}", hba="host all {role} all scram-sha-256\n"),
    "login": Refusal("role {role} may not log in", "ALTER ROLE {role} NOLOGIN", "ALTER ROLE {role} LOGIN"),
}

PASSING = {
    "role": Refusal(
        "role {role} has as many connections as it may",
        "ALTER ROLE {role} CONNECTION LIMIT 0",
        "ALTER ROLE {role} CONNECTION LIMIT -1",
    ),
    "privilege": Refusal(
        "the role may not connect to database {database}",
        "REVOKE CONNECT ON DATABASE {database} FROM PUBLIC",
        "GRANT CONNECT ON DATABASE {database} TO PUBLIC",
    ),
    "database": Refusal(
        "database {database} takes no connections",
        "ALTER DATABASE {database} ALLOW_CONNECTIONS false",
        "ALTER DATABASE {database} ALLOW_CONNECTIONS true",
    ),
}

SLOWLY = "backfill_max_rows_per_s = 100"

OF_SOURCE = {"the tables are not watched", "the slot is not watched", "backfills wait", "the audit waits"}

OF_TARGET = {
    "the tables are not watched",
    "backfills wait",
    "comparisons wait",
    "vectors do not settle",
    "words are not entered",
    "the audit waits",
}


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A server that holds the source and the target, each for a role of its own."""
    cluster = make_cluster()
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE app")
        admin.execute("CREATE ROLE reader LOGIN REPLICATION PASSWORD 'another'")
        admin.execute("CREATE ROLE writer LOGIN PASSWORD 'another'")
        make_target(cluster)
        admin.execute("ALTER DATABASE target OWNER TO writer")
    with psycopg.connect(cluster.dsn("app"), autocommit=True) as admin:
        for table in ("articles", "notes"):
            admin.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text NOT NULL)".encode())
            admin.execute(f"GRANT SELECT ON {table} TO reader".encode())
        admin.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 20) AS i")
        admin.execute("CREATE PUBLICATION cdcsync FOR TABLE articles, notes")
    return cluster


@pytest.fixture
def pipeline(cluster: Cluster, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    made = make_pipeline(
        CONFIG.format(
            source=dsn_of(cluster, "source"),
            target=dsn_of(cluster, "target"),
            worker_lines=SLOWLY,
        )
    )
    made.connect_source(cluster.dsn("app"))
    return made


def requests(pipeline: Pipeline) -> list[tuple[str, str, int]]:
    """Return the kind, the state and the progress of each request for one of the rows of `articles`."""
    statement = "SELECT kind, state, rows_done FROM cdcsync.backfills WHERE index_name = 'articles' ORDER BY id"
    return pipeline.target.execute(statement).fetchall()


def failed(pipeline: Pipeline) -> list[object]:
    names = ("backfill_failed", "load_ended", "index_paused", "comparison_failed", "settling_failed")
    return [event for event in pipeline.events() if event["event"] in names]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    ("refusal", "side"),
    [
        ("pg_hba", "source"),
        ("password", "source"),
        ("login", "source"),
        ("password", "target"),
    ],
)
def test_a_login_that_is_refused_ends_the_worker_and_the_load_goes_on_where_it_was(
    cluster: Cluster, pipeline: Pipeline, refusal: str, side: str
) -> None:
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 4000) AS i")
    worker = pipeline.start()
    pipeline.event("backfill_started")
    until(lambda: any(done for _, _, done in requests(pipeline)), "the load to be under way")
    assert pipeline.command("replay", "articles", "--key", "5", "--detach").returncode == 0
    with LASTING[refusal].holds(cluster, side):
        assert worker.wait(timeout=PATIENCE_S) == 1, pipeline.tail()
        said = " ".join(pipeline.tail().split())
        assert LASTING[refusal].told.format(role=ROLES[side]) in said
        assert "fix: " in said
        ((kind, state, done), (_, replay, _)) = requests(pipeline)
        assert (kind, state, replay) == ("initial", "running", "requested")
        assert 0 < done < 4000
    before = len(pipeline.events())
    pipeline.configure(pipeline.path.read_text().replace(SLOWLY, ""))
    worker = pipeline.start()
    pipeline.live()
    resumed = [event for event in pipeline.events()[before:] if event["event"] == "backfill_started"]
    assert done <= next(event["resumed_at"] for event in resumed if event["kind"] == "initial")
    until(lambda: {state for _, state, _ in requests(pipeline)} == {"done"}, pipeline.tail)
    pipeline.in_step()
    assert failed(pipeline) == []
    assert worker.poll() is None


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    ("refusal", "side"),
    [
        ("role", "source"),
        ("privilege", "source"),
        ("database", "source"),
        ("role", "target"),
    ],
)
def test_loops_that_are_let_in_no_more_are_told_of_with_the_fix_while_the_stream_flows(
    cluster: Cluster, pipeline: Pipeline, refusal: str, side: str
) -> None:
    pipeline.source.execute("INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 20) AS i")
    pipeline.hurry = {"cdcsync.worker.state.AWAY_S": 1, "cdcsync.flows.audit.rolling.FIRST_S": 0}
    worker = pipeline.start()
    pipeline.live()
    until(lambda: pipeline.get("/readyz")[0] == 200, pipeline.tail)
    told = PASSING[refusal].told.format(role=ROLES[side], database={"source": "app", "target": "target"}[side])

    def waiting() -> set[str]:
        reasons = json.loads(pipeline.get("/readyz")[1])["reasons"]
        of_loops = [reason.partition(": ") for reason in reasons if not reason.startswith("the target does not")]
        return {loop for waits, _, why in of_loops if why.startswith(told) for loop in waits.split(", ")}

    with PASSING[refusal].holds(cluster, side):
        pipeline.source.execute("ALTER TABLE articles ALTER COLUMN title TYPE text USING upper(title)")
        if side == "source":
            assert pipeline.command("replay", "articles", "--key", "5", "--detach").returncode == 0
            pipeline.source.execute("INSERT INTO notes VALUES (21, 'meanwhile')")
            pipeline.reach("notes")
        expected = OF_SOURCE if side == "source" else OF_TARGET
        until(lambda: waiting() >= expected, lambda: f"all loops, beside {waiting()}; {pipeline.tail()}")
        warned = [event for event in pipeline.events() if event["event"] == "watch_waits"]
        assert any(told in event["error"] and event["level"] == "warning" for event in warned)
        if side == "source":
            problems = pipeline.answer("status")["problems"]
            assert any(one.startswith("the source cannot be read") and told in one for one in problems)
            shown = "the tables are not watched"  # as of the next reading
            until(lambda: shown in str(json.loads(pipeline.get("/status")[1])["problems"]), pipeline.tail)
    until(pipeline.in_step_now, lambda: pipeline.difference)
    until(lambda: pipeline.get("/readyz")[0] == 200, lambda: str(pipeline.get("/readyz")))
    until(lambda: {state for _, state, _ in requests(pipeline)} == {"done"}, lambda: str(requests(pipeline)))
    assert failed(pipeline) == []
    assert worker.poll() is None
