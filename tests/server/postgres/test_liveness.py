"""Sessions that beat: the server hears of them, and whoever uses them does not notice."""

from __future__ import annotations

import anyio
import pytest

from cdcsync.postgres import liveness
from cdcsync.postgres.sessions import connect
from tests.support.indexes import until
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def beats_each_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEATS", liveness.TCP_USER_TIMEOUT_MS / 2)


HEARD = "SELECT state_change::text FROM pg_stat_activity WHERE application_name = %s"


async def test_a_session_that_beats_is_heard_from_while_it_has_nothing_to_do(database: Database) -> None:
    beating = await connect(database.dsn, "target", application_name="cdcsync test beats")
    silent = await connect(database.dsn, "target", application_name="cdcsync test is silent")
    asking = await connect(database.dsn, "target")
    beating.beat()

    async def heard(name: str) -> object:
        return await (await asking.execute(HEARD, [name])).fetchone()

    before, of_the_other = await heard("cdcsync test beats"), await heard("cdcsync test is silent")

    async def heard_again() -> bool:
        return await heard("cdcsync test beats") != before

    await until(heard_again)
    assert await heard("cdcsync test is silent") == of_the_other
    for connection in (beating, silent, asking):
        await connection.close()


async def test_a_session_that_beats_can_be_used_at_any_moment(database: Database) -> None:
    connection = await connect(database.dsn, "target")
    await connection.execute("CREATE TEMPORARY TABLE taken (n int)")
    connection.beat()
    for number in range(200):
        assert connection.free
        async with connection.transaction():
            assert not connection.free
            async with connection.cursor() as cursor, cursor.copy("COPY taken FROM STDIN") as copy:
                await copy.write_row((number,))
                await anyio.sleep(0.002)
                await copy.write_row((number,))
        await anyio.sleep(0.001)
    assert await (await connection.execute("SELECT count(*) FROM taken")).fetchone() == (400,)
    await connection.close()
