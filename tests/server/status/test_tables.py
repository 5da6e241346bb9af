"""Tables that a status is read from, and those that its role may not read."""

from __future__ import annotations

import pytest
from psycopg import sql

from tests.support.statuses import Pipeline, problem

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_what_the_role_may_not_read_is_left_out_and_told(stopped: Pipeline) -> None:
    role = f"{stopped.target.info.dbname}_reader"
    reader = sql.Identifier(role)
    await stopped.target.execute(sql.SQL("CREATE ROLE {}").format(reader))
    try:
        await stopped.target.execute(sql.SQL("GRANT USAGE ON SCHEMA cdcsync TO {}").format(reader))
        await stopped.target.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {}").format(reader))
        await stopped.target.execute(sql.SQL("REVOKE SELECT ON cdcsync.failed_documents FROM {}").format(reader))
        await stopped.target.execute(sql.SQL("SET ROLE {}").format(reader))

        status = await stopped.status()

        assert status.indexes["articles"].failed_documents == 0
        assert problem(status, 'this role may not read "cdcsync"."failed_documents"').endswith(
            'GRANT SELECT ON "cdcsync"."failed_documents"'
        )
    finally:
        await stopped.target.execute("RESET ROLE")
        await stopped.target.execute(sql.SQL("DROP OWNED BY {}").format(reader))
        await stopped.target.execute(sql.SQL("DROP ROLE {}").format(reader))
