"""What a worker says at its most talkative holds no value of a cell, no key and no password."""

from __future__ import annotations

import json
import secrets
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from psycopg import conninfo, sql

from cdcsync.config.redaction import dsn_fault, redact_dsn
from cdcsync.errors import CdcsyncError
from cdcsync.postgres.sessions import connect
from cdcsync.source.slot import SlotConnection
from tests.support import forked
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


@pytest.fixture
def database(login: Login, make_database: Callable[[], Database]) -> Database:
    """A database whose table holds the planted word in every cell; it goes before the role does."""
    made = make_database()
    made.execute("CREATE TABLE articles (id text PRIMARY KEY, author text, title text, body text)")
    made.execute(
        "INSERT INTO articles SELECT %(x)s || i, %(x)s, %(x)s, repeat(%(x)s || ' ', i)"
        " FROM generate_series(1, 30) AS i",
        {"x": PLANTED},
    )
    return made


@pytest.fixture
def pipeline(
    login: Login, database: Database, make_pipeline: Callable[[str], Pipeline], request: pytest.FixtureRequest
) -> Pipeline:
    """A pipeline that is live, with a worker that logs all it can; a parameter is the format of its log."""
    made = make_pipeline(talkative(login.dsn(database), getattr(request, "param", "json")))
    made.start()
    made.live()
    return made


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
        " WHERE table_schema = 'cdcsync' AND column_name IN ('error', 'reason', 'refusal')",
        [],
    )
    assert len(columns) >= 4
    return "\n".join(
        str(database.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")) for table, column in columns
    )


def shown(pipeline: Pipeline, **environment: str) -> str:
    """Return what the endpoints and the commands that operators use show."""
    asked = [pipeline.get(path)[1].decode() for path in ("/status", "/readyz", "/metrics")]
    for command in (["status"], ["check"], ["config", "show"]):
        done = forked.run(*command, "-c", str(pipeline.path), more=environment)
        asked += [done.stdout, done.stderr]
    return "\n".join(asked)


def said(pipeline: Pipeline) -> str:
    text = pipeline.log.read_text()
    assert text
    return text


def test_a_run_with_every_kind_of_change_and_broken_connections_gives_nothing_away(
    pipeline: Pipeline, database: Database
) -> None:
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


@pytest.mark.parametrize("pipeline", ["json", "console"], indirect=True)
def test_a_row_that_the_target_refuses_is_not_shown(pipeline: Pipeline, database: Database) -> None:
    database.execute("ALTER TABLE cdcsync.articles_chunks ADD CONSTRAINT short CHECK (length(author) < 20)")

    database.execute("UPDATE articles SET author = repeat(author, 9) WHERE id = 'xyzzy7'")

    until(lambda: "CheckViolation" in said(pipeline), pipeline.tail)
    assert PLANTED not in said(pipeline)


def test_a_password_that_is_refused_is_not_shown(login: Login, pipeline: Pipeline, database: Database) -> None:
    pipeline.stop(pipeline.processes[-1])
    path = pipeline.path
    path.write_text(path.read_text().replace(f"user={login.name}", "user=cdcsync_test_nobody"))

    again = pipeline.start()

    assert again.wait(timeout=60) == 2
    assert "cdcsync_test_nobody" in said(pipeline)
    assert PLANTED not in said(pipeline)


def test_an_error_that_quotes_a_value_is_stored_and_shown_without_it(pipeline: Pipeline, database: Database) -> None:
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
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    provider: FakeProvider,
) -> None:
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
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    tmp_path: Path,
) -> None:
    (tmp_path / "telling_documents.py").write_text(
        "def document(row):\n    if row['body'].count('xyzzy') == 7:\n        raise ValueError(row)\n"
        "    return row['body']\n"
    )
    text = talkative(login.dsn(database)).replace(
        'text = "{title}: {body}"', 'documents = "telling_documents:document"\ndocument_columns = ["body"]'
    )
    pipeline = make_pipeline(text)
    pipeline.start(PYTHONPATH=str(tmp_path))
    pipeline.live()
    database.execute("UPDATE articles SET body = 'xyzzy xyzzy xyzzy xyzzy xyzzy xyzzy xyzzy' WHERE id = 'xyzzy8'")
    pipeline.reach("articles")

    until(lambda: pipeline.times("document_failed") == 2, "both failures to be logged")
    assert [event["failed"] for event in pipeline.events() if event["event"] == "document_failed"] == [1, 1]
    assert pipeline.left_out("articles") == {("xyzzy7",), ("xyzzy8",)}
    assert "ValueError in telling_documents.py, line 3" in stored(database)
    until(lambda: "2 rows are left out" in pipeline.get("/status")[1].decode(), "the rows to be counted")
    assert PLANTED not in said(pipeline) + stored(database) + shown(pipeline, PYTHONPATH=str(tmp_path))


# -- passwords and keys, in every form ------------------------------------------------------------------------------

ANY = [chr(code) for code in range(1, 127)] + [
    "\x7f",
    "\x85",
    "\xa0",
    "\xad",
    "\xe9",
    "\u200b",
    "\u202e",
    "\u6771",
    "\U0001f600",
]
"""All of ASCII, and some of what is beyond: spaces that look like none, accents, other scripts."""


def quoted(password: str) -> str:
    return "'" + password.replace("\\", "\\\\").replace("'", "\\'") + "'"


