"""What users have built on an index is told of before the types of its columns change."""

from __future__ import annotations

import pytest

from tests.support.preflight import ARTICLES, SLOT, configured, examined, lay_out, stored_spec, warnings
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def laid_out(database: Database) -> None:
    """Create an index that carries the tenant as an integer; in the table it is a bigint now."""
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(carried={"tenant": "integer"}), slot=SLOT)
    database.execute("ALTER TABLE articles ALTER tenant TYPE bigint")


async def test_a_view_that_others_are_built_on_is_said_to_keep_its_types(database: Database) -> None:
    await laid_out(database)
    for view in ("articles_index", "articles_index_chunks"):
        database.execute(f"CREATE VIEW on_{view} AS SELECT tenant FROM public.{view}")

    report = await examined(configured(database.dsn, slot=SLOT, articles='columns = ["tenant"]'))

    found = {one.where: one for one in warnings(report) if "is built on" in one.message}
    assert found.keys() == {"public.articles_index", "public.articles_index_chunks"}
    assert "tenant stays integer" in found["public.articles_index"].message
    assert "on_articles_index" in found["public.articles_index"].message
    assert "drop what is built on it" in str(found["public.articles_index"].hint)
    assert report.specs


@pytest.mark.parametrize(
    "blocking",
    [
        "CREATE VIEW mine AS SELECT tenant FROM cdcsync.articles_chunks",
        "CREATE POLICY mine ON cdcsync.articles_chunks USING (tenant = 1)",
    ],
)
async def test_an_object_that_reads_the_chunks_table_itself_is_said_to_pause_the_index(
    database: Database, blocking: str
) -> None:
    await laid_out(database)
    database.execute(blocking)

    report = await examined(configured(database.dsn, slot=SLOT, articles='columns = ["tenant"]'))

    told = [one for one in report.findings if "of the chunks table, which" in one.message]
    assert len(told) == 1
    assert "mine" in told[0].message
    assert "tenant has to become bigint" in told[0].message
    assert report.specs == []

    database.execute("DROP VIEW mine" if "VIEW" in blocking else "DROP POLICY mine ON cdcsync.articles_chunks")
    report = await examined(configured(database.dsn, slot=SLOT, articles='columns = ["tenant"]'))
    assert len(report.specs) == 1


async def test_nothing_is_told_where_no_type_changes(database: Database) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(carried={"tenant": "integer"}), slot=SLOT)
    database.execute("CREATE VIEW mine AS SELECT tenant FROM public.articles_index")
    report = await examined(configured(database.dsn, slot=SLOT, articles='columns = ["tenant"]'))
    assert not [one for one in report.findings if "built on" in one.message]
