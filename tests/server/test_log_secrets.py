"""What a worker says at its most talkative holds no value of a cell, no key and no password."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from psycopg import conninfo, sql

from tests.support.configs import FAKE, Section, configuration
from tests.support.provider import FakeProvider, status
from tests.support.servers import Database, Server
from tests.support.workers import Pipeline, until

pytestmark = pytest.mark.server

PLANTED = "xyzzy"
"""In every cell, and in nothing that may be logged."""


class Login:
    """A role whose password must not be seen."""

    def __init__(self, name: str, password: str) -> None:
        self.name = name
        self.password = password

    def dsn(self, database: Database) -> str:
        """Return a connection string with the password in it."""
        return conninfo.make_conninfo(database.dsn, user=self.name, password=self.password)


@pytest.fixture
def login(server: Server) -> Iterator[Login]:
    """Made before the databases, and dropped after them."""
    made = Login(f"cdcsync_test_{secrets.token_hex(4)}", f"{PLANTED}-{secrets.token_hex(8)}")
    role = sql.Identifier(made.name)
    with server.connect() as admin:
        admin.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}").format(role, sql.Literal(made.password)))
    yield made
    with server.connect() as admin:
        admin.execute(sql.SQL("DROP ROLE {}").format(role))


def fill(database: Database) -> None:
    database.execute("CREATE TABLE articles (id text PRIMARY KEY, author text, title text, body text)")
    database.execute(
        "INSERT INTO articles SELECT %(x)s || i, %(x)s, %(x)s, repeat(%(x)s || ' ', i)"
        " FROM generate_series(1, 30) AS i",
        {"x": PLANTED},
    )


def start(
    make_pipeline: Callable[[str], Pipeline],
    login: Login,
    database: Database,
    format_: str = "json",
) -> Pipeline:
    pipeline = make_pipeline(talkative(login.dsn(database), format_))
    pipeline.start()
    return pipeline


def talkative(dsn: str, format_: str = "json", embedder: Section = FAKE["fake"]) -> str:
    """Return a configuration that logs everything there is, of small batches and pages."""
    return configuration(
        dsn,
        target=dsn,
        worker_lines=f'log_level = "debug"\nlog_format = "{format_}"\nbatch_rows = 5\nbackfill_page_rows = 5',
        embedders={"fake": embedder},
        indexes={"articles": {"text": "{title}: {body}", "columns": ["author"]}},
    )


def stored(database: Database) -> str:
    """Return every column of ours that tells of an error."""
    columns = database.execute(
        "SELECT format('%%I.%%I', table_schema, table_name), format('%%I', column_name) FROM information_schema.columns"
        " WHERE table_schema = 'cdcsync' AND column_name IN ('error', 'reason')",
        [],
    )
    assert len(columns) >= 3
    return "\n".join(
        str(database.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")) for table, column in columns
    )


def shown(pipeline: Pipeline, **environment: str) -> str:
    """Return what the endpoints and the commands that operators use show."""
    asked = [pipeline.get(path)[1].decode() for path in ("/status", "/readyz", "/metrics")]
    for command in (["status"], ["check"], ["config", "show"]):
        done = subprocess.run(
            [sys.executable, "-m", "cdcsync", *command, "-c", str(pipeline.path)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        asked += [done.stdout, done.stderr]
    return "\n".join(asked)


def said(pipeline: Pipeline) -> str:
    text = pipeline.log.read_text()
    assert text
    return text


def test_a_run_with_every_kind_of_change_and_broken_connections_gives_nothing_away(
    login: Login,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
) -> None:
    database = make_database()
    fill(database)
    pipeline = start(make_pipeline, login, database)
    pipeline.live()
    for statement in (
        "UPDATE articles SET author = author || '1' WHERE id < 'xyzzy2'",
        "UPDATE articles SET id = id || 'moved' WHERE id = 'xyzzy3'",
        "DELETE FROM articles WHERE id = 'xyzzy4'",
        "ALTER TABLE articles ALTER body SET STORAGE EXTERNAL",
        "UPDATE articles SET body = repeat(md5(id) || ' xyzzy', 400) WHERE id = 'xyzzy5'",
        "UPDATE articles SET author = 'xyzzy6' WHERE id = 'xyzzy5'",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'cdcsync%'",
        "TRUNCATE articles",
        "INSERT INTO articles VALUES ('xyzzy1', 'xyzzy2', 'xyzzy3', 'xyzzy4')",
    ):
        database.execute(statement)
    pipeline.in_step()

    assert {"batch_applied", "streaming"} <= {event["event"] for event in pipeline.events()}
    assert PLANTED not in said(pipeline)
    _, status = pipeline.get("/status")
    _, metrics = pipeline.get("/metrics")
    assert PLANTED.encode() not in status + metrics


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_row_that_the_target_refuses_is_not_shown(
    login: Login,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    format_: str,
) -> None:
    database = make_database()
    fill(database)
    pipeline = start(make_pipeline, login, database, format_)
    pipeline.live()
    database.execute("ALTER TABLE cdcsync.articles_chunks ADD CONSTRAINT short CHECK (length(author) < 20)")

    database.execute("UPDATE articles SET author = repeat(author, 9) WHERE id = 'xyzzy7'")

    until(lambda: "CheckViolation" in said(pipeline), pipeline.tail)
    assert PLANTED not in said(pipeline)


def test_a_password_that_is_refused_is_not_shown(
    login: Login,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
) -> None:
    database = make_database()
    fill(database)
    pipeline = start(make_pipeline, login, database)
    pipeline.live()
    pipeline.stop(pipeline.processes[-1])
    path = pipeline.path
    path.write_text(path.read_text().replace(f"user={login.name}", "user=cdcsync_test_nobody"))

    again = pipeline.start()

    assert again.wait(timeout=60) == 2
    assert "cdcsync_test_nobody" in said(pipeline)
    assert PLANTED not in said(pipeline)


def test_an_error_that_quotes_a_value_is_stored_and_shown_without_it(
    login: Login,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
) -> None:
    database = make_database()
    fill(database)
    pipeline = start(make_pipeline, login, database)
    pipeline.live()
    # The condition is sound, and fails at the first row that it is asked of: "invalid input syntax for type integer".
    database.execute(
        "INSERT INTO cdcsync.backfills (index_name, kind, filter) VALUES ('articles', 'replay', 'author::int = 1')"
    )

    event = pipeline.event("backfill_failed")

    assert 'invalid input syntax for type integer: "…"' in event["error"]
    until(lambda: "its last replay failed" in pipeline.get("/status")[1].decode(), "the failure to be shown")
    assert "invalid input syntax" in stored(database)
    assert PLANTED not in said(pipeline) + stored(database) + shown(pipeline)


def test_what_a_provider_says_of_a_text_is_stored_and_shown_without_text_and_key(
    login: Login,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    provider: FakeProvider,
) -> None:
    database = make_database()
    fill(database)
    provider.rejects = lambda text: text.count(PLANTED) == 9
    provider.misdeeds.append(status(500, {"error": {"message": f"no such key: {PLANTED}-key"}}))
    key = f"{PLANTED}-key"
    hosted = {"type": "openai", "model": "m", "base_url": provider.url, "api_key": key, "dimensions": 16}
    pipeline = make_pipeline(talkative(login.dsn(database), embedder=hosted))
    pipeline.start()

    pipeline.event("text_not_embedded")

    until(lambda: "400" in stored(database), pipeline.tail)
    assert PLANTED not in said(pipeline) + stored(database) + shown(pipeline)


def test_rows_that_no_document_can_be_made_of_are_logged_without_key_and_value_and_listed_by_key(
    login: Login,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    tmp_path: Path,
) -> None:
    (tmp_path / "telling_documents.py").write_text(
        "def document(row):\n    if row['body'].count('xyzzy') == 7:\n        raise ValueError(row)\n"
        "    return row['body']\n"
    )
    database = make_database()
    fill(database)
    text = talkative(login.dsn(database)).replace(
        'text = "{title}: {body}"', 'documents = "telling_documents:document"\ndocument_columns = ["body"]'
    )
    pipeline = make_pipeline(text)
    pipeline.start(PYTHONPATH=str(tmp_path))
    pipeline.live()
    database.execute("UPDATE articles SET body = 'xyzzy xyzzy xyzzy xyzzy xyzzy xyzzy xyzzy' WHERE id = 'xyzzy8'")
    pipeline.reach("articles")

    assert [event["failed"] for event in pipeline.events() if event["event"] == "document_failed"] == [1, 1]
    assert pipeline.left_out("articles") == {("xyzzy7",), ("xyzzy8",)}
    assert "ValueError in telling_documents.py, line 3" in stored(database)
    until(lambda: "2 rows are left out" in pipeline.get("/status")[1].decode(), "the rows to be counted")
    assert PLANTED not in said(pipeline) + stored(database) + shown(pipeline, PYTHONPATH=str(tmp_path))
