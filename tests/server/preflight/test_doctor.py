"""`cdcsync check` against a server where as good as everything is wrong: each fault is told at once, with its fix."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.demo.cluster import Cluster, free_port

pytestmark = pytest.mark.server

CONFIG = """
[source]
dsn = "{source}"
slot = "sync"
spool_directory = "/nonexistent/spool"
[target]
dsn = "{target}"
[worker]
listen = "0.0.0.0:9477"
[embedders.fake]
type = "hash"
dimensions = 16
[embedders.away]
type = "openai"
model = "m"
dimensions = 3000
base_url = "http://127.0.0.1:{port}/v1"
[indexes.articles]
table = "articles"
text = "{{title}} {{boddy}}"
columns = ["tenant", "nosuch"]
embedder = "fake"
view = "taken"
search = "klingon"
[indexes.loose]
table = "loose"
text = "{{word}}"
embedder = "fake"
[indexes.secret]
table = "secret"
text = "{{word}}"
embedder = "fake"
[indexes.hidden]
table = "hidden"
text = "{{word}}"
embedder = "away"
[indexes.gone]
table = "artikles"
text = "{{word}}"
embedder = "fake"
[indexes.fleeting]
table = "fleeting"
text = "{{word}}"
embedder = "fake"
"""

SOURCE = """
CREATE TABLE articles (id int PRIMARY KEY, title text, body text, tenant int);
CREATE TABLE loose (word text);
CREATE TABLE secret (id int PRIMARY KEY, word text);
CREATE TABLE hidden (id int PRIMARY KEY, word text);
ALTER TABLE hidden ENABLE ROW LEVEL SECURITY;
CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY, word text);
GRANT SELECT ON articles, loose, hidden, fleeting TO sync;
CREATE PUBLICATION cdcsync FOR TABLE articles WITH (publish = 'insert')
"""

PLANTED = [
    ("source.spool_directory", "there is no directory", "mkdir -p"),
    ("worker.listen", "is reachable from other machines", "127.0.0.1"),
    ("embedders.away", "cannot be reached", "is up"),
    ("indexes.hidden.vector_type", "at most 2,000 dimensions", "halfvec"),
    ("source", "wal_level is replica", "ALTER SYSTEM SET wal_level"),
    ("source", "max_replication_slots is 0", "ALTER SYSTEM SET max_replication_slots"),
    ("source", "max_wal_senders is 0", "ALTER SYSTEM SET max_wal_senders"),
    ("source", "may not replicate", "ALTER ROLE sync REPLICATION"),
    ("publication cdcsync", "does not send update, delete, truncate", "ALTER PUBLICATION cdcsync SET"),
    ("publication cdcsync", "does not send public.loose", "ALTER PUBLICATION cdcsync ADD TABLE public.loose"),
    ("indexes.articles.columns", "no column nosuch", "its columns are"),
    ("indexes.articles.text", "no column boddy", 'did you mean "body"'),
    ("public.loose", "has no usable primary key", "ADD PRIMARY KEY"),
    ("public.secret", "may not read", "GRANT SELECT ON public.secret TO sync"),
    ("public.hidden", "row-level security", "BYPASSRLS"),
    ("indexes.gone.table", "there is no table public.artikles", "did you mean public.articles"),
    ("indexes.fleeting.table", "is unlogged", "SET LOGGED"),
    ("target", "may not create temporary tables", "GRANT TEMPORARY"),
    ("target", "pgvector is not installed", "CREATE EXTENSION vector"),
    ("target.schema", "does not exist", "CREATE SCHEMA cdcsync AUTHORIZATION sync"),
    ("indexes.articles.view", "public.taken exists", "name another view"),
    ("indexes.loose.view", "may not create relations in the schema public", "GRANT USAGE, CREATE ON SCHEMA public"),
    ("indexes.articles.search", "no text search configuration klingon", "simple"),
]
"""Where each fault is told, what is said of it, and the fix."""


def test_every_planted_fault_is_listed_at_once_with_its_fix(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster(settings={"wal_level": "replica", "max_replication_slots": "0", "max_wal_senders": "0"})
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE sync LOGIN")
        admin.execute("CREATE DATABASE shop")
        admin.execute("CREATE DATABASE search")
        admin.execute("REVOKE TEMPORARY, CREATE ON DATABASE search FROM PUBLIC")
    with psycopg.connect(cluster.dsn("shop"), autocommit=True) as admin:
        admin.execute(SOURCE)
    with psycopg.connect(cluster.dsn("search"), autocommit=True) as admin:
        admin.execute("CREATE TABLE taken ()")
    source, target = (conninfo.make_conninfo(cluster.dsn(name), user="sync") for name in ("shop", "search"))
    path = tmp_path / "cdcsync.toml"
    path.write_text(CONFIG.format(source=source, target=target, port=free_port()))

    done = subprocess.run(
        [sys.executable, "-m", "cdcsync", "check", "--json", "-c", str(path)], capture_output=True, text=True
    )

    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)["findings"]
    faults = [finding for finding in found if finding["level"] != "ok"]
    for where, message, fix in PLANTED:
        assert [
            fault
            for fault in faults
            if fault["where"] == where and message in fault["message"] and fix in fault["hint"]
        ], f"{where}: {message}"
    assert all(fault["hint"] for fault in faults)
    # Nothing is told twice.
    assert len({json.dumps(fault) for fault in faults}) == len(faults)
