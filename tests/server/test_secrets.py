"""No secret that a configuration can hold is shown by anything: worker, tool server, commands and tables.

One run of both servers has every secret at once, while providers answer with all that they were sent and servers
refuse the passwords. Each secret is then looked for in everything that was said.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import httpx2
import jwt
import msgspec
import pytest
from psycopg import conninfo, sql

from cdcsync.config import embedders, rerankers, sections, serving
from cdcsync.config.redaction import is_secret_key
from cdcsync.config.shape import Section
from cdcsync.config.values import ApiKey, Dsn, Header, Option, Text
from cdcsync.serve.identity import new_token
from tests.support import forked
from tests.support.provider import FakeProvider
from tests.support.servers import Database, Server
from tests.support.workers import PATIENCE_S, Pipeline, until

pytestmark = pytest.mark.server

PASSWORD = "xyzzy {}%/@' plugh"
VISIBLE = "xyzzy-{}-plugh"

SECRETS = {
    "source.dsn": PASSWORD.format("source"),
    "target.dsn": PASSWORD.format("target"),
    "serve.dsn": PASSWORD.format("serve"),
    "embedders.openai.api_key": VISIBLE.format("openai"),
    "embedders.openai.headers": VISIBLE.format("gateway"),
    "embedders.openai.query": VISIBLE.format("code"),
    "embedders.openai.document_body": VISIBLE.format("document-body"),
    "embedders.openai.query_body": VISIBLE.format("query-body"),
    "embedders.tei.api_key_file": VISIBLE.format("tei-file"),
    "embedders.tei.headers": VISIBLE.format("team"),
    "embedders.python.options": VISIBLE.format("options"),
    "rerankers.tei.api_key": VISIBLE.format("reranker"),
    "rerankers.tei.headers": VISIBLE.format("reranker-gateway"),
    "rerankers.tei.query": VISIBLE.format("reranker-code"),
    "serve.jwks": VISIBLE.format("jwks"),
    "a proxy in the environment": VISIBLE.format("proxy"),
    "a bearer token": "",
    "an unknown bearer token": VISIBLE.format("unknown"),
    "a signed token": jwt.encode({"sub": "somebody"}, "xyzzy-signing-key-of-32-bytes-plugh"),
    "a password of a caller": VISIBLE.format("basic"),
}
"""By where each is; that of a caller's token is made when the file of tokens is."""

REFUSED = "may not log in"

CLASS = """
class Own:
    identity, dimensions = "own", 16

    def __init__(self, api_key):
        self.key = api_key

    def embed(self, texts, *, kind):
        raise RuntimeError(f"nobody may log in with {self.key}")
"""


def text(dsn: dict[str, str], directory: Path, openai: FakeProvider, tei: FakeProvider) -> str:
    """Return a configuration with every secret."""
    key_file = directory / "key"
    key_file.write_text(SECRETS["embedders.tei.api_key_file"])
    (directory / "own_embedder.py").write_text(CLASS)

    def section(name: str, **keys: object) -> str:
        lines = [f"{key} = {json.dumps(value).replace('$', '$$')}" for key, value in keys.items()]
        return "\n".join([f"[{name}]", *lines])

    return "\n".join(
        [
            section("source", dsn=dsn["source"], slot=f"s_{secrets.token_hex(4)}", feedback_every_s=1),
            section("target", dsn=dsn["target"]),
            section("worker", listen="127.0.0.1:0", log_level="debug", log_format="json"),
            section(
                "serve",
                dsn=dsn["serve"],
                listen="127.0.0.1:0",
                tokens_file=str(directory / "tokens.json"),
                jwks=f"https://anybody:{SECRETS['serve.jwks']}@127.0.0.1:1/keys?code={SECRETS['serve.jwks']}",
                issuer="them",
                audience="us",
            ),
            section(
                "embedders.openai",
                type="openai",
                model="m",
                dimensions=16,
                base_url=openai.url,
                api_key=SECRETS["embedders.openai.api_key"],
            ),
            section("embedders.openai.headers", **{"X-Gateway": SECRETS["embedders.openai.headers"]}),
            section("embedders.openai.query", code=SECRETS["embedders.openai.query"]),
            section("embedders.openai.document_body", user_key=SECRETS["embedders.openai.document_body"]),
            section("embedders.openai.query_body", user_key=SECRETS["embedders.openai.query_body"]),
            section(
                "embedders.tei",
                type="tei",
                model="hashing",
                dimensions=16,
                base_url=tei.tei_url,
                api_key_file=str(key_file),
            ),
            section("embedders.tei.headers", **{"X-Team": SECRETS["embedders.tei.headers"]}),
            section("embedders.own", type="python", **{"class": "own_embedder:Own"}),
            section("embedders.own.options", api_key=SECRETS["embedders.python.options"]),
            section("rerankers.fine", type="tei", base_url=tei.tei_url, api_key=SECRETS["rerankers.tei.api_key"]),
            section("rerankers.fine.headers", **{"X-Gateway": SECRETS["rerankers.tei.headers"]}),
            section("rerankers.fine.query", code=SECRETS["rerankers.tei.query"]),
            section("indexes.articles", table="articles", text="{title}", embedder="openai", reranker="fine"),
            section("indexes.notes", table="notes", text="{title}", embedder="tei"),
            section("indexes.papers", table="papers", text="{title}", embedder="own"),
        ]
    )


