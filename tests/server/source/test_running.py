"""Which transactions may have written before we began to look."""

from __future__ import annotations

import pytest

from cdcsync.postgres import connect
from cdcsync.source.catalog import current_snapshot, running_transactions
from tests.fixtures.servers import Database

pytestmark = pytest.mark.server


async def test_the_newest_open_transaction_is_among_those_that_run(database: Database) -> None:
    """A snapshot alone does not list it: its id is above all that have finished."""
    with database.connect() as writer, writer.transaction():
        row = writer.execute("SELECT pg_current_xact_id()::text::int8").fetchone()
        assert row is not None
        async with await connect(database.dsn, "source") as connection:
            assert not (await current_snapshot(connection)).sees(row[0])
            assert row[0] in await running_transactions(connection)
