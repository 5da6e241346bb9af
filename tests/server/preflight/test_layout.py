"""Where an index is to lie in the target: what is refused before anything is made."""

from __future__ import annotations

import anyio
import psycopg
import pytest

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import connect
from cdcsync.target.apply import IndexWriter
from tests.support.indexes import make_spec
from tests.support.preflight import ARTICLES, configured, examined, lay_out, the_error, warnings
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def test_the_schema_of_a_view_must_exist_unless_it_is_ours(database: Database) -> None:
    database.execute(ARTICLES)
    error = the_error(await examined(configured(database.dsn, articles='view = "search.articles"')))
    assert (error.where, error.hint) == ("indexes.articles.view", "CREATE SCHEMA search")
    assert (await examined(configured(database.dsn, articles='view = "cdcsync.articles"'))).errors == []


@pytest.mark.parametrize(
    ("create", "view"),
    [
        ("CREATE TABLE articles_index ()", "articles_index"),
        ("CREATE VIEW articles_index AS SELECT 1", "articles_index"),
        ("CREATE VIEW v AS SELECT 1; COMMENT ON VIEW v IS 'cdcsync index other: x'", "v"),
        (
            "CREATE SCHEMA other; CREATE TABLE other.articles_chunks ();"
            " CREATE VIEW v AS SELECT FROM other.articles_chunks;"
            " COMMENT ON VIEW v IS 'cdcsync index articles: of another pipeline'",
            "v",
        ),
        ("SELECT 1", "cdcsync.articles_chunks"),
        ("SELECT 1", "cdcsync.pipelines"),
    ],
)
async def test_a_view_whose_name_is_taken_is_refused(database: Database, create: str, view: str) -> None:
    database.execute(f"{ARTICLES}; {create}")
    error = the_error(await examined(configured(database.dsn, articles=f'view = "{view}"')))
    assert error.where == "indexes.articles.view"


@pytest.mark.parametrize(
    ("search", "hint"),
    [("englsh", 'did you mean "english"?'), ("own", 'did you mean "public.own"?'), ("klingon", "simple")],
)
async def test_an_unknown_text_search_configuration_is_told_with_the_one_that_was_meant(
    database: Database, search: str, hint: str
) -> None:
    database.execute(f"{ARTICLES}; CREATE TEXT SEARCH CONFIGURATION own (COPY = english)")
    error = the_error(await examined(configured(database.dsn, articles=f'search = "{search}"')))
    assert error.where == "indexes.articles.search"
    assert hint in str(error.hint)


@pytest.mark.parametrize("search", ["german", "pg_catalog.german", "public.own", ""])
async def test_a_text_search_configuration_of_the_target_is_taken(database: Database, search: str) -> None:
    database.execute(f"{ARTICLES}; CREATE TEXT SEARCH CONFIGURATION own (COPY = english)")
    assert (await examined(configured(database.dsn, articles=f'search = "{search}"'))).errors == []


async def test_a_changed_text_search_configuration_is_warned_of_with_the_way_to_change_it(database: Database) -> None:
    database.execute(ARTICLES)
    spec = make_spec(search="english")
    await lay_out(database, spec)
    (warning,) = warnings(await examined(configured(database.dsn, articles='search = "german"\ncolumns = ["tenant"]')))
    assert warning.where == "indexes.articles.search"
    assert 'by "german"; the index keeps that by "english"' in warning.message
    assert warning.hint is not None
    database.execute(warning.hint.partition(",")[0])
    await lay_out(database, make_spec(search="german"))
    assert warnings(await examined(configured(database.dsn, articles='search = "german"\ncolumns = ["tenant"]'))) == []


async def test_a_table_that_goes_while_it_is_examined_is_no_mistake_of_ours(database: Database) -> None:
    database.execute(ARTICLES)
    await lay_out(database, make_spec(search="english"))
    configuration = configured(database.dsn, articles='search = "english"\ncolumns = ["tenant"]')
    waiting = "SELECT FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database AND d.datname = current_database()"
    async with await psycopg.AsyncConnection.connect(database.dsn) as other, anyio.create_task_group() as tasks:
        await other.execute("DROP TABLE cdcsync.articles_chunks CASCADE")
        tasks.start_soon(examined, configuration)
        with anyio.fail_after(60):
            while not database.execute(f"{waiting} WHERE NOT l.granted"):  # noqa: ASYNC110 - the server tells nobody
                await anyio.sleep(0.02)
        await other.commit()


@pytest.mark.parametrize("search", ["", "simple"])
@pytest.mark.parametrize("excess", [0, 1])
async def test_an_index_is_refused_if_a_relation_of_it_would_have_more_columns_than_postgresql_allows(
    database: Database, search: str, excess: int
) -> None:
    carried = [f"c{at}" for at in range(1_590 + excess)]
    database.execute(f"CREATE TABLE t (id int PRIMARY KEY, body text, {', '.join(f'{one} bool' for one in carried)})")
    report = await examined(
        configured(database.dsn, t=f'table = "t"\ntext = "{{body}}"\nsearch = "{search}"\ncolumns = {carried}')
    )
    if excess:
        error = the_error(report)
        assert (error.where, error.hint) == ("indexes.t.columns", "take 1 or more out of indexes.t.columns")
        assert "would have 1,601 columns, and PostgreSQL allows 1,600" in error.message
        return
    assert report.errors == []
    await makes_and_opens(database, report.specs[0])


@pytest.mark.parametrize("many", [False, True], ids=["one table", "many tables"])
@pytest.mark.parametrize("excess", [0, 1])
async def test_an_index_is_refused_if_its_key_beside_a_chunks_number_is_too_wide_for_an_index(
    database: Database, many: bool, excess: int
) -> None:
    key = [f"k{at}" for at in range((30 if many else 31) + excess)]
    columns = ", ".join(f"{one} int" for one in key)
    database.execute(f"CREATE TABLE t1 ({columns}, body text, PRIMARY KEY ({', '.join(key)}))")
    table = 'tables = ["public.t*"]' if many else 'table = "t1"'
    config = configured(database.dsn, t=f'{table}\ntext = "{{body}}"')
    report = await examined(config)
    if excess:
        error = the_error(report)
        assert error.where == "indexes.t.key"
        assert "the key has 32 columns, and an index of the target can have 32" in error.message
        database.execute("CREATE UNIQUE INDEX narrow ON t1 (k0); ALTER TABLE t1 REPLICA IDENTITY USING INDEX narrow")
        report = await examined(config)
    assert report.errors == []
    await makes_and_opens(database, report.specs[0])


async def makes_and_opens(database: Database, spec: IndexSpec) -> None:
    """Make the relations of an index, and what a worker writes to it through."""
    await lay_out(database, spec)
    async with await connect(database.dsn, "target") as connection:
        await IndexWriter(connection, "cdcsync", spec).open()
