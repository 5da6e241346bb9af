"""Connections over TLS, with a real certificate: verify-full takes the right name and refuses a wrong one.

The server of the tests may be built without TLS, so an endpoint in front of it speaks TLS, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg import conninfo

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server

NAME = "db.example.org"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a certificate for one name, which is its own authority, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    files = ["-keyout", str(directory / "server.key"), "-out", str(directory / "server.crt")]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return directory


class Endpoint:
    """Takes connections that begin with PostgreSQL's request for TLS, and passes on what is in them."""

    def __init__(self, certificate: Path, database: Database) -> None:
        self.accepted = 0
        self.port = 0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate / "server.crt", certificate / "server.key")
        with database.connect() as connection:
            self._server = (connection.info.host, connection.info.port)
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    def __enter__(self) -> Endpoint:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running: set[asyncio.Task[None]] = set()

            def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                running.add(tasks.create_task(self._pass_on(reader, writer)))

            server = await asyncio.start_server(take, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            self._listening.set()
            await self._end.wait()
            server.close()
            for one in running:
                one.cancel()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            try:
                if struct.unpack("!ii", await reader.readexactly(8)) != SSL_REQUEST:
                    return
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(self._context)
                self.accepted += 1
                inside, outside = await asyncio.open_connection(*self._server)
                pumps = [asyncio.create_task(pump(reader, outside)), asyncio.create_task(pump(inside, writer))]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in pumps:
                        one.cancel()
                    outside.close()
            finally:
                writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on everything until one side ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


SSL_REQUEST = (8, 80877103)
"""Length and code of the message that asks for TLS, before anything else is said."""


@pytest.fixture
def endpoint(certificate: Path, database: Database) -> Iterator[Endpoint]:
    """The only way to the database that these tests take."""
    with Endpoint(certificate, database) as made:
        yield made


def dsn(endpoint: Endpoint, database: Database, certificate: Path, **settings: str) -> str:
    """Return a DSN that checks the certificate; the name is not looked up, because the address is given."""
    parts: dict[str, str | int] = {
        "host": NAME,
        "hostaddr": "127.0.0.1",
        "port": endpoint.port,
        "sslmode": "verify-full",
        "sslrootcert": str(certificate / "server.crt"),
        **settings,
    }
    return conninfo.make_conninfo(database.dsn, **parts)


def test_a_worker_reaches_everything_over_verified_connections(
    endpoint: Endpoint, database: Database, certificate: Path, make_pipeline: Callable[[str], Pipeline]
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles VALUES (1, 'one'), (2, 'two')")
    pipeline = make_pipeline(configuration(dsn(endpoint, database, certificate)))
    by_the_test = endpoint.accepted

    worker = pipeline.start()
    pipeline.live()
    database.execute("UPDATE articles SET title = 'changed' WHERE id = 1")
    pipeline.in_step()

    assert endpoint.accepted > by_the_test + 2
    assert pipeline.stop(worker) == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"host": "other.example.org"}, "is for db.example.org, not for other.example.org"),
        ({"sslrootcert": "/nosuch/ca.pem"}, "there is no file /nosuch/ca.pem"),
        ({"sslrootcert": "system"}, "not signed by an authority"),
    ],
    ids=["wrong name", "no authority", "another authority"],
)
def test_a_server_that_cannot_be_trusted_is_refused(
    endpoint: Endpoint,
    database: Database,
    certificate: Path,
    tmp_path: Path,
    settings: dict[str, str],
    reason: str,
) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_text(configuration(dsn(endpoint, database, certificate, **settings)))

    done = subprocess.run(
        [sys.executable, "-m", "cdcsync", "check", "--json", "-c", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 2
    problems = [finding["message"] for finding in json.loads(done.stdout)["findings"] if finding["level"] == "error"]
    assert any(reason in problem for problem in problems), problems
