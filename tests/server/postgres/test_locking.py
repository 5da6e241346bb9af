"""A change of what others use is given up after a few attempts, and its refusal names one of them."""

from __future__ import annotations

import psycopg
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SetupError, SourceUnavailable
from cdcsync.postgres.locking import BRIEFLY, attempt, publishing_locks, until_locked
from cdcsync.postgres.sessions import connect
from tests.support.indexes import LiveIndex
from tests.support.servers import Database

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
