"""Setting up: what another session does in the middle of it."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

from cdcsync.config import QualifiedName, parse
from cdcsync.errors import TablesChanged
from cdcsync.flows.setup.start import set_up_publication
from cdcsync.postgres.sessions import connect
from tests.support.configs import configuration
from tests.support.indexes import until_blocked
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

STAYS, GOES = QualifiedName("public", "articles"), QualifiedName("passing", "articles")


@pytest.mark.parametrize("extended", [False, True], ids=["created", "extended"])
@pytest.mark.parametrize("gone", ["DROP TABLE passing.articles", "DROP SCHEMA passing CASCADE"])
async def test_a_table_that_is_dropped_while_it_is_published_has_the_tables_examined_again(
    make_database: Callable[[], Database], gone: str, extended: bool
) -> None:
    database = make_database()
    database.execute("CREATE SCHEMA passing")
    for table in ("public.articles", "passing.articles"):
        database.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
    config = parse(configuration(database.dsn), {}, where="the test's configuration")
    source, other = await connect(database.dsn, "source"), await connect(database.dsn, "source")
    watching = await connect(database.dsn, "source")
    if extended:
        await set_up_publication(source, config, [STAYS])
    refused: list[TablesChanged] = []

    async def publish() -> None:
        try:
            await set_up_publication(source, config, [STAYS, GOES])
        except TablesChanged as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks, other.transaction():
        await other.execute(gone.encode())
        tasks.start_soon(publish)
        await until_blocked(watching, source)

    assert ["passing" in error.message for error in refused] == [True]
    await set_up_publication(source, config, [STAYS])
    published = await (await watching.execute("SELECT schemaname, tablename FROM pg_publication_tables")).fetchall()
    assert published == [("public", "articles")]
    for connection in (source, other, watching):
        await connection.close()
