"""What every session of ours is like."""

from __future__ import annotations

import pytest
from psycopg import conninfo, sql

from cdcsync.postgres.sessions import connect
from tests.fixtures.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.parametrize("autocommit", [True, False])
async def test_a_role_that_may_use_no_language_has_sessions_that_end_with_their_client(
    database: Database, autocommit: bool
) -> None:
    database.execute("REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC")
    role = f"{database.name}_plain"
    database.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        dsn = conninfo.make_conninfo(database.dsn, options=f"-c role={role}")
        connection = await connect(dsn, "target", autocommit=autocommit)
        cursor = await connection.execute("SELECT current_user, current_setting('client_connection_check_interval')")
        assert await cursor.fetchone() == (role, "1s")
        await connection.close()
    finally:
        database.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
