"""`cdcsync init`: from a table to a worker that runs, with the file and the SQL that it wrote."""

from __future__ import annotations

import os
import pty
import re
import secrets
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
import pytest
from psycopg import conninfo, pq, sql

from cdcsync.cli.init import _index_name, _named
from tests.support import forked
from tests.support.servers import Database, Server
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server

TABLE = """
CREATE TABLE public.tickets (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant int NOT NULL, status text NOT NULL, body text, subject text NOT NULL, customer_email text, payload jsonb
);
CREATE INDEX ON public.tickets (tenant);
INSERT INTO public.tickets (tenant, status, subject, body, customer_email)
SELECT i % 4, (ARRAY['open', 'closed'])[1 + i % 2], 'subject ' || i,
       'a body with some words about matter ' || i, 'person' || i || '@example.org'
FROM generate_series(1, 40) AS i
"""


@pytest.fixture
def role(server: Server) -> Iterator[tuple[str, str]]:
    """A role that does not exist yet, and its password; named before the database by each test, so dropped after it."""
    name = f"cdcsync_test_{secrets.token_hex(6)}"
    yield name, secrets.token_urlsafe(9)
    with server.connect() as admin:
        admin.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))


def cdcsync(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(*arguments, more={}, directory=where)


def written(where: Path) -> dict[str, Any]:
    return tomllib.loads((where / "cdcsync.toml").read_text())


def test_check_and_run_work_with_what_init_wrote(
    role: tuple[str, str], make_database: Callable[[], Database], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, password = role
    database = make_database()
    database.execute(TABLE)
    done = cdcsync(tmp_path, "init", database.dsn, "--table", "tickets", "--embedder", "hash", "--role", name)
    assert done.returncode == 0, done.stderr
    index = written(tmp_path)["indexes"]["tickets"]
    assert (index["text"], index["columns"]) == ("{subject}\n\n{body}", ["tenant", "status"])
    assert index["indexed"] == ["tenant"]
    assert "password" not in conninfo.conninfo_to_dict(written(tmp_path)["source"]["dsn"])

    before = cdcsync(tmp_path, "check")
    assert before.returncode == 2, before.stdout
    database.execute(done.stdout)
    with database.connect() as admin:
        admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(name), sql.Literal(password)))
    monkeypatch.setenv("PGPASSWORD", password)
    after = cdcsync(tmp_path, "check")
    assert after.returncode == 0, after.stdout + after.stderr

    text = (tmp_path / "cdcsync.toml").read_text()
    mine = f'[worker]\nlisten = "127.0.0.1:0"\n\n[source]\nslot = "{database.name}"\n'
    pipeline = Pipeline(tmp_path, text.replace("[source]\n", mine))
    process = pipeline.start()
    try:
        pipeline.live()
        database.execute("INSERT INTO public.tickets (tenant, status, subject) VALUES (9, 'open', 'a new one')")
        pipeline.in_step("tickets")
        assert pipeline.stop(process) == 0
    finally:
        process.kill()
        process.wait()
        pipeline.close()
    again = cdcsync(tmp_path, "init", database.dsn, "--table", "tickets", "--role", name, "-o", "again.toml")
    assert "nothing left to run" in again.stdout


def test_the_key_of_a_table_without_a_primary_key_is_a_unique_index(database: Database, tmp_path: Path) -> None:
    database.execute(
        "CREATE TABLE notes (code text NOT NULL, body text); CREATE UNIQUE INDEX notes_code ON notes (code)"
    )
    done = cdcsync(tmp_path, "init", database.dsn, "--table", "notes", "--embedder", "hash")
    assert done.returncode == 0, done.stderr
    assert "ALTER TABLE public.notes REPLICA IDENTITY USING INDEX notes_code;" in done.stdout
    assert written(tmp_path)["indexes"]["notes"]["text"] == "{body}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "nosuch"], "there is no table public.nosuch"),
        (["--table", "a view"], "expected a name"),
        (["--table", "shown"], "public.shown is a view"),
        (["--table", "heap"], "has no usable primary key"),
        (["--table", "numbers"], "no column of public.numbers looks like text"),
        (["--table", "numbers", "--text", "{nosuch}"], "has no column nosuch"),
        (["--table", "numbers", "--text", "{n"], "text"),
        (["--table", "numbers", "--name", "Foo Bar"], "where: --name"),
        (["--table", "numbers", "--text", "{n}", "--columns", "", "--indexed", "m"], "m is not a column of the index"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_indexed_is_refused_and_nothing_is_written(
    arguments: list[str], said: str, database: Database, tmp_path: Path
) -> None:
    database.execute(
        "CREATE TABLE heap (body text); CREATE TABLE numbers (id int PRIMARY KEY, n int, m int);"
        " CREATE VIEW shown AS SELECT * FROM numbers"
    )
    done = cdcsync(tmp_path, "init", database.dsn, *arguments, "--embedder", "hash")
    assert done.returncode == 2
    assert said in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("table", "index"),
    [
        ("Größen-Tabelle", "grossen_tabelle"),
        ('shop."Ærø & Þór"', "aero_thor"),
        ("Łódź__Crème brûlée", "lodz_creme_brulee"),
        ("ﬁ―№2", "fi_no2"),
        ("2024-Ausgaben", "_2024_ausgaben"),
        ("таблица", "documents"),
        ("İstanbul-" + "x" * 60, "istanbul_" + "x" * 31),
        ("x" * 39 + "-y", "x" * 39),
    ],
)
def test_an_index_has_the_name_of_its_table_in_plain_letters(table: str, index: str) -> None:
    assert _index_name(table) == index
    assert _named(index) == index


