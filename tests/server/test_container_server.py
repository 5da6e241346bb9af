"""The pipeline of docker/compose.yaml without an engine: its scripts on a server of their own, its worker a process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests import ROOT
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server

DOCKER = ROOT / "docker"

MODEL = 'type = "sentence-transformers"\nmodel = "sentence-transformers/all-MiniLM-L6-v2"'


def initialise(cluster: Cluster) -> None:
    """Do what the database's image does with a directory of scripts."""
    with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE shop")
    environment = {
        "PATH": f"{cluster.programs.bin_dir}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(cluster.port),
        "POSTGRES_USER": "postgres",
        "POSTGRES_DB": "shop",
        "ROLES_SQL": str(ROOT / "config" / "roles.sql"),
        "CDCSYNC_PASSWORD": "it's a secret",
    }
    for script in sorted((DOCKER / "initdb").iterdir()):
        command = ["psql", "-X", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "shop", "-f", str(script)]
        done = subprocess.run(
            [str(script)] if script.suffix == ".sh" else command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="the database's image has bash, this machine has not")
def test_the_pipeline_of_the_compose_file_runs(
    make_cluster: Callable[..., Cluster], make_pipeline: Callable[[str], Pipeline]
) -> None:
    cluster = make_cluster()
    initialise(cluster)
    text = (DOCKER / "cdcsync.toml").read_text()
    for in_container, here in (
        ("@postgres/", f"@127.0.0.1:{cluster.port}/"),
        ('"0.0.0.0:9477"', '"127.0.0.1:0"'),
        (MODEL, 'type = "hash"\ndimensions = 16'),
    ):
        assert in_container in text
        text = text.replace(in_container, here)
    pipeline = make_pipeline(text)

    worker = pipeline.start(PGPASSWORD="it's a secret")
    pipeline.live()
    with psycopg.connect(cluster.dsn("shop"), autocommit=True) as admin:
        admin.execute("UPDATE articles SET title = 'Forgotten passwords' WHERE id = 1")
        assert admin.execute("SELECT rolpassword LIKE 'SCRAM%' FROM pg_authid WHERE rolname = 'cdcsync'").fetchone()
    pipeline.in_step()

    port = [event["port"] for event in pipeline.events() if event["event"] == "listening"][-1]
    healthy = subprocess.run(
        [sys.executable, str(DOCKER / "healthcheck.py")], env={**os.environ, "CDCSYNC_HEALTH": str(port)}, timeout=30
    )
    assert healthy.returncode == 0
    assert pipeline.stop(worker, signal.SIGINT) == 0
