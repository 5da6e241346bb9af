"""Sessions that a server ends or that fall silent are away, and opened again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from psycopg import conninfo

from cdcsync.errors import SourceUnavailable, Unavailable
from cdcsync.postgres import liveness, sessions
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.sessions import Session, connect
from cdcsync.postgres.settings import Side
from cdcsync.source.slot import SlotConnection
from tests.support.expiries import EXPIRIES, expire
from tests.support.proxies import Proxy
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("code", EXPIRIES)
async def test_a_session_that_a_time_limit_ended_is_away_and_then_opened_again(
    database: Database, code: str, side: Side
) -> None:
    async with Session(database.dsn, side, application_name="cdcsync test") as session:
        connection = await session.connection()
        await expire(connection, code)
        with pytest.raises(Unavailable) as raised, speaking_of(side):
            await connection.execute("SELECT 1")
        assert raised.value.sqlstate in (code, None)  # None where the connection was found closed
        cursor = await (await session.connection()).execute("SELECT 1")
        assert await cursor.fetchone() == (1,)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_session_that_may_only_read_is_opened_again_once_it_was_refused_a_write(
    database: Database, monkeypatch: pytest.MonkeyPatch, side: Side
) -> None:
    limit = f"ALTER DATABASE {database.name} {{}} default_transaction_read_only"
    database.execute("CREATE TABLE public.written (id int)")
    database.execute(limit.format("SET") + " = on")
    async with Session(database.dsn, side, application_name="cdcsync test") as session:
        first = await session.connection()
        await first.execute("SELECT FROM public.written")
        assert await session.connection() is first
        with pytest.raises(Unavailable, match="read-only"), speaking_of(side):
            await first.execute("INSERT INTO public.written VALUES (1)")
        database.execute(f"BEGIN READ WRITE; {limit.format('RESET')}; COMMIT")
        assert await session.connection() is first  # for a while, or each attempt would log in
        monkeypatch.setattr(liveness, "REFUSED_S", 0.0)
        await (await session.connection()).execute("INSERT INTO public.written VALUES (2)")
    assert database.execute("SELECT id FROM public.written") == [(2,)]


async def test_a_server_is_reached_by_its_name_whichever_address_it_listens_on(database: Database) -> None:
    dsn = conninfo.make_conninfo(database.dsn, host="localhost")
    async with await connect(dsn, "source") as connection:
        assert connection.info.host == "localhost"
    async with await SlotConnection.connect(dsn) as slot:
        assert (await slot.identify()).database == database.name


async def test_a_replication_connection_that_a_time_limit_ended_is_away(database: Database) -> None:
    slot = await SlotConnection.connect(database.dsn)
    ((pid,),) = await slot._command("SELECT pg_backend_pid()")
    await slot._command("SET idle_session_timeout = 1")
    while database.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [int(pid)]):
        pass
    with pytest.raises(SourceUnavailable):
        await slot.identify()
    await slot.aclose()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_server_that_lets_us_in_and_falls_silent_is_away(
    database: Database, make_proxy: Callable[[int], Proxy], monkeypatch: pytest.MonkeyPatch, side: Side
) -> None:
    dsn = conninfo.conninfo_to_dict(database.dsn)
    proxy = make_proxy(int(str(dsn["port"])))
    through = conninfo.make_conninfo("", **dsn | {"host": "127.0.0.1", "port": proxy.port})
    log_in = WatchedConnection.connect

    async def then_silence(*arguments: Any, **options: Any) -> Any:
        connection = await log_in(*arguments, **options)
        proxy.freeze()
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(WatchedConnection, "connect", then_silence)
        patched.setattr(sessions, "SETTINGS_S", 0.2)
        with pytest.raises(Unavailable, match=r"it let us in, and said nothing for 0\.2 s"):
            await connect(through, side)
    proxy.heal()
    await (await connect(through, side)).close()
