"""Several statements that read under one snapshot: it shows the tables that their locks found."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.snapshots import hold_snapshot
from tests.support.exchanges import ConnectTarget, read_after_exchange
from tests.support.indexes import SCHEMA, LiveIndex, changes, document

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def filled(index: LiveIndex) -> LiveIndex:
    """An index of three documents with fresh vectors."""
    texts = [f"text {key}" for key in "123"]
    await index.apply(changes(*[document(text[-1], text) for text in texts], inline=texts))
    return index


async def vectors(index: LiveIndex, connection: Connection) -> int:
    statement = sql.SQL("SELECT count(*)::int FROM {}").format(index.names.vectors(1))
    rows = await (await connection.execute(statement)).fetchall()
    return int(rows[0][0])


async def test_a_snapshot_is_no_older_than_the_tables_it_waited_for(
    filled: LiveIndex, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(connection: Connection) -> int:
        async with connection.transaction():
            await hold_snapshot(connection, filled.names.chunks, filled.names.vectors(1))
            return await vectors(filled, connection)

    rebuild = Rebuild(await connect_target(), SCHEMA, filled.spec)
    assert await read_after_exchange(monkeypatch, connect_target, rebuild, read) == 3


async def test_all_statements_see_one_state_and_write_nothing(filled: LiveIndex, connect_target: ConnectTarget) -> None:
    reader = await connect_target()
    async with reader.transaction(force_rollback=True):
        await hold_snapshot(reader, filled.names.vectors(1))
        assert await vectors(filled, reader) == 3
        await filled.apply(changes(deleted=["1"]))
        assert await vectors(filled, reader) == 3
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            await reader.execute("CREATE TABLE public.mine ()")
    assert await vectors(filled, reader) == 2