def echo(exchange: Any, texts: list[str]) -> None:
    """Answer with all that came."""
    body = {name: value for name, value in exchange.body.items() if name == "user_key"} if exchange.body else {}
    exchange.answer(400, {"error": {"message": f"{body} {exchange.path} {dict(exchange.headers)}"}})


class Scene:
    """Both servers with every secret, and what anything said, by who said it."""

    def __init__(self, database: Database, pipeline: Pipeline, environment: dict[str, str]) -> None:
        self.database = database
        self.pipeline = pipeline
        self.environment = environment
        self.said: dict[str, str] = {}
        self.serving = pipeline.directory / "serve.log"

    def add(self, who: str, what: str) -> None:
        self.said[who] = self.said.get(who, "") + what

    def command(self, *arguments: str) -> None:
        """Run a command, however it ends."""
        done = forked.run(*arguments, "-c", str(self.pipeline.path), more=self.environment)
        self.add(f"cdcsync {arguments[0]}", done.stdout + done.stderr)

    def commands(self) -> None:
        for arguments in (
            ["check"],
            ["check", "--json"],
            ["config", "show"],
            ["config", "schema"],
            ["status", "--json"],
            ["plan"],
            ["failures", "notes", "list"],
            ["search", "articles", "title"],
            ["search", "papers", "title", "--mode", "vector"],
            ["token", "list"],
        ):
            self.command(*arguments)

    def worker(self) -> None:
        for path in ("/", "/livez", "/readyz", "/status", "/metrics", "/nowhere"):
            self.add("run: answers", self.pipeline.get(path)[1].decode())

    def serve(self) -> subprocess.Popen[bytes]:
        with self.serving.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cdcsync", "serve", "-c", str(self.pipeline.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    def port(self) -> int | None:
        lines = self.serving.read_text().splitlines()
        ports = [json.loads(line)["port"] for line in lines if '"event":"serving"' in line.replace(" ", "")]
        return ports[0] if ports else None

    def callers(self) -> None:
        """Call everything that the tool server has, as every kind of caller."""
        basic = base64.b64encode(f"me:{SECRETS['a password of a caller']}".encode()).decode()
        wrong = f"cdct_{SECRETS['an unknown bearer token']}"
        search = "/v1/indexes/articles/search"
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {}}
        found = {**call, "params": {"name": "search", "arguments": {"index": "articles", "query": "title"}}}
        with httpx2.Client(base_url=f"http://127.0.0.1:{self.port()}", timeout=30) as client:
            for authorization in (
                None,
                f"Bearer {SECRETS['a bearer token']}",
                f"Bearer {wrong}",
                f"Bearer {SECRETS['a signed token']}",
                f"Basic {basic}",
            ):
                headers = {"Authorization": authorization} if authorization else {}
                mcp = {**headers, "Accept": "application/json, text/event-stream"}
                answers = [
                    *(
                        client.get(path, headers=headers)
                        for path in (
                            "/",
                            "/openapi.json",
                            "/v1/indexes",
                            "/v1/indexes/articles/documents/1",
                            "/livez",
                            "/readyz",
                            "/metrics",
                            "/nowhere",
                        )
                    ),
                    *(
                        client.post(search, headers=headers, json={"query": "title", **more})
                        for more in ({}, {"mode": "vector"}, {"mode": "text"}, {"filter": {"x": 1}}, {"k": "x"})
                    ),
                    client.post("/v1/indexes/papers/search", headers=headers, json={"query": "title"}),
                    client.post(search, headers=headers, content=b"{"),
                    client.post("/v1/embed", headers=headers, json={"index": "articles", "queries": ["title"]}),
                    *(
                        client.post("/mcp", headers=mcp, json=body)
                        for body in ({**call, "method": "tools/list"}, found, {**call, "params": {"name": "none"}})
                    ),
                ]
                for answer in answers:
                    self.add("serve: answers", f"{answer.headers}\n{answer.text}\n")

    def tables(self) -> None:
        names = self.database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'cdcsync'")
        for (name,) in names:
            self.add("tables", str(self.database.execute(f"SELECT t::text FROM cdcsync.{name} AS t")))