FORMS: dict[str, Callable[[str], str]] = {
    "URI, escaped": lambda password: f"postgresql://role:{quote(password, safe='')}@127.0.0.1:1/db",
    "URI, as it is": lambda password: f"postgresql://role:{password}@127.0.0.1:1/db",
    "URI, as a parameter": lambda password: f"postgresql://127.0.0.1:1/db?password={password}",
    "pairs, quoted": lambda password: f"host=127.0.0.1 port=1 password={quoted(password)}",
    "pairs, as it is": lambda password: f"host=127.0.0.1 port=1 password={password}",
    "pairs, badly quoted": lambda password: f"host=127.0.0.1 port=1 password='{password}",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.anyio
async def test_no_message_or_traceback_holds_any_part_of_a_password_whatever_is_in_it(
    form: Callable[[str], str],
) -> None:
    for character in ANY:
        dsn = form(f"xyzzy{character}plugh")
        told = [redact_dsn(dsn), dsn_fault(dsn) or ""]
        for opened in (connect(dsn, "source"), SlotConnection.connect(dsn)):
            with pytest.raises(CdcsyncError) as raised:
                await opened
            error: BaseException | None = raised.value
            told += [str(raised.value), str(raised.value.hint)]
            while error is not None:  # what a traceback would show
                told += traceback.format_exception_only(error)
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        for text in told:
            assert "plugh" not in text, (character, text)
            assert "xyzzy" not in text, (character, text)


NASTY = "x%y'z z\\y \"$ {}@:/?#[]&=+,;`~|<>*!^\u00e9\u6771\U0001f600"
"""A password that every notation has to quote in its own way."""

PROVEN_WAYS = ("pairs", "service file", "password file")


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    "way", ["URI", "environment", *(pytest.param(one, marks=pytest.mark.proof) for one in PROVEN_WAYS)]
)
def test_a_password_may_be_anything_and_is_shown_nowhere_however_it_is_given(
    login: Login,
    server: Server,
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    login.password = PLANTED + NASTY
    with server.connect() as admin:
        admin.execute(
            sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(login.name), sql.Literal(login.password))
        )
    database.execute("TRUNCATE articles")
    given: dict[str, Any] = {**conninfo.conninfo_to_dict(database.dsn), "user": login.name}
    given.pop("password", None)
    environment = {}
    match way:
        case "URI":
            host = f"{given['host']}:{given['port']}"
            dsn = f"postgresql://{login.name}:{quote(login.password, safe='')}@{host}/{given['dbname']}"
        case "pairs":
            dsn = conninfo.make_conninfo(**given, password=login.password)
        case "service file":
            file = tmp_path / "services"
            keys = {**given, "password": login.password}
            file.write_text("[ours]\n" + "".join(f"{key}={value}\n" for key, value in keys.items()))
            dsn, environment = "service=ours", {"PGSERVICEFILE": str(file)}
        case "password file":
            file = tmp_path / "passwords"
            escaped = login.password.replace("\\", "\\\\").replace(":", "\\:")
            file.write_text(f"*:*:*:*:{escaped}\n")
            file.chmod(0o600)
            dsn = conninfo.make_conninfo(**given, passfile=str(file))
        case _:
            dsn, environment = conninfo.make_conninfo(**given), {"PGPASSWORD": login.password}
    text = talkative(database.dsn).replace(
        json.dumps(database.dsn), json.dumps(dsn.replace("$", "$$"), ensure_ascii=False)
    )
    for name, value in environment.items():  # this process connects, too
        monkeypatch.setenv(name, value)
    pipeline = make_pipeline(text)
    pipeline.copied = False
    worker = pipeline.start(**environment)
    pipeline.live()
    database.execute("INSERT INTO articles VALUES ('1', 'a', 'b', 'c')")
    until(lambda: database.execute("SELECT FROM articles_index"), pipeline.tail)
    told = said(pipeline) + stored(database) + shown(pipeline, **environment)
    told += Path(f"/proc/{worker.pid}/cmdline").read_text()
    assert pipeline.stop(worker) == 0

    # And once it is refused: the server, and every command, speak of the attempt.
    with server.connect() as admin:
        admin.execute(sql.SQL("ALTER ROLE {} PASSWORD 'another'").format(sql.Identifier(login.name)))
    told += said_of_refusals(pipeline, environment)
    for part in (PLANTED, "z z", quote(NASTY, safe="")[:12], "{}@:", "[]&=", "`~|"):
        assert part not in told, part


def said_of_refusals(pipeline: Pipeline, environment: dict[str, str]) -> str:
    told = []
    for command in (["status"], ["check"], ["search", "articles", "word"], ["teardown", "--yes"], ["run"]):
        done = forked.run(*command, "-c", str(pipeline.path), more=environment)
        told += [done.stdout, done.stderr]
    return "\n".join(told)


def test_what_goes_into_headers_and_addresses_of_a_provider_is_shown_nowhere(
    login: Login,
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    provider: FakeProvider,
) -> None:
    secrets_ = {name: f"{PLANTED}-{name}-0123456789" for name in ("gateway", "team", "code")}

    def echo(exchange: Any, texts: list[str]) -> None:
        """Answer with all that came."""
        exchange.answer(500, {"error": {"message": f"{exchange.path} {dict(exchange.headers)}"}})

    provider.always = echo
    hosted = {
        **{"type": "openai", "model": "m", "base_url": provider.url, "dimensions": 16},
        "headers": {"X-Gateway": secrets_["gateway"], "X-Team": secrets_["team"]},
        "query": {"code": secrets_["code"], "api-version": "2026-01-01"},
    }
    pipeline = make_pipeline(talkative(login.dsn(database), embedder=hosted))
    pipeline.start()

    pipeline.event("embedder_unavailable")

    sent, headers, _ = provider.requests[0]
    assert secrets_["code"] in sent
    assert headers["x-gateway"] == secrets_["gateway"]
    until(lambda: "not shown" in pipeline.get("/status")[1].decode(), pipeline.tail)
    told = said(pipeline) + stored(database) + shown(pipeline)
    assert PLANTED not in told
    assert "2026-01-01" in told  # what is no secret is shown
