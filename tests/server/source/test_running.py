"""Which transactions may have written before we began to look."""

from __future__ import annotations

import pytest
from psycopg import sql

from cdcsync.postgres.sessions import connect
from cdcsync.source.catalog import blockers, current_snapshot, running_transactions
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def test_the_newest_open_transaction_is_among_those_that_run(database: Database) -> None:
    """A snapshot alone does not list it: its id is above all that have finished."""
    with database.connect() as writer, writer.transaction():
        row = writer.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
        assert row is not None
        async with await connect(database.dsn, "source") as connection:
            assert not (await current_snapshot(connection)).sees(row[0])
            assert row[0] in await running_transactions(connection)


async def test_a_prepared_transaction_that_is_in_the_way_is_named(database: Database) -> None:
    gid = f"{database.name} it's"
    with database.connect() as writer:
        if writer.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
            pytest.skip("max_prepared_transactions is 0 on this server")
        writer.execute("CREATE TABLE t (id int)")
        writer.execute("BEGIN")
        writer.execute("INSERT INTO t VALUES (1)")
        writer.execute(sql.SQL("PREPARE TRANSACTION {}").format(gid))
        async with await connect(database.dsn, "source") as connection:
            xids = await running_transactions(connection)
            described = await blockers(connection, xids)
        writer.execute(sql.SQL("ROLLBACK PREPARED {}").format(gid))

    assert any(f"'{database.name} it''s'" in one for one in described)
