"""Publications as the catalog describes them."""

from __future__ import annotations

import pytest

from cdcsync.config import QualifiedName
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import read_catalog
from tests.support.publications import PUBLICATIONS, P, T, lay_out

pytestmark = pytest.mark.server


@pytest.mark.parametrize("publication", PUBLICATIONS)
async def test_what_is_said_of_a_publication_is_what_the_server_says_of_it(
    source: Connection, publication: str
) -> None:
    await lay_out(source, publication)
    if publication == "table":
        await source.execute("ALTER PUBLICATION p SET TABLE public.t (title, id) WHERE (id > 3), public.p")
    for via_root in ("true", "false"):
        await source.execute(f"ALTER PUBLICATION p SET (publish_via_partition_root = {via_root})")
        leaf = QualifiedName("public", "p1")
        catalog = await read_catalog(source, "p", [T, P, leaf])
        cursor = await source.execute(
            "SELECT schemaname, tablename, attnames::text[], rowfilter FROM pg_publication_tables"
            " WHERE schemaname = 'public' AND tablename IN ('t', 'p', 'p1')"
        )
        # PostgreSQL 15 lists generated columns, which it does not send.
        unsent = {"twice"} if catalog.version < 180000 else set()
        expected = {
            QualifiedName(schema, name): (sorted({*columns} - unsent), filter_)
            for schema, name, columns, filter_ in await cursor.fetchall()
        }
        assert catalog.publication is not None
        sent = catalog.publication.tables.items()
        found = {name: (sorted(one.columns), one.row_filter) for name, one in sent if name in expected}
        partitioned_by_leaves = {name for name, _ in sent} - expected.keys()

        assert found == expected
        # A root that is sent under the names of its leaves is still one that the publication sends.
        assert partitioned_by_leaves <= ({P} if via_root == "false" else set())


async def test_the_columns_of_a_row_filter_are_told_from_those_of_a_column_list(source: Connection) -> None:
    await lay_out(source)
    await source.execute(
        "ALTER PUBLICATION p SET TABLE public.t (id, title, extra) WHERE (id > 3 AND extra <> ':varattno 2')"
    )
    catalog = await read_catalog(source, "p", [T])

    assert catalog.publication is not None
    assert catalog.publication.tables[T].filter_columns == ("extra", "id")
