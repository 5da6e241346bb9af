"""The proof that a source has what was applied last, by what its slot sends again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from cdcsync.config import parse
from cdcsync.flows.setup.proof import fell_back, has_last_applied
from cdcsync.lsn import Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.messages import Begin
from cdcsync.pgoutput.wire import to_datetime
from cdcsync.postgres.sessions import connect
from cdcsync.source.catalog import read_slot
from cdcsync.target.pipelines import PipelineState
from tests.support.configs import configuration
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ROW = "INSERT INTO public.articles SELECT count(*) FROM public.articles"
MESSAGE = "SELECT pg_logical_emit_message(true, 'x', 'y')"
UNPUBLISHED = "INSERT INTO public.notes SELECT count(*) FROM public.notes"


def state(checkpoint: str, commit_time: datetime | None) -> PipelineState:
    return PipelineState(Lsn.parse(checkpoint), None, 0, None, None, 0, None, commit_time, None, datetime.now(UTC))


@pytest.mark.parametrize(
    ("applied", "after", "beyond", "proven"),
    [
        pytest.param([ROW, ROW], [], [], True, id="it comes last"),
        pytest.param([ROW], [MESSAGE, UNPUBLISHED], [ROW], True, id="what follows changes no row"),
        pytest.param([MESSAGE], [], [ROW], True, id="it is a message"),
        pytest.param([ROW], [ROW], [], False, id="a row was changed after it"),
        pytest.param([], [ROW], [], False, id="it is not there"),
        pytest.param([], [], [ROW], False, id="nothing is sent before the checkpoint"),
    ],
)
async def test_the_last_transaction_proves_the_history_unless_rows_were_changed_after_it(
    make_database: Callable[[], Database],
    applied: list[str],
    after: list[str],
    beyond: list[str],
    proven: bool,
) -> None:
    database = make_database()
    name = database.name
    database.execute("CREATE TABLE articles (id int)")
    database.execute("CREATE TABLE notes (id int)")
    database.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")
    config = parse(configuration(database.dsn, slot=name), {}, where="the test's configuration")
    source = await connect(database.dsn, "source")
    await source.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])

    async def run(statements: list[str]) -> str:
        for statement in statements:
            await source.execute(statement.encode())
        await source.execute("SELECT pg_logical_emit_message(false, 'x', 'y')")
        cursor = await source.execute("SELECT pg_current_wal_insert_lsn()::text")
        return str((await cursor.fetchone() or ("",))[0])

    await run(applied)
    cursor = await source.execute(
        "SELECT data FROM pg_logical_slot_peek_binary_changes(%s, NULL, NULL, 'proto_version', '2',"
        " 'publication_names', 'cdcsync', 'messages', 'true')",
        [name],
    )
    begun = [one for (data,) in await cursor.fetchall() if isinstance(one := decode(bytes(data)), Begin)]
    last = to_datetime(begun[-1].commit_time_us) if begun else datetime(2020, 1, 1, tzinfo=UTC)
    checkpoint = await run(after)
    await run(beyond)

    before = await read_slot(source, name)
    assert before is not None
    assert fell_back(before, state(checkpoint, last))
    assert await has_last_applied(source, config, before, state(checkpoint, last)) is proven
    assert not await has_last_applied(source, config, before, state(checkpoint, None))
    now = await read_slot(source, name)
    assert now is not None
    assert (now.active_pid, now.confirmed_flush) == (None, before.confirmed_flush)
    assert not fell_back(now, state(str(now.confirmed_flush), last))
    await source.close()
    database.execute(f"SELECT pg_drop_replication_slot('{name}')")
