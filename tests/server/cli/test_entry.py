"""The mistakes of a first hour, typed at each command: every one is told in words, with its place and its fix."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg import conninfo

from cdcsync.cli import main
from cdcsync.demo.cluster import free_port
from tests.support.preflight import ARTICLES, LOCKED, Role
from tests.support.servers import Database

pytestmark = pytest.mark.server

CONFIG = """
[source]
dsn = "{source}"
[target]
dsn = "{target}"
[worker]
listen = "127.0.0.1:0"
start_timeout_s = 0.1
[serve]
anonymous = true
listen = "127.0.0.1:0"
[embedders.hash]
type = "hash"
dimensions = 16
[indexes.articles]
table = "articles"
text = "{{body}}"
embedder = "hash"
"""

Dsns = tuple[str, str]
"""Of source and target."""


def wrong_password(database: Database, role: Role) -> Dsns:
    dsn = conninfo.make_conninfo(database.dsn, user=LOCKED, password="wrong")
    return dsn, dsn


def no_password(database: Database, role: Role) -> Dsns:
    dsn = conninfo.make_conninfo(database.dsn, user=LOCKED)
    return dsn, dsn


def no_such_role(database: Database, role: Role) -> Dsns:
    dsn = conninfo.make_conninfo(database.dsn, user="nobody_of_that_name")
    return dsn, dsn


def no_such_database(database: Database, role: Role) -> Dsns:
    dsn = conninfo.make_conninfo(database.dsn, dbname="nosuch")
    return dsn, dsn


def no_server(database: Database, role: Role) -> Dsns:
    dsn = conninfo.make_conninfo(database.dsn, port=free_port())
    return dsn, dsn


def no_pgvector(database: Database, role: Role) -> Dsns:
    database.execute("DROP EXTENSION vector")
    return role.dsn, role.dsn


def no_replication(database: Database, role: Role) -> Dsns:
    database.execute(f"ALTER ROLE {role.name} NOREPLICATION")
    return role.dsn, database.dsn


EVERYWHERE = {
    wrong_password: (
        f"the server refuses the password of role {LOCKED}",
        "correct it in the DSN, PGPASSWORD or {passfile}",
    ),
    no_password: ("no password is given for this role", "set PGPASSWORD"),
    no_such_role: ("there is no role nobody_of_that_name", "`cdcsync init` and `cdcsync config roles` print the SQL"),
    no_such_database: ("there is no database nosuch", "correct the database name in the DSN"),
    no_server: ("no server listens on 127.0.0.1, port", "correct host and port"),
}
AT_A_START = {
    no_pgvector: ("pgvector is not installed in the database", "CREATE EXTENSION vector"),
    no_replication: ("may not replicate", "REPLICATION"),
}
TYPED = [
    *(
        (command, mistake, words)
        for mistake, words in EVERYWHERE.items()
        for command in ("check", "run", "status", "search", "serve")
        # A tool server waits for a server that is away, as a worker does.
        if (command, mistake) != ("serve", no_server)
    ),
    *((command, mistake, words) for mistake, words in AT_A_START.items() for command in ("check", "run")),
]


@pytest.mark.proof_from(14)
@pytest.mark.parametrize(
    ("command", "mistake", "words"), [pytest.param(*one, id=f"{one[0]}-{one[1].__name__}") for one in TYPED]
)
def test_a_mistake_is_told_with_its_fix_and_nothing_is_created(
    lone_database: Database,
    role: Role,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    mistake: Callable[[Database, Role], Dsns],
    words: tuple[str, str],
) -> None:
    passfile = str(tmp_path / "none")
    monkeypatch.setenv("PGPASSFILE", passfile)
    lone_database.execute(f"{ARTICLES}; GRANT SELECT ON articles TO {role.name}")
    source, target = mistake(lone_database, role)
    path = tmp_path / "cdcsync.toml"
    path.write_text(CONFIG.format(source=source, target=target))
    with pytest.raises(SystemExit) as exited:
        main([command, "-c", str(path), *(["articles", "x"] if command == "search" else [])])
    told = capsys.readouterr()
    # A server that is away may come back, which a script can tell from a mistake that stays one.
    assert exited.value.code == (1 if mistake is no_server and command in ("status", "search") else 2)
    said = told.out if command == "check" else told.err
    assert all(one.replace("{passfile}", passfile) in said for one in words)
    assert "fix:" in said
    assert "Traceback" not in said
    assert "wrong" not in said.replace("wrong_password", "")
    assert lone_database.execute("SELECT FROM pg_namespace WHERE nspname = 'cdcsync'") == []


@pytest.mark.parametrize(("command", "section"), [("run", "worker"), ("serve", "serve")])
def test_a_port_that_is_taken_is_told_with_the_key_that_names_another(
    lone_database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, section: str
) -> None:
    lone_database.execute(ARTICLES)
    path = tmp_path / "cdcsync.toml"
    text = CONFIG.format(source=lone_database.dsn, target=lone_database.dsn)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        path.write_text(text.replace("127.0.0.1:0", address))
        with pytest.raises(SystemExit) as exited:
            main([command, "-c", str(path)])
    told = capsys.readouterr().err
    assert exited.value.code == 2
    assert "error: cannot listen: another process listens there" in told
    assert address in told
    assert f"fix:   stop it, or give {section}.listen another port; 0 is any free one" in told
    assert lone_database.execute("SELECT FROM pg_namespace WHERE nspname = 'cdcsync'") == []
