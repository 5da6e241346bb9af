"""How many rows fit into a page, told from their sizes alone."""

from __future__ import annotations

import pytest

from cdcsync.config import QualifiedName
from cdcsync.model.rows import Shape
from cdcsync.postgres.sessions import Connection
from cdcsync.source.tables import SourceTable
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_page_of_large_rows_is_as_many_as_fit_and_no_value_is_read_to_know(source_session: Connection) -> None:
    await source_session.execute("CREATE TABLE public.t (id int PRIMARY KEY, body text, size int)")
    await source_session.execute("INSERT INTO public.t SELECT i, 'small', 0 FROM generate_series(1, 20) AS i")
    shape = Shape("index", QualifiedName("public", "t"), ("id",), ("size",), ("body",))
    table = SourceTable(shape, ("int",))
    assert await table.fitting(source_session, None, 10, 1) == 10, "without large values no row can be large"

    # Compressed to next to nothing where it is stored: its size is that of what is read.
    await source_session.execute("UPDATE public.t SET body = repeat('large ', 100000) WHERE id > 5")
    await source_session.execute(
        "UPDATE public.t SET body = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 9999) AS i)"
        " WHERE id = 3"
    )

    assert await table.fitting(source_session, None, 10, 2_000_000) == 7
    assert await table.fitting(source_session, ("5",), 10, 2_000_000) == 3
    assert await table.fitting(source_session, ("5",), 10, 1) == 1
    assert await table.fitting(source_session, ("5",), 2, 2_000_000) == 2
    assert await table.fitting(source_session, ("20",), 10, 1) == 10
    assert await table.fitting(source_session, None, 10, 2_000_000, "id <> 6 AND id <> 7") == 7
    keys = [("7",), ("99",), ("1",), ("8",), ("9",), ("10",)]
    assert await table.fitting_keys(source_session, keys, 2_000_000) == 5
    assert await table.fitting_keys(source_session, keys, 1) == 1
    assert await table.fitting_keys(source_session, [("99",)], 1) == 1


async def test_a_locked_table_of_somebody_else_is_not_waited_for(
    database: Database, source_session: Connection
) -> None:
    await source_session.execute("CREATE TABLE public.t (id int PRIMARY KEY, body text)")
    await source_session.execute("INSERT INTO public.t VALUES (1, 'small'), (2, 'small')")
    await source_session.execute("CREATE TABLE public.another (body text)")
    await source_session.execute("VACUUM ANALYZE pg_catalog.pg_class, pg_catalog.pg_inherits")
    table = SourceTable(Shape("index", QualifiedName("public", "t"), ("id",), (), ("body",)), ("int",))

    with database.connect() as other, other.transaction():
        # It holds the lock of what keeps its large values, too.
        other.execute("TRUNCATE public.another")
        assert await table.fitting(source_session, None, 10, 1) == 10
        assert await table.fitting_keys(source_session, [("1",), ("2",)], 1) == 2