MANY = ", ".join(f"n{number} int" for number in range(58))


@pytest.mark.proof_from(3)
@pytest.mark.parametrize(
    ("created", "table", "text", "columns"),
    [
        pytest.param(
            'CREATE SCHEMA "My ""S";'
            'CREATE TABLE "My ""S"."Ti.ckets" ("The Id" int PRIMARY KEY, "Body" text, "from" int)',
            '"My ""S"."Ti.ckets"',
            "{Body}",
            ["from"],
            id="quoted names",
        ),
        pytest.param(
            "CREATE TABLE t (id int PRIMARY KEY, body text, tags text[], payload jsonb, span int4range, at date)",
            "t",
            "{body}",
            ["at"],
            id="arrays, jsonb and ranges",
        ),
        pytest.param(f"CREATE TABLE t (id int PRIMARY KEY, body text, {MANY})", "t", "{body}", 8, id="sixty columns"),
        pytest.param(
            f"CREATE TABLE t (id int PRIMARY KEY, body text, {MANY}); CREATE INDEX ON t (n57)",
            "t",
            "{body}",
            ["n0", "n1", "n2", "n3", "n4", "n5", "n6", "n57"],
            id="sixty columns, one of them indexed",
        ),
        pytest.param(
            "CREATE TABLE t (id int, region int, body text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);"
            "CREATE TABLE t1 PARTITION OF t FOR VALUES IN (1); CREATE TABLE t2 PARTITION OF t DEFAULT",
            "t",
            "{body}",
            [],
            id="a partitioned table",
        ),
        pytest.param(
            "CREATE TABLE a (id uuid PRIMARY KEY); CREATE SCHEMA other; CREATE TABLE other.t (id int PRIMARY KEY);"
            "CREATE TABLE t (id int PRIMARY KEY REFERENCES other.t, owner uuid REFERENCES a, body varchar(300))",
            "t",
            "{body}",
            ["owner"],
            id="foreign keys, and a table of that name in another schema",
        ),
        pytest.param(
            "CREATE DOMAIN prose AS text; CREATE TYPE mood AS ENUM ('ok');"
            "CREATE TABLE t (id int PRIMARY KEY, body prose, mood mood, email text, password_hash text)",
            "t",
            "{body}",
            [],
            id="domains, enums and private columns",
        ),
    ],
)
def test_check_accepts_what_is_proposed_for_an_awkward_table(
    created: str, table: str, text: str, columns: list[str] | int, database: Database, tmp_path: Path
) -> None:
    for statement in created.split(";"):
        database.execute(statement)
    user = conninfo.conninfo_to_dict(database.dsn)["user"]
    done = cdcsync(tmp_path, "init", database.dsn, "--table", table, "--embedder", "hash", "--role", str(user))
    assert done.returncode == 0, done.stderr
    (index,) = written(tmp_path)["indexes"].values()
    carried = index["columns"]
    assert (index["text"], carried if isinstance(columns, list) else len(carried)) == (text, columns)
    with database.connect() as administrator:
        administrator.execute(done.stdout.encode())
    checked = cdcsync(tmp_path, "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_stored_generated_columns_are_proposed_if_the_server_can_send_them(source_dsn: str, tmp_path: Path) -> None:
    schema = f"init_{secrets.token_hex(6)}"
    user = str(conninfo.conninfo_to_dict(source_dsn)["user"])
    with psycopg.connect(source_dsn, autocommit=True) as source:
        source.execute(
            f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.t (id int PRIMARY KEY, body text,"
            " summary text GENERATED ALWAYS AS (substr(body, 1, 80)) STORED,"
            " size int GENERATED ALWAYS AS (length(body)) STORED)"
        )
        try:
            done = cdcsync(tmp_path, "init", source_dsn, "--table", f"{schema}.t", "--embedder", "hash", "--role", user)
            assert done.returncode == 0, done.stderr
            index = written(tmp_path)["indexes"]["t"]
            sends = source.info.server_version >= 180_000
            expected = ("{summary}\n\n{body}", ["size"]) if sends else ("{body}", [])
            assert (index["text"], index["columns"]) == expected
            # Its target may lack pgvector; nothing is wrong with the columns.
            assert "generated" not in cdcsync(tmp_path, "check").stdout
        finally:
            source.execute(f"DROP SCHEMA {schema} CASCADE")


def test_a_virtual_column_is_not_proposed(database: Database, tmp_path: Path) -> None:
    if database.execute("SELECT current_setting('server_version_num')::int < 180000") == [(True,)]:
        pytest.skip("virtual generated columns came with PostgreSQL 18")
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, body text, summary text GENERATED ALWAYS AS (left(body, 80)) VIRTUAL,"
        " size int GENERATED ALWAYS AS (length(body)) VIRTUAL)"
    )
    done = cdcsync(tmp_path, "init", database.dsn, "--table", "t", "--embedder", "hash")
    assert done.returncode == 0, done.stderr
    index = written(tmp_path)["indexes"]["t"]
    assert (index["text"], index["columns"]) == ("{body}", [])


def test_each_pipeline_gets_a_slot_that_nothing_on_the_server_has(lone_database: Database, tmp_path: Path) -> None:
    lone_database.execute(TABLE)
    slots = []
    for number in range(3):
        done = cdcsync(tmp_path, "init", lone_database.dsn, "--table", "tickets", "-o", f"{number}.toml")
        assert done.returncode == 0, done.stderr
        slots.append(tomllib.loads((tmp_path / f"{number}.toml").read_text())["source"].get("slot", "cdcsync"))
        if number < 2:
            lone_database.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slots[-1]])
    assert slots == ["cdcsync", f"cdcsync_{lone_database.name}", f"cdcsync_{lone_database.name}_2"]


