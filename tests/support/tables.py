"""Source tables as backfills read them."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg

from cdcsync.config import QualifiedName
from cdcsync.model.rows import Key, Row, Shape
from cdcsync.postgres.sessions import Connection
from cdcsync.source.tables import SourceTable
from tests.support.servers import Database


def source_table(
    key: dict[str, str], carried: Sequence[str] = (), row_filter: str | None = None, *, name: str = "t"
) -> SourceTable:
    """Return what reads `public.NAME` with this key and these carried columns, without text."""
    shape = Shape("index", QualifiedName("public", name), tuple(key), tuple(carried), ())
    return SourceTable(shape, tuple(key.values()), row_filter)


async def pages(table: SourceTable, connection: Connection, limit: int, where: str | None = None) -> list[list[Row]]:
    """Read the whole table, page after page, as a backfill does."""
    after: Key | None = None
    found = []
    while True:
        page = await table.page(connection, after, limit, where)
        found.append(page.rows)
        if len(page.rows) < limit:
            return found
        after = table.shape.key_of(page.rows[-1])


def create_types(database: Database) -> None:
    """Create the types that tables of tests use."""
    with database.connect() as connection:
        connection.execute("CREATE EXTENSION citext; CREATE EXTENSION ltree; CREATE EXTENSION hstore")
        try:
            connection.execute("CREATE COLLATION cdcsync_test (provider = icu, locale = 'und')")
        except psycopg.errors.FeatureNotSupported:
            connection.execute('CREATE COLLATION cdcsync_test FROM "C"')
        connection.execute("CREATE TYPE \"Mood\" AS ENUM ('ok', 'Happy', 'a b', 'sad')")
        connection.execute("CREATE TYPE pair AS (first int, second text)")
        connection.execute("CREATE DOMAIN label AS citext")
