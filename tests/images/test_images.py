"""The images, built from docker/Dockerfile and run as an orchestrator runs them; `make image-test`.

They need an engine: docker or podman, whichever answers first, or the command that `CDCSYNC_ENGINE` names.
`CDCSYNC_BUILD_ARGS` and `CDCSYNC_RUN_ARGS` are options for `build` and `run` on this machine, such as a proxy's
certificate; `CDCSYNC_IMAGES` names the targets (default: slim,full).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests import ROOT
from tests.support.engines import engine
from tests.support.workers import until

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

TARGETS = os.environ.get("CDCSYNC_IMAGES", "slim,full").split(",")

CONFIG = """
[source]
dsn = "{dsn}"
slot = "in_a_container"
feedback_every_s = 1
[worker]
listen = "127.0.0.1:{port}"
[embedders.fake]
type = "hash"
dimensions = 16
[indexes.articles]
table = "public.articles"
text = "{{title}}"
embedder = "fake"
"""


class Images:
    """What one engine builds and runs."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._run_args = shlex.split(os.environ.get("CDCSYNC_RUN_ARGS", ""))

    def call(self, *arguments: str, ok: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run one command of the engine."""
        done = subprocess.run([*self._command, *arguments], capture_output=True, text=True, timeout=timeout)
        assert not ok or done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def build(self, target: str) -> str:
        """Build a target and return the image's name."""
        name = f"cdcsync-test:{target}"
        options = shlex.split(os.environ.get("CDCSYNC_BUILD_ARGS", ""))
        file = ["-f", "docker/Dockerfile", "--target", target, "-t", name]
        done = subprocess.run(
            [*self._command, "build", *options, *file, "."], cwd=ROOT, capture_output=True, text=True, timeout=1700
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return name

    @contextlib.contextmanager
    def running(self, image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[str]:
        """Run a container in the background, as an orchestrator would: read-only, without capabilities."""
        name = f"cdcsync-test-{secrets.token_hex(4)}"
        hardened = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        cache = ["--tmpfs", "/var/cache/cdcsync:rw,mode=1777"]
        started = ["run", "-d", "--name", name, *self._run_args, *hardened, *cache, *options, image, *command]
        self.call(*started)
        try:
            yield name
        finally:
            self.call("rm", "-f", name, ok=False)

    def output(self, image: str, *command: str, entrypoint: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a container to its end."""
        chosen = ["--entrypoint", entrypoint] if entrypoint else []
        return self.call("run", "--rm", *self._run_args, "--read-only", *chosen, image, *command, ok=False)


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(engine())


@pytest.fixture(scope="module", params=TARGETS)
def image(images: Images, request: pytest.FixtureRequest) -> str:
    return images.build(request.param)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        with psycopg.connect(made.dsn(), autocommit=True) as admin:
            admin.execute("CREATE EXTENSION vector")
            admin.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
            admin.execute("INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 100) AS i")
        yield made


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Worker:
    """A worker in a container that shares this machine's network."""

    def __init__(self, images: Images, name: str, port: int) -> None:
        self.images = images
        self.name = name
        self.port = port

    def code(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except OSError:
            return 0

    def said(self) -> str:
        done = self.images.call("logs", self.name, ok=False)
        return (done.stdout + done.stderr)[-3000:]


@contextlib.contextmanager
def worker(images: Images, image: str, cluster: Cluster, directory: Path) -> Iterator[Worker]:
    port = free_port()
    path = directory / "cdcsync.toml"
    path.write_text(CONFIG.format(dsn=cluster.dsn(), port=port))
    path.chmod(0o644)
    mounted = ["-v", f"{path}:/etc/cdcsync/cdcsync.toml:ro", "-e", f"CDCSYNC_HEALTH={port}", "--network", "host"]
    with images.running(image, *mounted) as name:
        yield Worker(images, name, port)


def rows(cluster: Cluster, statement: str, parameters: Mapping[str, object] | None = None) -> list[tuple[object, ...]]:
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        cursor = connection.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def test_a_pipeline_runs_end_to_end_in_a_container_without_privileges(
    images: Images, image: str, cluster: Cluster, tmp_path: Path
) -> None:
    with worker(images, image, cluster, tmp_path) as running:
        until(lambda: running.code("/readyz") == 200, running.said, patience_s=120)
        until(
            lambda: rows(cluster, "SELECT 1 FROM cdcsync.indexes WHERE name = 'articles' AND state = 'live'"),
            running.said,
            patience_s=120,
        )
        title = f"changed in {image}"
        rows(cluster, "UPDATE articles SET title = %(title)s WHERE id = 7", {"title": title})
        until(
            lambda: rows(cluster, "SELECT 1 FROM public.articles_index WHERE id = 7 AND content = %(t)s", {"t": title}),
            running.said,
        )
        healthy = images.call("exec", running.name, "python", "/usr/local/share/cdcsync/healthcheck.py", ok=False)
        assert healthy.returncode == 0, healthy.stderr
        status = images.call("exec", running.name, "cdcsync", "status", "--json")
        assert json.loads(status.stdout)["indexes"]["articles"]["state"] == "live"
        who = images.call("exec", running.name, "id", "-u")
        assert who.stdout.strip() == "65532"
        written = images.call("exec", running.name, "touch", "/opt/cdcsync/mine", ok=False)
        assert written.returncode != 0


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_container_in_order(
    images: Images, image: str, cluster: Cluster, tmp_path: Path, signal: str
) -> None:
    with worker(images, image, cluster, tmp_path) as running:
        until(lambda: running.code("/readyz") == 200, running.said, patience_s=120)
        images.call("kill", "--signal", signal, running.name)
        ended = images.call("wait", running.name)
        assert ended.stdout.strip() == "0", running.said()


def test_the_health_check_fails_where_no_worker_answers(images: Images, image: str) -> None:
    done = images.output(image, "/usr/local/share/cdcsync/healthcheck.py", entrypoint="python")
    assert done.returncode == 1


def test_the_image_names_a_user_a_health_check_and_an_entry_point(images: Images, image: str) -> None:
    (described,) = json.loads(images.call("image", "inspect", image).stdout)
    config = described["Config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["cdcsync"]
    health = config.get("Healthcheck") or described.get("Healthcheck") or {}
    assert "healthcheck.py" in " ".join(health.get("Test", []))
    assert images.output(image, "--help").returncode == 0


def test_a_missing_configuration_is_said_without_a_traceback(images: Images, image: str) -> None:
    done = images.output(image, "check")
    assert done.returncode == 2
    assert "/etc/cdcsync/cdcsync.toml" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