def test_a_file_that_is_there_is_kept(database: Database, tmp_path: Path) -> None:
    (tmp_path / "cdcsync.toml").write_text("mine")
    assert cdcsync(tmp_path, "init", database.dsn, "--table", "x").returncode == 2
    assert (tmp_path / "cdcsync.toml").read_text() == "mine"


SECRETS = {
    "password": "geheim 1",
    "sslpassword": "geheim 2",
    "scram_client_key": "Z2VoZWlt" * 5 + "Z2U=",
    "oauth_client_secret": "geheim",
}


@pytest.mark.parametrize("as_uri", [True, False])
def test_no_secret_of_the_connection_string_is_written(database: Database, tmp_path: Path, as_uri: bool) -> None:
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    hidden = {name: value for name, value in SECRETS.items() if name in known}
    settings = conninfo.conninfo_to_dict(database.dsn) | {"sslmode": "prefer"}
    dsn = conninfo.make_conninfo("", **(settings | hidden))
    if as_uri:
        dsn = f"postgresql:///?{urlencode(settings | hidden, quote_via=quote)}"
    database.execute(TABLE)
    done = cdcsync(tmp_path, "init", dsn, "--table", "tickets", "--role", "worker", "--embedder", "hash")
    assert done.returncode == 0, done.stderr
    kept = conninfo.conninfo_to_dict(written(tmp_path)["source"]["dsn"])
    assert kept == {**{name: value for name, value in settings.items() if name not in hidden}, "user": "worker"}
    text = (tmp_path / "cdcsync.toml").read_text()
    left_out = [name for name in hidden if name != "password"]
    assert "sslpassword" in left_out
    assert re.findall("# (.*): left out", text) == [", ".join(left_out)]


@pytest.mark.parametrize("password", ["geheim", "ge#heim", "ge?heim", "ge:heim", "ge%40heim"])
def test_no_part_of_a_password_in_a_uri_is_written(database: Database, tmp_path: Path, password: str) -> None:
    database.execute(TABLE)
    known = conninfo.conninfo_to_dict(database.dsn)
    place = f"{known['host']}:{known['port']}/{known['dbname']}"
    dsn = f"postgresql://{known['user']}:{password}@{place}"
    done = cdcsync(tmp_path, "init", dsn, "--table", "tickets", "--role", "worker", "--embedder", "hash")
    assert done.returncode == 0, done.stderr
    expected = conninfo.conninfo_to_dict(f"postgresql://worker@{place}")
    assert conninfo.conninfo_to_dict(written(tmp_path)["source"]["dsn"]) == expected


def asked(database: Database, folder: Path, answers: bytes) -> tuple[int, bytes, bytes]:
    """Answer what `init` asks in a terminal; returns its exit status, its output and what it said."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "cdcsync", "init", database.dsn, "--table", "tickets", "--embedder", "hash"],
            cwd=folder,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.write(ours, answers)
        output, said = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    return process.returncode, output, said


def test_in_a_terminal_it_asks_and_takes_the_answers(database: Database, tmp_path: Path) -> None:
    database.execute(TABLE)
    status, output, said = asked(database, tmp_path, b"{subject}: {body}\nstatus\n-\n")
    assert status == 0, said
    index = written(tmp_path)["indexes"]["tickets"]
    assert (index["text"], index["columns"], index["indexed"]) == ("{subject}: {body}", ["status"], [])
    assert b"[tenant,status]" in said
    assert output.startswith(b"-- For an administrator")


def test_names_of_others_do_not_act_on_the_terminal_of_who_is_asked(database: Database, tmp_path: Path) -> None:
    database.execute(
        sql.SQL("CREATE TABLE tickets (id int PRIMARY KEY, subject text, {} int NOT NULL)").format(
            sql.Identifier("tenant\x1b[2J\r\n-- forged")
        )
    )
    _, _, said = asked(database, tmp_path, b"{subject}\n\n-\n")
    assert "tenant·[2J -- forged" in said.decode()
    assert b"\x1b" not in said
    assert b"\r" not in said
