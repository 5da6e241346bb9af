"""What of the target is a pipeline's or an index', and that dropping it leaves nothing of it and all of the others'."""

from __future__ import annotations

import pytest

from cdcsync.errors import SetupError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target.belongings import (
    Belongings,
    belongings_of,
    drop_pipeline,
    drop_relations,
    own_dependents,
    pipelines_sharing,
    relations_of,
)
from cdcsync.target.pipelines import Pipelines
from tests.support import relations
from tests.support.indexes import SCHEMA, make_spec, register

pytestmark = [pytest.mark.server, pytest.mark.anyio]

OBJECTS = """
    SELECT 'relation ' || c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'S') AND (n.nspname = 'cdcsync' OR n.nspname = 'public' AND c.relkind = 'v')
    UNION ALL
    SELECT 'function ' || p.oid::regprocedure::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = 'cdcsync'
    UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname = 'cdcsync'
"""


async def objects(connection: Connection) -> set[str]:
    return {name for (name,) in await relations.rows(connection, OBJECTS)}


@pytest.fixture
async def two(connection: Connection) -> Connection:
    """A target with the pipeline `s` of the index `articles` and the pipeline `u` of the index `notes`."""
    specs = {"s": make_spec(), "u": make_spec(name="notes")}
    await relations.create(connection, *specs.values())
    for slot, spec in specs.items():
        await Pipelines(SCHEMA, slot).ensure(connection, "p")
        await register(connection, spec, slot=slot)
    return connection


async def test_before_the_first_start_a_pipeline_has_nothing(connection: Connection) -> None:
    assert await belongings_of(connection, SCHEMA, "s") == Belongings()
    assert await pipelines_sharing(connection, SCHEMA, "s", "p") == []


async def test_a_pipeline_has_its_own_indexes_with_their_tables_and_views(two: Connection) -> None:
    found = await belongings_of(two, SCHEMA, "s")
    assert (found.indexes, found.source_tables, found.set_up) == (("articles",), ("public.articles",), True)
    assert "public.articles_index" in found.relations.views
    assert found.relations.tables
    assert all("articles" in name for name in (*found.relations.views, *found.relations.tables))
    assert await pipelines_sharing(two, SCHEMA, "s", "p") == ["u"]
    assert await pipelines_sharing(two, SCHEMA, "s", "another") == []


async def test_dropping_one_index_leaves_nothing_of_it_and_all_of_the_other(connection: Connection) -> None:
    await relations.create(connection, make_spec(name="notes"))
    before = await objects(connection)
    await relations.create(connection, make_spec())
    assert await objects(connection) > before
    async with connection.transaction():
        await drop_relations(connection, SCHEMA, ["articles"], await relations_of(connection, SCHEMA, ["articles"]))
    assert await objects(connection) == before


async def test_the_last_pipeline_takes_what_all_shared_with_it(two: Connection) -> None:
    for slot, left in (("s", {"schema cdcsync"}), ("u", set[str]())):
        async with two.transaction():
            await drop_pipeline(two, SCHEMA, slot, await belongings_of(two, SCHEMA, slot))
        assert {name for name in await objects(two) if name.startswith("schema")} == left
        assert not [name for name in await objects(two) if "articles" in name]
    assert await objects(two) == set()


async def test_what_is_not_ours_and_depends_on_an_index_is_named_and_nothing_is_dropped(two: Connection) -> None:
    await two.execute("CREATE VIEW public.report AS SELECT * FROM public.articles_index")
    before = await objects(two)
    with pytest.raises(SetupError, match="not cdcsync's") as refused, own_dependents(), speaking_of("target"):
        async with two.transaction():
            await drop_pipeline(two, SCHEMA, "s", await belongings_of(two, SCHEMA, "s"))
    assert "view public.report" in str(refused.value.hint)
    assert await objects(two) == before