def login(admin: Any, name: str, password: str) -> None:
    parts = sql.Identifier(name), sql.Literal(password)
    admin.execute(sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}").format(*parts))


def run(
    database: Database,
    server: Server,
    directory: Path,
    roles: dict[str, str],
    openai: FakeProvider,
    tei: FakeProvider,
) -> Scene:
    for name in ("articles", "notes", "papers"):
        database.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)")
        database.execute(f"INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 9) AS i")
    given = conninfo.conninfo_to_dict(database.dsn)
    uri = "postgresql://{}:{}@{}:{}/{}".format(
        roles["target"],
        quote(SECRETS["target.dsn"], safe=""),
        quote(str(given["host"]), safe=""),
        given["port"],
        given["dbname"],
    )
    dsn = {
        "target": uri,
        **{
            side: conninfo.make_conninfo(database.dsn, user=roles[side], password=SECRETS[f"{side}.dsn"])
            for side in ("source", "serve")
        },
    }
    SECRETS["a bearer token"] = new_token(directory / "tokens.json", "a caller", {}, None)
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        threading.Thread(target=lambda: hear(manager, heard), daemon=True).start()
        environment = {
            "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
            "HTTPS_PROXY": f"http://me:{SECRETS['a proxy in the environment']}@127.0.0.1:1",
            "NO_PROXY": "",
        }
        pipeline = Pipeline(directory, text(dsn, directory, openai, tei))
        scene = Scene(database, pipeline, environment)
        worker = pipeline.start(**environment, NOTIFY_SOCKET=str(directory / "notify"))
        serving = scene.serve()
        try:
            until(lambda: live(database, 2), pipeline.tail)
            until(scene.port, scene.serving.read_text)
            scene.add("run: command line", Path(f"/proc/{worker.pid}/cmdline").read_text())
            scene.callers()

            openai.always = tei.always = echo
            database.execute("UPDATE articles SET title = 'new ' || id; UPDATE notes SET title = 'new ' || id")
            until(
                lambda: all(
                    f"embedder {one}" in scene.pipeline.get("/readyz")[1].decode() for one in ("openai", "tei", "own")
                ),
                pipeline.tail,
            )
            until(lambda: "embedder openai" in "\n".join(heard), lambda: "\n".join(heard))
            scene.worker()
            scene.callers()
            scene.commands()

            with server.connect() as admin:
                for role in roles.values():
                    admin.execute(sql.SQL("ALTER ROLE {} PASSWORD 'another' NOLOGIN").format(sql.Identifier(role)))
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY(%s)",
                    [[*roles.values()]],
                )
            scene.callers()
            scene.commands()
            until(lambda: REFUSED in pipeline.log.read_text(), pipeline.tail)
            scene.tables()
        finally:
            for process in (worker, serving):
                process.terminate()
                process.wait(timeout=PATIENCE_S)
            pipeline.source.close()
            pipeline.target.close()
        scene.add("run: log", pipeline.log.read_text())
        scene.add("serve: log", scene.serving.read_text())
        scene.add("run: service manager", "\n".join(heard))
    return scene


