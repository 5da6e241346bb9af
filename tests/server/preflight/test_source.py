"""What is told of a source that cannot be followed: server, role, slot, publication."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import psycopg
import pytest
from psycopg import conninfo, pq

from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.sessions import connect
from cdcsync.source.catalog import read_server
from cdcsync.target.ddl.shared import create_shared
from tests.support.preflight import ARTICLES, Role, configured, examined, the_error, warnings
from tests.support.servers import Database, Server
from tests.support.workers import until

pytestmark = pytest.mark.server

SLOT = "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')"
DROP = r"SELECT pg_drop_replication_slot\('\w+'\)"


async def has_checkpoint(database: Database, slot: str, checkpoint: str | None) -> None:
    """Set up what all indexes of a pipeline share, with its checkpoint."""
    async with await connect(database.dsn, "target") as target, target.transaction():
        await create_shared(target, "cdcsync")
        statement = "INSERT INTO cdcsync.pipelines (slot, publication, checkpoint) VALUES (%s, 'cdcsync', %s)"
        await target.execute(statement, [slot, checkpoint])


@contextlib.contextmanager
def walsender(dsn: str) -> Iterator[pq.abc.PGconn]:
    """Open a replication connection."""
    connection = pq.PGconn.connect(f"{dsn} replication=database".encode())
    try:
        assert connection.status == pq.ConnStatus.OK, connection.error_message
        yield connection
    finally:
        connection.finish()


async def test_a_wal_level_below_logical_is_told_with_the_statement_that_raises_it(
    make_cluster: Callable[..., Cluster], database: Database
) -> None:
    source = make_cluster(settings={"wal_level": "replica"})
    with psycopg.connect(source.dsn(), autocommit=True) as connection:
        connection.execute(ARTICLES)
    error = the_error(await examined(configured(source.dsn(), database.dsn)))
    assert "wal_level is replica" in error.message
    assert "ALTER SYSTEM SET wal_level = 'logical'" in str(error.hint)


async def test_a_standby_is_refused_as_source_and_as_target(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        connection.execute(f"{ARTICLES}; CREATE EXTENSION vector")
    with cluster.standby() as standby:
        report = await examined(configured(standby.dsn(), standby.dsn()))
        with psycopg.connect(standby.dsn(), autocommit=True) as connection, pytest.raises(psycopg.Error):
            connection.execute("SELECT pg_logical_emit_message(true, 'mark', '')")
    assert [(finding.where, "standby" in finding.message) for finding in report.errors] == [
        ("source", True),
        ("target", True),
    ]


async def test_a_dsn_of_several_hosts_that_lets_a_standby_in_is_refused_whichever_answers(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        connection.execute(f"{ARTICLES}; CREATE EXTENSION IF NOT EXISTS vector")
    with cluster.standby() as standby:
        ports = f"{cluster.port},{standby.port}"
        dsn = conninfo.make_conninfo(cluster.dsn(), host="127.0.0.1,127.0.0.1", port=ports)
        refused = await examined(configured(dsn, f"{dsn} target_session_attrs=prefer-standby"))
        primary = f"{dsn} target_session_attrs=read-write"
        accepted = await examined(configured(primary, primary))
    assert [finding.where for finding in refused.errors if finding.where.endswith(".dsn")] == [
        "source.dsn",
        "target.dsn",
    ]
    assert all("target_session_attrs=read-write" in str(one.hint) for one in refused.errors[:1])
    assert accepted.errors == []


async def test_a_role_without_replication_is_told_how_to_get_it(lone_database: Database, role: Role) -> None:
    lone_database.execute(f"{ARTICLES}; ALTER ROLE {role.name} NOREPLICATION; GRANT SELECT ON articles TO {role.name}")
    lone_database.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")
    error = the_error(await examined(configured(role.dsn, lone_database.dsn)))
    assert error.message == f"the role {role.name} may not replicate"
    assert f"ALTER ROLE {role.name} REPLICATION" in str(error.hint)


async def test_a_member_of_the_replication_role_of_amazon_rds_counts_as_one_that_may_replicate(
    lone_database: Database, role: Role
) -> None:
    lone_database.execute(f"CREATE ROLE rds_replication; ALTER ROLE {role.name} NOREPLICATION")
    try:
        lone_database.execute(f"GRANT rds_replication TO {role.name}")
        async with await connect(role.dsn, "source") as connection:
            assert (await read_server(connection)).may_replicate
    finally:
        lone_database.execute("DROP ROLE rds_replication")


async def test_a_server_without_a_free_slot_is_refused(lone_database: Database) -> None:
    lone_database.execute(ARTICLES)
    taken = [f"{lone_database.name}_{number}" for number in range(2)]
    for slot in taken:
        lone_database.execute(SLOT, [slot])
    error = the_error(await examined(configured(lone_database.dsn)))
    assert error.message == "all 2 replication slots are taken"
    lone_database.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")
    assert (await examined(configured(lone_database.dsn, slot=taken[0]))).errors == []


async def test_a_server_without_a_free_sender_is_refused(lone_database: Database) -> None:
    lone_database.execute(ARTICLES)
    with walsender(lone_database.dsn), walsender(lone_database.dsn):
        error = the_error(await examined(configured(lone_database.dsn)))
    assert error.message == "all 2 WAL senders are taken"


@pytest.mark.parametrize("failover", [True, False])
async def test_standbys_that_a_failover_slot_would_wait_for_in_vain_are_told_with_what_to_do_about_each(
    make_cluster: Callable[..., Cluster], database: Database, failover: bool
) -> None:
    cluster = make_cluster()
    with psycopg.connect(cluster.dsn(), autocommit=True) as source:
        if source.info.server_version < 170000:
            pytest.skip("needs PostgreSQL 17")
        source.execute(ARTICLES)
        source.execute(SLOT, ["decoded"])
        source.execute("SELECT pg_create_physical_replication_slot(one) FROM unnest('{idle,read}'::text[]) AS one")
        config = configured(cluster.dsn(), database.dsn)
        config = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, failover=failover))
        assert not warnings(await examined(config))
        source.execute("ALTER SYSTEM SET synchronized_standby_slots = 'gone, read, decoded, idle'")
        assert source.execute("SELECT pg_reload_conf()").fetchone() == (True,)
        until(lambda: shown(cluster).startswith("gone"), "the setting")
        with physical(cluster.dsn(), "read"):
            told = warnings(await examined(config))
            if not failover:
                assert not told
                return
            lacking, stopped = told
            for said in ("gone (does not exist)", "decoded (is logical)"):
                assert said in lacking.message
            assert "idle (has no reader now)" in stopped.message
            assert "read (" not in lacking.message + stopped.message
            # A standby that is away for a moment keeps its name: without it, a failover could lose what was sent.
            advice, _, _ = str(stopped.hint).partition("ALTER SYSTEM SET")
            assert advice.startswith("start the standby with primary_slot_name = 'idle'; only if it stays away, ")
            for warning, left in ((lacking, "idle, read"), (stopped, "read")):
                for statement in str(warning.hint).rpartition(": ")[2].split("; "):
                    source.execute(statement.encode())
                until(partial(shows, cluster, left), "the remedy")
                told = told[1:]
                assert [one.message for one in warnings(await examined(config))] == [one.message for one in told]


def shows(cluster: Cluster, standbys: str) -> bool:
    return shown(cluster) == standbys


def shown(cluster: Cluster) -> str:
    """Return the standbys that a new session sees."""
    with psycopg.connect(cluster.dsn()) as connection:
        return str(connection.execute("SHOW synchronized_standby_slots").fetchone()[0])  # type: ignore[index]


@contextlib.contextmanager
def physical(dsn: str, slot: str) -> Iterator[None]:
    """Read a physical slot, as a standby does."""
    connection = pq.PGconn.connect(f"{dsn}?replication=true".encode())
    try:
        assert connection.status == pq.ConnStatus.OK, connection.error_message
        end = connection.exec_(b"IDENTIFY_SYSTEM").get_value(0, 2) or b""
        result = connection.exec_(f"START_REPLICATION SLOT {slot} PHYSICAL {end.decode()}".encode())
        assert result.status == pq.ExecStatus.COPY_BOTH, connection.error_message
        yield
    finally:
        connection.finish()


async def test_a_slot_that_nobody_reads_is_told_before_the_server_invalidates_it_for_that(
    make_cluster: Callable[..., Cluster], database: Database
) -> None:
    cluster = make_cluster()
    with psycopg.connect(cluster.dsn(), autocommit=True) as source:
        if source.info.server_version < 180000:
            pytest.skip("needs PostgreSQL 18")
        source.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
        source.execute(SLOT, ["left"])
        await has_checkpoint(database, "left", "0/1")
        config = configured(cluster.dsn(), database.dsn, slot="left")
        for timeout, is_told in (("0", False), ("1d", False), ("1s", True)):
            source.execute(f"ALTER SYSTEM SET idle_replication_slot_timeout = '{timeout}'".encode())
            source.execute("SELECT pg_reload_conf()")

            def expires() -> bool:
                with psycopg.connect(cluster.dsn()) as connection:
                    setting = connection.execute(
                        "SELECT current_setting('idle_replication_slot_timeout') = %s AND (NOT %s OR"
                        " clock_timestamp() - inactive_since > '1 s') FROM pg_replication_slots",
                        [timeout, is_told],  # noqa: B023
                    ).fetchone()
                    return setting == (True,)

            until(expires, "the setting")
            told = [one for one in warnings(await examined(config)) if "idle_replication_slot_timeout" in one.message]
            assert [one.where for one in told] == (["slot left"] if is_told else [])


async def test_a_slot_that_a_worker_reads_makes_a_standby_whatever_senders_are_free(lone_database: Database) -> None:
    slot = lone_database.name
    lone_database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
    lone_database.execute(SLOT, [slot])
    with walsender(lone_database.dsn) as worker, walsender(lone_database.dsn):
        worker.exec_(
            f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '2', publication_names 'cdcsync')".encode()
        )
        report = await examined(configured(lone_database.dsn, slot=slot))
    assert report.errors == []
    (warning,) = warnings(report)
    assert warning.where == f"slot {slot}"
    assert "waits as its standby" in warning.message


@pytest.mark.parametrize(
    ("system", "level", "sign"),
    [
        (None, "warning", "this pipeline has not begun"),
        ("another", "warning", "this pipeline has not begun"),
        ("this", "error", "belongs to the pipeline in the schema elsewhere"),
    ],
    ids=["nobody's", "of a pipeline of another source", "of a pipeline of this source"],
)
async def test_a_slot_that_a_pipeline_finds_at_its_beginning_may_be_another_ones(
    database: Database, system: str | None, level: str, sign: str
) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
    database.execute(SLOT, [database.name])
    if system is not None:
        async with await connect(database.dsn, "target") as target, target.transaction():
            await create_shared(target, "elsewhere")
            await target.execute(
                "INSERT INTO elsewhere.pipelines (slot, publication, checkpoint, system_identifier) SELECT %s,"
                " 'cdcsync', '0/1', CASE %s WHEN 'this' THEN system_identifier::text ELSE '1' END"
                " FROM pg_control_system()",
                [database.name, system],
            )
    report = await examined(configured(database.dsn, slot=database.name))
    told = [finding for finding in report.findings if finding.where == f"slot {database.name}"][-1]
    assert told.level == level
    assert sign in told.message
    assert "source.slot" in str(told.hint)


@pytest.mark.parametrize("on_gap", [None, "stop", "resync"], ids=["not begun", "begun", "begun and to resync"])
@pytest.mark.parametrize(
    ("create", "here", "sign"),
    [
        ("SELECT pg_create_physical_replication_slot(%s)", True, "is a physical slot"),
        ("SELECT pg_create_logical_replication_slot(%s, 'test_decoding')", True, "decodes with test_decoding"),
        (SLOT, False, "belongs to the database"),
    ],
    ids=["physical", "of another plugin", "of another database"],
)
async def test_a_slot_of_another_kind_or_database_is_refused_and_each_fix_that_is_told_ends_that(
    make_database: Callable[[], Database], create: str, here: bool, sign: str, on_gap: str | None
) -> None:
    database, other = make_database(), make_database()
    slot = f"{database.name}_other"
    await has_checkpoint(database, slot, "0/1" if on_gap else None)
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
    (database if here else other).execute(create, [slot])
    config = configured(database.dsn, slot=slot)
    config = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, on_gap=on_gap or "stop"))
    try:
        error = the_error(await examined(config))
        assert error.where == f"slot {slot}"
        assert sign in error.message
        # Indexes that exist belong to a slot of this name.
        assert ("name another slot" in str(error.hint)) == (on_gap is None)
        assert ("source.on_gap" in str(error.hint)) == (on_gap is not None)
        if on_gap is None:
            assert (await examined(configured(database.dsn))).errors == []
        (statement,) = re.findall(DROP, str(error.hint))
    finally:
        database.execute(statement)
    assert (await examined(config)).errors == []


@pytest.mark.parametrize(
    ("on_gap", "checkpoint", "levels"),
    [("stop", "0/1", ["error"]), ("resync", "0/1", ["warning"]), ("stop", None, ["warning"])],
)
async def test_a_slot_that_lost_wal_stops_the_pipeline_unless_it_may_resync_or_has_loaded_nothing(
    lone_database: Database, on_gap: str, checkpoint: str | None, levels: list[str]
) -> None:
    slot = lone_database.name
    await has_checkpoint(lone_database, slot, checkpoint)
    lone_database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
    lone_database.execute(SLOT, [slot])
    with lone_database.connect() as connection:
        for _ in range(4):
            connection.execute("INSERT INTO articles SELECT coalesce(max(id), 0) + 1 FROM articles")
            connection.execute("SELECT pg_switch_wal()")
        connection.execute("CHECKPOINT")
    config = configured(lone_database.dsn, slot=slot)
    config = msgspec.structs.replace(config, source=msgspec.structs.replace(config.source, on_gap=on_gap))
    report = await examined(config)
    told = [finding for finding in report.findings if finding.level != "ok"]
    assert [finding.level for finding in told] == levels
    assert told[0].where == f"slot {slot}"
    assert "removed WAL" in told[0].message


async def test_a_slot_that_sends_prepared_transactions_is_refused(database: Database) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
    database.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput', false, true)", [database.name])
    error = the_error(await examined(configured(database.dsn, slot=database.name)))
    assert (error.where, "two_phase = true" in error.message) == (f"slot {database.name}", True)
    assert "pg_drop_replication_slot" in str(error.hint)


@pytest.mark.parametrize(
    ("publication", "told"),
    [
        ("", "CREATE PUBLICATION cdcsync FOR TABLE"),
        ("CREATE PUBLICATION cdcsync", "ALTER PUBLICATION cdcsync ADD TABLE"),
        ("CREATE PUBLICATION cdcsync FOR TABLE articles", None),
    ],
)
async def test_a_source_whose_transactions_are_read_only_needs_a_publication_that_is_complete(
    make_database: Callable[[], Database], publication: str, told: str | None
) -> None:
    source, target = make_database(), make_database()
    source.execute(f"{ARTICLES}; {publication}")
    source.execute(f"ALTER DATABASE {source.name} SET default_transaction_read_only = on")
    errors = (await examined(configured(source.dsn, target.dsn))).errors
    assert [(told or "") in str(error.hint).replace('"', "") for error in errors] == [True] * (told is not None)


async def test_a_slot_without_its_publication_is_refused(database: Database) -> None:
    database.execute(ARTICLES)
    database.execute(SLOT, [database.name])
    error = the_error(await examined(configured(database.dsn, slot=database.name)))
    assert error.where == "publication cdcsync"
    assert f"pg_drop_replication_slot('{database.name}')" in str(error.hint)


async def test_a_publication_that_leaves_kinds_of_changes_out_is_told_the_statement_that_adds_them(
    database: Database,
) -> None:
    database.execute(f"{ARTICLES}; CREATE PUBLICATION \"Ours\" FOR TABLE articles WITH (publish = 'insert, update')")
    config = configured(database.dsn, publication="Ours")
    error = the_error(await examined(config))
    assert "does not send delete, truncate" in error.message
    assert error.hint is not None
    database.execute(error.hint)
    assert (await examined(config)).errors == []


async def test_a_database_without_an_encoding_is_warned_of(lone_server: Server, lone_database: Database) -> None:
    name = f"{lone_database.name}_ascii"
    with lone_server.connect() as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING SQL_ASCII TEMPLATE template0 LOCALE 'C'")
        try:
            ascii_database = Database(lone_database.dsn.replace(lone_database.name, name), name, lone_server)
            ascii_database.execute(f"{ARTICLES}; CREATE EXTENSION vector")
            report = await examined(configured(ascii_database.dsn))
        finally:
            connection.execute(f"DROP DATABASE {name}")
    assert report.errors == []
    assert [(finding.where, "SQL_ASCII" in finding.message) for finding in warnings(report)] == [
        ("source", True),
        ("target", True),
    ]
