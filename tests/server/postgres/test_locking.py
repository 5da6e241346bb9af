"""A change of what others use is given up after a few attempts, and its refusal names one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import psycopg
import pytest
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.demo.cluster import Cluster
from cdcsync.errors import SetupError, SourceUnavailable
from cdcsync.postgres.locking import BRIEFLY, BUILDING_WAITS, attempt, exclusive_locks, publishing_locks, until_locked
from cdcsync.postgres.sessions import connect
from tests.support.clusters import OTHER_VERSIONS
from tests.support.indexes import LiveIndex
from tests.support.servers import Database
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("use", ["SELECT FROM", "DELETE FROM", "LOCK TABLE"])
async def test_a_change_is_given_up_while_somebody_uses_the_table_and_made_afterwards(
    index: LiveIndex, target: Database, use: str
) -> None:
    table = QualifiedName("cdcsync", "articles_chunks")

    async def change() -> str:
        async with index.connection.transaction():
            await index.connection.execute(BRIEFLY)
            await index.connection.execute("ALTER TABLE cdcsync.articles_chunks ADD COLUMN more int")
        return "made"

    with psycopg.connect(target.dsn, application_name="a dump") as other:
        other.execute(f"{use} cdcsync.articles_chunks".encode())
        with pytest.raises(SetupError) as refused:
            await attempt(index.connection, change, [table], where="index articles")
        pid = other.info.backend_pid
    assert f"cdcsync.articles_chunks is locked by pid {pid} (a dump" in str(refused.value)
    assert f"pg_terminate_backend({pid})" in str(refused.value.hint)
    assert await attempt(index.connection, change, [table], where="index articles") == "made"


@pytest.mark.parametrize(
    ("lock", "name"),
    [
        ("COMMENT ON PUBLICATION of_it IS 'edited'", "publication of_it"),
        ("LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE", "public.t"),
        ("ALTER PUBLICATION of_it SET TABLE t", "publication of_it"),
    ],
    ids=["the publication", "a table", "both"],
)
async def test_who_keeps_a_publication_from_being_changed_is_named(database: Database, lock: str, name: str) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    database.execute("CREATE PUBLICATION of_it FOR TABLE t")
    database.execute("CREATE PUBLICATION another")
    async with await connect(database.dsn, "source") as ours:
        with psycopg.connect(database.dsn, application_name="an editor") as other:
            other.execute("COMMENT ON PUBLICATION another IS 'edited'")
            before = await publishing_locks(ours, "of_it", [QualifiedName("public", "t")])
            other.execute(lock.encode())
            held = await publishing_locks(ours, "of_it", [QualifiedName("public", "t")])
            pid = other.info.backend_pid
        after = await publishing_locks(ours, "of_it", [QualifiedName("public", "t")])
    assert before == after == []
    assert str(held[0]).startswith(f"{name} is locked by pid {pid} (an editor, role ")
    assert f"pg_terminate_backend({pid})" in held[0].remedy


GID = "it's \\ %s "
"""Has to be quoted in a statement. A name of the test's own follows, as such an id is one of the whole server."""


@contextmanager
def prepared(dsn: str, gid: str, *statements: str) -> Iterator[None]:
    """Leave a transaction prepared, unless it is ended meanwhile."""
    with psycopg.connect(dsn, autocommit=True) as other:
        if other.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
            pytest.skip("this server allows no prepared transactions (max_prepared_transactions = 0)")
        try:
            other.execute("BEGIN")
            for statement in statements:
                other.execute(statement.encode())
            other.execute(sql.SQL("PREPARE TRANSACTION {}").format(gid))
            yield
        finally:
            for (left,) in other.execute("SELECT gid FROM pg_prepared_xacts WHERE gid = %s", [gid]).fetchall():
                other.execute(sql.SQL("ROLLBACK PREPARED {}").format(left))


def typed(dsn: str, remedy: str | None, way: str) -> None:
    """End a prepared transaction by what a remedy says, as an operator would."""
    found = re.search(rf"{way} PREPARED (E?'(?:[^']|'')*')", remedy or "")
    assert found is not None, remedy
    with psycopg.connect(dsn, autocommit=True) as operator:
        operator.execute(found[0].encode())