def live(database: Database, indexes: int) -> bool:
    if database.execute("SELECT to_regclass('cdcsync.indexes') IS NULL") == [(True,)]:
        return False
    return database.execute("SELECT count(*) FROM cdcsync.indexes WHERE state = 'live'") == [(indexes,)]


def hear(manager: socket.socket, heard: list[str]) -> None:
    while True:
        try:
            heard.append(manager.recv(65536).decode())
        except OSError:
            return


def test_a_secret_is_shown_nowhere(
    server: Server, database: Database, tmp_path: Path, provider: FakeProvider, other_provider: FakeProvider
) -> None:
    """Neither while all goes well, nor while providers echo, nor once the passwords are refused."""
    roles = {side: f"cdcsync_test_{side}_{secrets.token_hex(4)}" for side in ("source", "target", "serve")}
    with server.connect() as admin:
        for side, role in roles.items():
            login(admin, role, SECRETS[f"{side}.dsn"])
        try:
            said = run(database, server, tmp_path, roles, provider, other_provider).said
        finally:
            with database.connect() as inside:
                for role in roles.values():
                    inside.execute(sql.SQL("REASSIGN OWNED BY {} TO CURRENT_USER").format(sql.Identifier(role)))
            for role in roles.values():
                admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))

    # Everything was asked, and spoke of what holds the secrets: otherwise there would be nothing to hide.
    assert "not shown" in said["run: log"]
    assert "not shown" in said["run: service manager"]
    assert REFUSED in said["cdcsync check"]
    assert "model_away" in said["serve: log"]
    assert "keys_unreadable" in said["serve: log"]
    for word in ("Not signed in", "rerank", "searched by words alone"):
        assert word in said["serve: answers"]
    assert 'api_key = "***"' in said["cdcsync config"]

    shown = {where: {who for who, what in said.items() if is_in(secret, what)} for where, secret in SECRETS.items()}
    assert {where: who for where, who in shown.items() if who} == {}
    # Nor a part of one: no other word of all this has these.
    assert [who for who, what in said.items() if "xyzzy" in what or "plugh" in what] == []


def is_in(secret: str, what: str) -> bool:
    forms = {secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    return any(form in what for form in (*forms, base64.b64encode(f"me:{secret}".encode()).decode()))


@pytest.fixture
def other_provider() -> Iterator[FakeProvider]:
    made = FakeProvider()
    made.start()
    yield made
    made.stop()


REMOTE = {
    "api_key": "embedders.openai.api_key",
    "api_key_file": "embedders.tei.api_key_file",
    "headers": "embedders.openai.headers",
    "query": "embedders.openai.query",
    "document_body": "embedders.openai.document_body",
    "query_body": "embedders.openai.query_body",
}
HELD = {
    "Source.dsn": "source.dsn",
    "Target.dsn": "target.dsn",
    "Serve.dsn": "serve.dsn",
    "Serve.jwks": "serve.jwks",
    "Serve.tokens_file": "a bearer token",
    **{f"{kind}Embedder.{key}": secret for kind in ("Remote", "OpenAI", "Tei") for key, secret in REMOTE.items()},
    "PythonEmbedder.options": "embedders.python.options",
    "TeiReranker.api_key": "rerankers.tei.api_key",
    "TeiReranker.api_key_file": "embedders.tei.api_key_file",
    "TeiReranker.headers": "rerankers.tei.headers",
    "TeiReranker.query": "rerankers.tei.query",
}
"""The keys of the configuration that can hold a secret, or name a file of secrets, and what stands for each here."""


def held() -> set[str]:
    found = set()
    for section in [one for module in (sections, serving, embedders, rerankers) for one in vars(module).values()]:
        if not isinstance(section, type) or not issubclass(section, Section) or section is Section:
            continue
        for field in msgspec.structs.fields(section):
            arguments = get_args(field.type)
            named = is_secret_key(field.name) and field.type in (str, Text, str | None)
            free = any(argument in (Header, Option) for argument in arguments) or field.name in ("query", "jwks")
            if named or free or field.type in (Dsn, ApiKey) or field.name.endswith("_file"):
                found.add(f"{section.__name__}.{field.name}")
    return found


def test_every_key_that_can_hold_a_secret_is_among_them() -> None:
    assert held() == HELD.keys()
    assert set(HELD.values()) <= SECRETS.keys()
