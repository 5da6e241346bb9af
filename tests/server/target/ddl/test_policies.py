"""The policy that holds the tool server's role to its caller's tenant."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import msgspec
import pytest
from psycopg import sql

from cdcsync.config.serving import Serve, Tenant
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.grants import read_settings
from cdcsync.target.ddl.policies import POLICY, SETTING, put_policy
from cdcsync.target.ddl.relations import create_index_relations
from tests.support.indexes import SCHEMA, LiveIndex, changes, document
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def serve(index: LiveIndex, target: Database) -> AsyncIterator[Serve]:
    """An index whose rows are of two tenants, and the role that serves it."""
    await index.apply(changes(*(document(str(at), f"text {at}", carried=(str(at % 2),)) for at in range(4))))
    role = f"cdcsync_test_{secrets.token_hex(4)}"
    await index.connection.execute(f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA cdcsync TO {role}".encode())
    await index.connection.execute(f"GRANT SELECT ON cdcsync.articles_chunks TO {role}, pg_monitor".encode())
    yield Serve(role=role, tenant=Tenant(column="tenant"))
    await index.connection.execute("RESET ROLE")
    target.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


async def seen(connection: Connection, role: str | None, tenant: str) -> int:
    """Return how many rows a role sees in a session of a tenant."""
    await connection.execute("SELECT set_config(%s, %s, false)", [SETTING, tenant])
    await connection.execute(f"SET ROLE {role or 'NONE'}".encode())
    cursor = await connection.execute("SELECT count(*) FROM cdcsync.articles_chunks")
    row = await cursor.fetchone()
    await connection.execute("RESET ROLE")
    assert row is not None
    return int(row[0])


async def test_the_role_sees_the_rows_of_its_tenant_and_nothing_without_one(index: LiveIndex, serve: Serve) -> None:
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    assert [await seen(index.connection, serve.role, tenant) for tenant in ("0", "1", "2", "", "01")] == [2, 2, 0, 0, 2]


async def test_a_policy_of_an_earlier_version_which_compares_texts_is_replaced(index: LiveIndex, serve: Serve) -> None:
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    wanted = await index.rows("SELECT pg_get_expr(polqual, polrelid) FROM pg_policy")
    text = f"current_user <> '{serve.role}' OR tenant::text = current_setting('{SETTING}', true)"
    comment = f"cdcsync: {serve.role} sees the rows whose tenant is the setting {SETTING}"
    await index.connection.execute(
        f"ALTER POLICY {POLICY} ON cdcsync.articles_chunks USING ({text});"
        f" COMMENT ON POLICY {POLICY} ON cdcsync.articles_chunks IS '{comment}'".encode()
    )
    assert await seen(index.connection, serve.role, "01") == 0
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    assert await index.rows("SELECT pg_get_expr(polqual, polrelid) FROM pg_policy") == wanted
    assert await seen(index.connection, serve.role, "01") == 2


async def test_others_see_what_they_saw(index: LiveIndex, serve: Serve) -> None:
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    await index.connection.execute("GRANT USAGE ON SCHEMA cdcsync TO pg_monitor")
    assert await seen(index.connection, "pg_monitor", "0") == 4
    assert await seen(index.connection, None, "0") == 4


OWN = "CREATE POLICY own ON cdcsync.articles_chunks USING (id < 3)"
ENABLE = "ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY"
GUARDS: dict[str, tuple[list[str], int, list[int]]] = {
    "a policy for all": ([OWN, ENABLE], 3, [2, 1, 0]),
    "a policy for others": (
        ["CREATE POLICY own ON cdcsync.articles_chunks TO pg_monitor USING (id < 3)", ENABLE],
        3,
        [0] * 3,
    ),
    "no policy, so that nobody sees anything": ([ENABLE], 0, [0] * 3),
}
"""What an operator did to the chunks, and then how many rows others see, and the role in sessions of each tenant."""


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("guard", GUARDS)
async def test_row_level_security_of_an_operators_own_is_never_widened_nor_switched_off(
    index: LiveIndex, serve: Serve, guard: str, late: bool
) -> None:
    statements, others, own = GUARDS[guard]
    if late and len(statements) == 1:
        pytest.skip("it is enabled by then, and nothing tells for whom")
    await index.connection.execute("GRANT USAGE ON SCHEMA cdcsync TO pg_monitor")
    if late:
        await put_policy(index.connection, SCHEMA, index.spec, serve)
    for statement in statements:
        await index.connection.execute(statement.encode())
    for _ in range(2):
        await put_policy(index.connection, SCHEMA, index.spec, serve)
        assert await seen(index.connection, "pg_monitor", "0") == others
        assert [await seen(index.connection, serve.role, tenant) for tenant in ("0", "1", "2")] == own
        assert (await read_settings(index.connection, SCHEMA, "articles"))["cdcsync.articles_chunks"].guarded

    await put_policy(index.connection, SCHEMA, index.spec, Serve())

    assert await seen(index.connection, "pg_monitor", "0") == others
    assert await index.rows("SELECT FROM pg_policy WHERE polname = %s", POLICY) == []


async def test_a_column_that_gets_another_type_keeps_its_policy_and_others_see_what_they_saw(
    index: LiveIndex, serve: Serve
) -> None:
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    await index.connection.execute("GRANT USAGE ON SCHEMA cdcsync TO pg_monitor")
    spec = msgspec.structs.replace(index.spec, carried_types=("text",))
    async with index.connection.transaction():
        await create_index_relations(index.connection, SCHEMA, spec)
        await put_policy(index.connection, SCHEMA, spec, serve)
    assert await seen(index.connection, "pg_monitor", "0") == 4
    assert await seen(index.connection, serve.role, "0") == 2


@pytest.mark.parametrize("later", [Serve(), Serve(tenant=Tenant(column="room"))])
async def test_the_policy_goes_when_nothing_is_bound_any_more(index: LiveIndex, serve: Serve, later: Serve) -> None:
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    await put_policy(index.connection, SCHEMA, index.spec, later)
    assert await index.rows("SELECT FROM pg_policy") == []
    assert await seen(index.connection, serve.role, "0") == 4


async def test_a_policy_that_is_there_already_is_left_alone(index: LiveIndex, serve: Serve) -> None:
    oid = "SELECT oid FROM pg_policy WHERE polname = %s"
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    first = await index.rows(oid, POLICY)
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    assert await index.rows(oid, POLICY) == first
    await index.connection.execute("ALTER TABLE cdcsync.articles_chunks DISABLE ROW LEVEL SECURITY")
    await put_policy(index.connection, SCHEMA, index.spec, serve)
    assert await seen(index.connection, serve.role, "0") == 2