@pytest.mark.parametrize("way", ["COMMIT", "ROLLBACK"])
async def test_a_prepared_transaction_that_uses_an_index_is_named_with_what_ends_it(
    index: LiveIndex, target: Database, way: str
) -> None:
    table = QualifiedName("cdcsync", "articles_chunks")

    async def change() -> str:
        async with index.connection.transaction():
            await index.connection.execute(BRIEFLY)
            await index.connection.execute("ALTER TABLE cdcsync.articles_chunks ADD COLUMN more int")
        return "made"

    gid = GID + target.name
    with prepared(target.dsn, gid, "SAVEPOINT a", "DELETE FROM cdcsync.articles_chunks"):
        with pytest.raises(SetupError) as refused:
            await attempt(index.connection, change, [table], where="index articles")
        name = sql.Literal(gid).as_string(index.connection).strip()
        assert f"cdcsync.articles_chunks is locked by prepared transaction {name} (" in str(refused.value)
        assert f"ROLLBACK PREPARED {name} in database {target.name}" in str(refused.value.hint)
        typed(target.dsn, refused.value.hint, way)
        assert await attempt(index.connection, change, [table], where="index articles") == "made"


@pytest.mark.parametrize("way", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize(
    ("lock", "name"),
    [("LOCK TABLE t IN SHARE MODE", "public.t"), ("COMMENT ON PUBLICATION of_it IS 'edited'", "publication of_it")],
    ids=["a table", "the publication"],
)
async def test_a_prepared_transaction_that_keeps_a_publication_from_being_changed_is_named_with_what_ends_it(
    database: Database, lock: str, name: str, way: str
) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY)")
    database.execute("CREATE PUBLICATION of_it FOR TABLE t")
    gid = GID + database.name
    async with await connect(database.dsn, "source") as ours:
        with prepared(database.dsn, gid, lock):
            [held] = await publishing_locks(ours, "of_it", [QualifiedName("public", "t")])
            quoted = sql.Literal(gid).as_string(ours).strip()
            assert str(held).startswith(f"{name} is locked by prepared transaction {quoted} (")
            typed(database.dsn, held.remedy, way)
            assert await publishing_locks(ours, "of_it", [QualifiedName("public", "t")]) == []


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("version", [None, *OTHER_VERSIONS])
async def test_each_of_several_prepared_transactions_is_named_by_itself_and_so_is_a_session_that_waits_for_it(
    make_cluster: Callable[..., Cluster], version: int | None
) -> None:
    if version is not None and not OTHER_VERSIONS[version].exists():
        pytest.skip(f"PostgreSQL {version} is not installed")
    cluster = make_cluster(**({} if version is None else {"bin_dir": OTHER_VERSIONS[version]}))
    table = QualifiedName("public", "t")
    with psycopg.connect(cluster.dsn(), autocommit=True) as administrator:
        administrator.execute("CREATE TABLE t (id int PRIMARY KEY)")

    async def holders() -> list[str]:
        async with await connect(cluster.dsn(), "source") as ours:
            locks = await exclusive_locks(ours, [table], modes=BUILDING_WAITS)
        return sorted({str(lock).partition(" is locked by ")[2].partition(" (")[0] for lock in locks})

    with psycopg.connect(cluster.dsn(), autocommit=True) as first, closing(psycopg.connect(cluster.dsn())) as waiting:
        for number in (0, 1):
            first.execute("BEGIN")
            first.execute(f"INSERT INTO t VALUES ({number})".encode())
            first.execute(f"PREPARE TRANSACTION 'number {number}'".encode())
        both = ["prepared transaction 'number 0'", "prepared transaction 'number 1'"]
        waiting.pgconn.send_query(b"BEGIN; INSERT INTO t VALUES (1)")
        blocked = "SELECT FROM pg_locks WHERE pid = %s AND NOT granted"
        until(lambda: first.execute(blocked, [waiting.info.backend_pid]).rowcount > 0, "the session to wait")
        assert await holders() == [f"pid {waiting.info.backend_pid}", *both]
    cluster.stop()
    cluster.start()  # which gives them other virtual ids
    assert await holders() == both


@pytest.mark.parametrize(
    ("sqlstate", "times"), [("55P03", 2), ("40P01", 2), ("57014", 1)], ids=["lock", "deadlock", "something else"]
)
async def test_a_change_that_tells_of_a_lock_in_an_error_of_our_tree_is_tried_again(sqlstate: str, times: int) -> None:
    tried = []

    async def change() -> None:
        tried.append(1)
        raise SourceUnavailable("another session holds a lock", sqlstate=sqlstate)

    with pytest.raises(SourceUnavailable):
        await until_locked(change, table="public.t", attempts=2)
    assert len(tried) == times
