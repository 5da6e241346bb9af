"""A table that leaves its publication for a moment while the worker sets up: what it did meanwhile was not sent."""

from __future__ import annotations

import pytest

from cdcsync.flows.setup.start import note_memberships, unpublished_tables
from cdcsync.postgres.sessions import connect
from tests.fixtures.preflight import ARTICLES, configured, examined, lay_out
from tests.fixtures.servers import Database

pytestmark = pytest.mark.server


async def test_a_table_that_left_between_the_examination_and_the_set_up_is_noticed_by_the_watch(
    database: Database,
) -> None:
    database.execute(ARTICLES)
    database.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")
    config = configured(database.dsn)
    (spec,) = (await examined(config)).specs
    await lay_out(database, spec, slot=config.source.slot)
    database.execute("ALTER PUBLICATION cdcsync DROP TABLE articles")
    database.execute("ALTER PUBLICATION cdcsync ADD TABLE articles")

    async with await connect(database.dsn, "source") as source, await connect(database.dsn, "target") as target:
        noted = await note_memberships(source, target, config, [spec])
        reasons = await unpublished_tables(source, config, noted)

    assert "sends other rows of the table than before" in reasons[spec.shape.table]
