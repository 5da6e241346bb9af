"""PgBouncer between a client and a server of the tests, in each of its modes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from tests.support.workers import until

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

INI = """
[databases]
* = host={host} port={port} user={user} {password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
logfile = {log}
ignore_startup_parameters = extra_float_digits,options
default_pool_size = {size}
"""


@contextlib.contextmanager
def pooled(dsn: str, mode: str, directory: Path, *, size: int = 20) -> Iterator[str]:
    """Run PgBouncer before a server, with so many sessions, and yield the DSN that leads through it."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    parts = conninfo.conninfo_to_dict(dsn)
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = free.getsockname()[1]
    directory.chmod(0o777)
    ini = directory / "pgbouncer.ini"
    ini.write_text(
        INI.format(
            host=parts.get("host", "127.0.0.1"),
            port=parts.get("port", 5432),
            user=parts.get("user", "postgres"),
            password=f"password={parts['password']}" if parts.get("password") else "",
            listen=listen,
            mode=mode,
            log=directory / "pgbouncer.log",
            size=size,
        )
    )
    through = conninfo.make_conninfo(dsn, host="127.0.0.1", port=listen)
    as_user = ["-u", "nobody"] if os.getuid() == 0 else []
    with subprocess.Popen([PGBOUNCER, "-q", *as_user, str(ini)], cwd="/") as process:
        try:
            until(lambda: _answers(through), "pgbouncer")
            yield through
        finally:
            process.kill()


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, autocommit=True).close()
    except psycopg.OperationalError:
        return False
    return True
