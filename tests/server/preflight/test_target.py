"""What is told of a target that cannot hold the index: server, pgvector, privileges, relations in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import conninfo

from tests.support.indexes import make_spec
from tests.support.preflight import ARTICLES, Role, configured, examined, lay_out, the_error
from tests.support.servers import Database
from tests.support.workers import until

pytestmark = pytest.mark.server


async def test_a_missing_pgvector_is_installed_by_run_where_the_role_may(database: Database) -> None:
    database.execute(f"{ARTICLES}; DROP EXTENSION vector")
    report = await examined(configured(database.dsn))
    assert report.errors == []
    assert any("which run installs" in finding.message for finding in report.findings)


async def test_a_missing_pgvector_that_the_role_may_not_install_is_told_as_a_statement(
    make_lone_database: Callable[[], Database], lone_database: Database, role: Role
) -> None:
    lone_database.execute(f"DROP EXTENSION vector; GRANT CREATE ON DATABASE {lone_database.name} TO {role.name}")
    lone_database.execute(f"GRANT CREATE ON SCHEMA public TO {role.name}")
    source = make_lone_database()
    source.execute(ARTICLES)
    config = configured(source.dsn, role.dsn)
    error = the_error(await examined(config))
    statement = str(error.hint).partition(": ")[2]
    assert statement == "CREATE EXTENSION vector SCHEMA public"
    lone_database.execute(statement)
    assert (await examined(config)).errors == []


@pytest.mark.parametrize(
    ("version", "level"), [("0.6.2", "error"), ("0.7.0", "warning"), ("0.8.3", "warning"), ("0.10.0", "ok")]
)
async def test_an_old_pgvector_is_refused_or_warned_of(database: Database, version: str, level: str) -> None:
    database.execute(ARTICLES)
    database.execute("UPDATE pg_extension SET extversion = %s WHERE extname = 'vector'", [version])
    report = await examined(configured(database.dsn))
    told = [finding for finding in report.findings if f"pgvector {version}" in finding.message]
    assert max(finding.level != "ok" for finding in told) is (level != "ok")
    assert {finding.hint for finding in told if finding.level == level} <= {"ALTER EXTENSION vector UPDATE", None}
    assert level in {finding.level for finding in told}
    assert bool(report.errors) is (level == "error")


async def test_a_pgvector_in_a_schema_that_the_role_may_not_use_is_told(
    lone_database: Database, make_lone_database: Callable[[], Database], role: Role
) -> None:
    lone_database.execute("CREATE SCHEMA tools; ALTER EXTENSION vector SET SCHEMA tools")
    lone_database.execute(f"GRANT CREATE ON DATABASE {lone_database.name} TO {role.name}")
    lone_database.execute(f"GRANT CREATE ON SCHEMA public TO {role.name}")
    source = make_lone_database()
    source.execute(ARTICLES)
    config = configured(source.dsn, role.dsn)
    error = the_error(await examined(config))
    assert error.hint == f"GRANT USAGE ON SCHEMA tools TO {role.name}"
    lone_database.execute(error.hint)
    assert (await examined(config)).errors == []


async def test_every_privilege_that_the_role_lacks_in_the_target_is_told_with_its_grant(
    lone_database: Database, make_lone_database: Callable[[], Database], role: Role
) -> None:
    lone_database.execute(f"REVOKE TEMPORARY ON DATABASE {lone_database.name} FROM PUBLIC")
    source = make_lone_database()
    source.execute(ARTICLES)
    config = configured(source.dsn, role.dsn)
    report = await examined(config)
    assert [finding.hint for finding in report.errors] == [
        f"GRANT TEMPORARY ON DATABASE {lone_database.name} TO {role.name}",
        f"CREATE SCHEMA cdcsync AUTHORIZATION {role.name}",
        f"GRANT USAGE, CREATE ON SCHEMA public TO {role.name}",
    ]
    for finding in report.errors:
        lone_database.execute(str(finding.hint))
    assert (await examined(config)).errors == []


async def test_a_schema_without_the_privilege_to_create_in_it_is_told(
    lone_database: Database, make_lone_database: Callable[[], Database], role: Role
) -> None:
    lone_database.execute(f"CREATE SCHEMA cdcsync; GRANT CREATE ON SCHEMA public TO {role.name}")
    source = make_lone_database()
    source.execute(ARTICLES)
    error = the_error(await examined(configured(source.dsn, role.dsn)))
    assert (error.where, error.hint) == ("target.schema", f"GRANT USAGE, CREATE ON SCHEMA cdcsync TO {role.name}")


async def test_tables_that_another_role_made_are_told_with_the_role_to_connect_as(
    lone_database: Database, make_lone_database: Callable[[], Database], role: Role
) -> None:
    await lay_out(lone_database, make_spec())
    lone_database.execute(f"GRANT ALL ON SCHEMA cdcsync, public TO {role.name}")
    source = make_lone_database()
    source.execute(ARTICLES)
    report = await examined(configured(source.dsn, role.dsn))
    unowned = [finding for finding in report.errors if "does not own" in finding.message]
    command = f"psql -d {lone_database.name} -v target_role={role.name} -v former_role=postgres"
    assert {finding.hint for finding in unowned} == {
        "connect as postgres, or hand all of it over, as an administrator of the target:"
        f" cdcsync config roles | {command}"
    }
    assert "cdcsync.articles_chunks" in " ".join(finding.message for finding in unowned)
    assert "cdcsync.backfills" in " ".join(finding.message for finding in unowned)
    assert "public.articles_index" in " ".join(finding.message for finding in unowned)


@pytest.mark.parametrize("name", ["indexes", "articles_chunks", "articles_vectors_1"])
async def test_a_foreign_relation_where_ours_belong_is_never_touched(database: Database, name: str) -> None:
    database.execute(f"{ARTICLES}; CREATE SCHEMA cdcsync; CREATE TABLE cdcsync.{name} ()")
    error = the_error(await examined(configured(database.dsn)))
    assert error.where == "target.schema"
    assert f"cdcsync.{name}" in error.message


@pytest.mark.parametrize("limited", ["DATABASE {}", "ROLE CURRENT_USER IN DATABASE {}", "ROLE CURRENT_USER", "SYSTEM"])
async def test_the_remedy_for_read_only_transactions_works_as_it_is_typed(
    make_lone_database: Callable[[], Database], limited: str
) -> None:
    source, target = make_lone_database(), make_lone_database()
    source.execute(ARTICLES)
    writes = conninfo.make_conninfo(source.dsn, options="-c default_transaction_read_only=off")
    config, altered = configured(writes, target.dsn), f"ALTER {limited.format(target.name)}"
    with target.connect() as administrator:
        administrator.execute("SET default_transaction_read_only = off")
        administrator.execute(f"{altered} SET default_transaction_read_only = on".encode())
        administrator.execute("SELECT pg_reload_conf()")
        try:
            until(lambda: target.execute("SHOW default_transaction_read_only") == [("on",)], "the setting")
            error = the_error(await examined(config))
            for query in str(error.hint).split("; then "):
                target.execute(query)
            until(lambda: target.execute("SHOW default_transaction_read_only") == [("off",)], "the remedy")
            assert (await examined(config)).errors == []
        finally:
            administrator.execute(f"{altered} RESET default_transaction_read_only".encode())
            administrator.execute("SELECT pg_reload_conf()")


async def test_read_only_transactions_by_the_dsn_s_own_options_are_told_as_such(database: Database) -> None:
    database.execute(ARTICLES)
    reads = conninfo.make_conninfo(database.dsn, options="-c default_transaction_read_only=on")
    assert "out of the DSN's options" in str(the_error(await examined(configured(database.dsn, reads))).hint)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("default_transaction_read_only = on", "transactions are read-only"),
        ("session_replication_role = replica", "triggers of our tables would not act"),
    ],
)
async def test_a_target_whose_sessions_cannot_do_their_work_is_refused(
    make_database: Callable[[], Database], setting: str, told: str
) -> None:
    source, target = make_database(), make_database()
    source.execute(ARTICLES)
    target.execute(f"ALTER DATABASE {target.name} SET {setting}")
    config = configured(source.dsn, target.dsn)
    error = the_error(await examined(config))
    assert told in error.message
