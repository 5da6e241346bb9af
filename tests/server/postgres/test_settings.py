"""What every session of ours is set to, whatever DSN and role say."""

from __future__ import annotations

from typing import LiteralString

import pytest
from psycopg import conninfo, errors, sql

from cdcsync.errors import SetupError
from cdcsync.postgres.queries import fetch_texts
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.settings import Side
from cdcsync.source.slot import SlotConnection
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("postgresql://h/app?schema=public&sslmode=require", "libpq knows no parameter schema"),
        ("host=h pool_size=5", "libpq knows no parameter pool_size"),
        ("postgresql://u:half?other&rest=x@h/app?schema=public", "libpq knows no parameter schema"),
    ],
)
async def test_a_dsn_that_libpq_cannot_read_is_told_with_the_parameter_that_it_does_not_know(
    dsn: str, said: str
) -> None:
    with pytest.raises(SetupError) as caught:
        await connect(dsn, "source")
    assert caught.value.message == said
    assert "remove it" in (caught.value.hint or "")


async def test_a_parameter_of_a_dsn_that_is_misspelt_is_told_with_the_one_that_was_meant() -> None:
    with pytest.raises(SetupError, match="libpq knows no parameter prot, psword") as caught:
        await connect("host=h prot=5432 psword=x", "source")
    assert caught.value.hint == "did you mean port, password?"


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


SIDES: dict[Side, dict[str, str]] = {"source": {"lock_timeout": "400ms"}, "target": {}}
LIMITS = (
    "statement_timeout",
    "lock_timeout",
    "transaction_timeout",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
)


async def test_texts_are_utf8_whatever_encoding_the_dsn_asks_for(database: Database) -> None:
    connection = await connect(conninfo.make_conninfo(database.dsn, client_encoding="LATIN1"), "source")
    assert await fetch_texts(connection, "SELECT 'caf\u00e9'") == [("caf\u00e9",)]
    await connection.close()


async def test_a_roles_own_time_limits_do_not_hold_for_our_sessions(database: Database) -> None:
    known = {name for (name,) in database.execute("SELECT name FROM pg_settings WHERE name = ANY(%s)", [list(LIMITS)])}
    dsn = conninfo.make_conninfo(database.dsn, options=" ".join(f"-c {name}=20000" for name in sorted(known)))
    slot = await SlotConnection.connect(dsn)
    ours = {name: "2min" if name == "idle_in_transaction_session_timeout" else "0" for name in known}
    assert {name: await slot._command(f"SHOW {name}") for name in known} == {name: [(ours[name],)] for name in known}
    await slot.aclose()
    for side, own in SIDES.items():
        connection = await connect(dsn, side)
        shown = {name: await fetch_texts(connection, f"SHOW {name}") for name in known}
        assert shown == {name: [(one,)] for name, one in (ours | own).items()}
        await connection.close()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_no_statement_of_ours_is_compiled(database: Database, side: Side) -> None:
    connection = await connect(conninfo.make_conninfo(database.dsn, options="-c jit=on"), side)
    cursor = await connection.execute("SHOW jit")
    assert await cursor.fetchone() == ("off",)
    await connection.close()


async def test_a_default_tablespace_that_is_the_databases_own_forbids_no_partitioned_table(database: Database) -> None:
    ((own,),) = database.execute(
        "SELECT spcname FROM pg_tablespace JOIN pg_database ON dattablespace = pg_tablespace.oid"
        " WHERE datname = current_database()"
    )
    dsn = conninfo.make_conninfo(database.dsn, options=f"-c default_tablespace={own}")
    create: LiteralString = "CREATE TABLE public.parted (tier int) PARTITION BY LIST (tier)"
    connection = await connect(dsn, "target")
    await connection.execute(create)
    await connection.execute(sql.SQL("SET default_tablespace = {}").format(sql.Identifier(own)))
    with pytest.raises(errors.FeatureNotSupported):
        await connection.execute(create.replace("parted", "again"))
    await connection.close()


async def test_a_server_gives_up_every_session_whose_host_is_gone_within_a_minute(database: Database) -> None:
    settings = conninfo.conninfo_to_dict(database.dsn)
    if str(settings.get("host", "/")).startswith("/"):
        pytest.skip("a Unix socket has no host")
    names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
    shown = "SELECT " + ", ".join(f"current_setting('{name}')::int" for name in names)
    connection = await connect(database.dsn, "target")
    slot = await SlotConnection.connect(database.dsn)
    # What the kernel has for the socket, not what was asked for.
    cursor = await connection.execute(shown.encode())
    row = await cursor.fetchone()
    assert row is not None
    idle, interval, count, unanswered_ms = row
    assert idle + interval * count <= 60
    assert unanswered_ms <= 60_000
    assert [tuple(map(int, one)) for one in await slot._command(shown)] == [row]
    await slot.aclose()
    await connection.close()
