"""All checks together: what a sound configuration comes to, and what a faulty one is told."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream
from psycopg import conninfo

from cdcsync.config import HashEmbedder as HashSettings
from cdcsync.config import QualifiedName
from cdcsync.demo.cluster import free_port
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.errors import SetupError
from cdcsync.model.rows import Shape
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.preflight import refuse
from tests.support.preflight import ARTICLES, configured, examined, lay_out, the_error
from tests.support.servers import Database

pytestmark = pytest.mark.server

EMBEDDER = HashEmbedder("hash", HashSettings(dimensions=16))

EVERYTHING = """
    SELECT 'relation', oid::text FROM pg_class UNION ALL SELECT 'schema', nspname FROM pg_namespace
    UNION ALL SELECT 'extension', extname FROM pg_extension UNION ALL SELECT 'publication', pubname FROM pg_publication
    UNION ALL SELECT 'slot', slot_name FROM pg_replication_slots WHERE database = current_database() ORDER BY 1, 2
"""
"""What a database holds."""


async def test_a_sound_configuration_gives_the_indexes_as_they_are_to_be(
    make_database: Callable[[], Database],
) -> None:
    source, target = make_database(), make_database()
    source.execute(
        "CREATE TABLE books (shelf text, place int, tenant varchar(8), body text, PRIMARY KEY (place, shelf))"
    )
    config = configured(source.dsn, target.dsn, books='table = "books"\ntext = "{body}"\ncolumns = ["tenant"]')
    report = await examined(config)
    refuse(report)
    (spec,) = report.specs
    types = ((23, -1), (25, -1), (1043, 8 + 4), (25, -1))  # integer, text, varchar(8) as its typmod says it, text
    assert spec.shape == Shape(
        "books",
        QualifiedName("public", "books"),
        ("place", "shelf"),
        ("tenant",),
        ("body",),
        types,
        inheritable=True,
    )
    assert spec.source_key_types == spec.key_types == ("integer", "text")
    assert spec.carried_types == ("character varying(8)",)
    assert (spec.model, spec.dimensions, spec.distance) == (EMBEDDER.identity, 16, "cosine")
    assert (spec.generation, spec.row_filter, len(spec.fingerprint)) == (1, None, 32)
    assert {finding.level for finding in report.findings} == {"ok"}


async def test_source_and_target_may_be_one_database(database: Database) -> None:
    database.execute(ARTICLES)
    report = await examined(configured(database.dsn))
    assert report.errors == []
    assert [spec.name for spec in report.specs] == ["articles"]


async def test_the_fingerprint_follows_template_and_chunking_and_nothing_else(database: Database) -> None:
    database.execute(ARTICLES)
    report = await examined(
        configured(
            database.dsn,
            same='columns = ["tenant"]',
            one="",
            other_text='text = "{body}"',
            other_chunks="chunking.max_tokens = 64",
        )
    )
    same, one, *others = (spec.fingerprint for spec in report.specs)
    assert same == one
    assert len({one, *others}) == 3


async def test_both_servers_are_connected_to_at_the_same_time() -> None:
    there, met = [], anyio.Event()

    async def silent(stream: SocketStream) -> None:
        """Say nothing until the other server has been asked too."""
        async with stream:
            there.append(stream)
            if len(there) == 2:
                met.set()
            await met.wait()

    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        dsns = []
        for _ in range(2):
            listener = await stack.enter_async_context(await anyio.create_tcp_listener(local_host="127.0.0.1"))
            dsns.append(f"host=127.0.0.1 port={listener.extra(SocketAttribute.local_port)} dbname=d user=u")
            tasks.start_soon(listener.serve, silent)
        report = await examined(configured(*dsns))
        assert met.is_set()
        tasks.cancel_scope.cancel()
    assert [error.where.split()[0] for error in report.errors] == ["source", "target"]


@pytest.mark.parametrize("lines", ["", 'columns = ["nosuch"]'], ids=["sound", "faulty"])
async def test_nothing_is_created_by_a_check(make_database: Callable[[], Database], lines: str) -> None:
    source, target = make_database(), make_database()
    source.execute(ARTICLES)
    target.execute("DROP EXTENSION vector")
    before = [database.execute(EVERYTHING) for database in (source, target)]
    await examined(configured(source.dsn, target.dsn, articles=lines))
    assert [database.execute(EVERYTHING) for database in (source, target)] == before


async def test_all_faults_are_told_at_once(make_database: Callable[[], Database]) -> None:
    source, target = make_database(), make_database()
    source.execute(f"{ARTICLES}; CREATE TABLE loose (id int); CREATE VIEW seen AS SELECT 1 AS id")
    source.execute("CREATE PUBLICATION cdcsync FOR TABLE articles WITH (publish = 'insert')")
    target.execute("UPDATE pg_extension SET extversion = '0.6.2' WHERE extname = 'vector'")
    target.execute("CREATE TABLE taken ()")
    report = await examined(
        configured(
            source.dsn,
            target.dsn,
            articles='columns = ["tennant", "id"]\nview = "taken"\nsearch = "englsh"',
            loose='table = "loose"\ntext = "{id}"',
            seen='table = "seen"\ntext = "{id"',
            gone='table = "article"\nview = "nowhere.gone"',
        )
    )
    told = {finding.where: finding for finding in report.errors}
    assert set(told) == {
        "indexes.seen.text",
        "publication cdcsync",
        "indexes.articles.columns",
        "public.loose",
        "indexes.seen.table",
        "indexes.gone.table",
        "target",
        "indexes.articles.view",
        "indexes.articles.search",
        "indexes.gone.view",
    }
    assert all(finding.hint for finding in report.errors)
    assert report.specs == []
    with pytest.raises(SetupError) as refused:
        refuse(report)
    for finding in report.errors:
        assert f"{finding.where}: {finding.message}\n    fix: {finding.hint}" in refused.value.message


async def test_an_unreachable_source_does_not_hide_what_is_wrong_with_the_target(database: Database) -> None:
    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    report = await examined(configured(nowhere, database.dsn, articles='search = "nosuch"'))
    source, search = report.errors
    assert "source (postgresql://nobody@127.0.0.1" in source.where
    assert search.where == "indexes.articles.search"


async def test_an_unreachable_target_does_not_hide_what_is_wrong_with_the_source(database: Database) -> None:
    nowhere = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    report = await examined(configured(database.dsn, nowhere))
    assert {finding.where.partition(" ")[0] for finding in report.errors} == {"target", "indexes.articles.table"}


async def test_cdcsyncs_own_tables_are_not_indexed(database: Database) -> None:
    database.execute("CREATE SCHEMA cdcsync; CREATE TABLE cdcsync.mine (id int PRIMARY KEY)")
    config = configured(database.dsn, mine='table = "cdcsync.mine"\ntext = "{id}"')
    assert the_error(await examined(config)).where == "indexes.mine.table"


async def test_a_schema_of_that_name_in_another_database_is_not_ours(make_database: Callable[[], Database]) -> None:
    source, target = make_database(), make_database()
    source.execute("CREATE SCHEMA cdcsync; CREATE TABLE cdcsync.mine (id int PRIMARY KEY)")
    config = configured(source.dsn, target.dsn, mine='table = "cdcsync.mine"\ntext = "{id}"')
    assert (await examined(config)).errors == []


@pytest.mark.parametrize(
    ("settings", "sign"),
    [
        ({"dbname": "nosuch"}, "there is no database nosuch"),
        ({"user": "locked", "password": "wrong"}, "refuses the password of role locked"),
        ({"user": "nosuch"}, "there is no role nosuch"),
    ],
)
async def test_a_login_that_fails_says_why(lone_database: Database, settings: dict[str, Any], sign: str) -> None:
    lone_database.execute(ARTICLES)
    wrong = conninfo.make_conninfo(lone_database.dsn, **settings)
    for config in (configured(wrong, lone_database.dsn), configured(lone_database.dsn, wrong)):
        error = the_error(await examined(config))
        assert sign in error.message
        assert error.hint
        assert "wrong" not in error.where


@pytest.mark.proof
async def test_a_session_that_ends_at_any_statement_is_a_finding(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker examines its tables again whenever something about them changed: an outage then must not end it."""
    database.execute(ARTICLES)
    config = configured(database.dsn)
    await lay_out(database, (await examined(config)).specs[0])
    wait, waited, last = WatchedConnection.wait, 0, 0

    async def end_one(connection: WatchedConnection, *arguments: Any, **options: Any) -> Any:
        nonlocal waited
        waited += 1
        if waited == last:
            database.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.pgconn.backend_pid])
        return await wait(connection, *arguments, **options)

    monkeypatch.setattr(WatchedConnection, "wait", end_one)
    noticed = 0
    while waited >= last:
        last, waited = last + 1, 0
        noticed += bool((await examined(config)).errors)
    assert noticed >= last - 5 > 20  # nobody misses a session that ends when all is read
