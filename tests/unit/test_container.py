"""The container files: what can be held to without an engine."""

from __future__ import annotations

import http.server
import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cdcsync
from cdcsync.cli.commands import CONFIG_VARIABLE
from cdcsync.config import Config, parse
from cdcsync.config.sections import Worker
from cdcsync.config.serving import Serve
from cdcsync.config.values import parse_address
from tests import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
HEALTHCHECK = DOCKER / "healthcheck.py"

SLIM_BYTES = 150 * 1000**2
"""The most that an install for remote embedders may take."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def config() -> Config:
    """The configuration that compose.yaml gives the worker."""
    return parse((DOCKER / "cdcsync.toml").read_text(), {}, where="docker/cdcsync.toml")


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of that name, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def test_the_image_installs_what_the_tests_ran_with_by_its_hash() -> None:
    text = (DOCKER / "requirements.txt").read_text()
    locked = re.findall(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(locked) == len(re.findall(r"^\S+==", text, re.MULTILINE)) > 10
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {canonicalize_name(name): version for name, version in pins.items()}
    assert {name: version for name, version, _ in locked} == {name: tested[name] for name, _, _ in locked}
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {canonicalize_name(Requirement(line).name) for line in core}
    assert wanted <= {name for name, _, _ in locked}, "run make lock"


ENGINE = """#!/bin/sh
image=$(for last in "$@"; do :; done; echo "$last")
case "$1 $image" in
    "pull gone/"*) echo "denied" >&2; exit 1 ;;
    "pull "*) ;;
    "image "*) echo "${image%:*}@sha256:$(printf %s "$image" | sha256sum | cut -c1-64)" ;;
esac
"""
"""An engine that knows every image but those of `gone`."""


def pinned(directory: Path, replace: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
    """Run `make pin-images` on a copy of the files, with an engine that answers without a registry."""
    for name in ("Dockerfile", "compose.yaml", "pin.py"):
        (directory / name).write_text((DOCKER / name).read_text().replace(*replace))
    engine = directory / "engine"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(directory / "pin.py")],
        env={**os.environ, "CDCSYNC_ENGINE": str(engine)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_every_image_can_be_taken_by_its_digest(tmp_path: Path, compose: dict[str, Any]) -> None:
    done = pinned(tmp_path)

    assert done.returncode == 0, done.stderr
    pins = dict(line.split("=", 1) for line in (tmp_path / "images.env").read_text().splitlines()[1:])
    assert all(re.fullmatch(r"[^@]+@sha256:[0-9a-f]{64}", pin) for pin in pins.values())
    named = {"PYTHON_IMAGE", "PGVECTOR_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE"}
    assert pins.keys() == named
    images = {service["image"] for service in compose["services"].values()}
    assert {re.match(r"\$\{(\w+):-", image)[1] for image in images} == named - {"PYTHON_IMAGE"} | {"CDCSYNC_IMAGE"}  # type: ignore[index]
    assert all(base.startswith("${PYTHON_IMAGE}") for base in instructions("FROM") if ":" in base or "$" in base)
    assert pins["PYTHON_IMAGE"].partition("@")[0] in compose["services"]["cdcsync"]["build"]["args"]["PYTHON_IMAGE"]


def test_an_image_that_no_registry_has_leaves_the_pins_as_they_are(tmp_path: Path) -> None:
    done = pinned(tmp_path, ("pgvector/pgvector", "gone/pgvector"))

    assert done.returncode == 1
    assert "denied" in done.stderr
    assert "fix:" in done.stderr
    assert not (tmp_path / "images.env").exists()


# -- compose.yaml -----------------------------------------------------------------------------------------------


def test_every_port_is_on_loopback(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(str(port).startswith("127.0.0.1:") for port in ports)


def test_everything_that_is_mounted_exists_or_is_a_volume(compose: dict[str, Any]) -> None:
    mounted = [volume.split(":") for service in compose["services"].values() for volume in service.get("volumes", [])]
    named = {source for source, *_ in mounted if not source.startswith(".")}
    assert named == set(compose["volumes"])
    for source, _, *options in mounted:
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
            assert options == ["ro"]


def test_every_image_has_a_version_of_its_own(compose: dict[str, Any]) -> None:
    images = [service["image"] for service in compose["services"].values() if "build" not in service]
    assert len(images) == 3
    assert all(re.fullmatch(r"\$\{\w+_IMAGE:-[a-z/]+:[a-z]*v?\d[\w.]*\}", image) for image in images)
    stages = [line.split(" AS ") for line in instructions("FROM")]
    assert {base for base, _ in stages} - {stage for _, stage in stages} == {"${PYTHON_IMAGE}"}
    assert re.fullmatch(r"PYTHON_IMAGE=python:\d\.\d+-slim-\w+", instructions("ARG")[0])


def test_passwords_come_from_the_environment_and_have_no_default(compose: dict[str, Any]) -> None:
    secrets = [
        str(value)
        for service in compose["services"].values()
        for name, value in service.get("environment", {}).items()
        if "PASSWORD" in name
    ]
    assert secrets
    assert all(re.fullmatch(r"\$\{\w+:\?.+\}", secret) for secret in secrets)


def test_the_worker_gets_its_file_its_port_and_no_privilege(compose: dict[str, Any], config: Config) -> None:
    worker = compose["services"]["cdcsync"]
    (port,) = worker["ports"]
    host, inside = config.worker.listen_address
    assert (host, f"127.0.0.1:{inside}:{inside}") == ("0.0.0.0", port)
    assert worker["read_only"] is True
    assert worker["cap_drop"] == ["ALL"]
    assert worker["security_opt"] == ["no-new-privileges:true"]
    assert float(worker["stop_grace_period"].removesuffix("s")) > Worker().stop_timeout_s
    assert worker["build"]["target"] in [line.split(" AS ")[-1] for line in instructions("FROM")]
    assert config.source.dsn.endswith("@postgres/shop")
    assert "postgres" in compose["services"]


def test_prometheus_scrapes_the_worker_under_the_name_that_the_alerts_know(config: Config) -> None:
    prometheus = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"cdcsync:{config.worker.listen_address[1]}"]}]
    assert f'up{{job="{job["job_name"]}"}}' in (ROOT / "config" / "alerts.yml").read_text()
    assert prometheus["rule_files"] == ["alerts.yml"]


def test_promtool_finds_nothing_wrong_with_the_files_where_they_are_mounted(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool: it is in Debian's package prometheus")
    mounted = [volume.split(":")[:2] for volume in compose["services"]["prometheus"]["volumes"]]
    files = {Path(target): DOCKER / source for source, target in mounted if source.startswith(".")}
    (directory,) = {target.parent for target in files}
    for target, source in files.items():
        shutil.copy(source, tmp_path / target.name)
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True
    )
    assert directory == Path("/etc/prometheus")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: [1-9]\d* rules found", done.stdout)


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict[str, Any]) -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "cdcsync.yaml").read_text())["providers"]
    grafana = compose["services"]["grafana"]
    mounted = [volume.split(":")[1] for volume in grafana["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounted
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted


def test_scripts_that_the_database_runs_may_be_run() -> None:
    scripts = sorted((DOCKER / "initdb").glob("*.sh"))
    assert scripts
    assert all(script.stat().st_mode & stat.S_IXUSR for script in scripts)


# -- Dockerfile -------------------------------------------------------------------------------------------------


def test_the_image_runs_as_no_one_and_hears_its_signals() -> None:
    (user,) = instructions("USER")
    assert int(user.split(":")[0]) > 0
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["cdcsync"]
    assert json.loads(instructions("CMD")[-1]) == ["run"]
    assert instructions("STOPSIGNAL") == ["SIGINT"]


def test_the_image_and_the_compose_file_agree_where_the_configuration_is(compose: dict[str, Any]) -> None:
    (path,) = re.findall(rf"^ENV {CONFIG_VARIABLE}=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert f"./cdcsync.toml:{path}:ro" in compose["services"]["cdcsync"]["volumes"]


def test_all_that_is_copied_into_the_image_exists_and_is_sent_to_the_engine() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in instructions("COPY"):
        if line.startswith("--from"):
            continue
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == kept[1:] or source.startswith(f"{kept[1:]}/") for kept in ignored if kept[0] == "!")


def test_the_healthcheck_of_the_image_is_where_it_says() -> None:
    (copied,) = [line for line in instructions("COPY") if line.startswith("docker/healthcheck.py")]
    (command,) = re.findall(r"CMD (\[.*\])", instructions("HEALTHCHECK")[0])
    assert json.loads(command) == ["python", copied.split()[1]]


def installed_bytes(name: str) -> int:
    """Return what a distribution's files take, byte code included as an image has it."""
    files = metadata.files(name) or []
    places = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(place.stat().st_size * (2 if place.suffix == ".py" else 1) for place in places if place.is_file())


def needed(name: str, extras: Iterable[str], found: set[str]) -> set[str]:
    """Return what a distribution needs with these extras, and what that needs."""
    for requirement in map(Requirement, metadata.requires(name) or []):
        asked = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        if asked and requirement.name not in found:
            found.add(requirement.name)
            needed(requirement.name, requirement.extras, found)
    return found


def test_a_slim_install_is_small_and_without_torch() -> None:
    wanted = needed("cdcsync", (), set())
    assert {"numpy", "psycopg", "psycopg-binary"} <= wanted
    assert not {"torch", "sentence-transformers", "ray", "opentelemetry-sdk"} & wanted
    ours = sum(path.stat().st_size for path in Path(cdcsync.__file__).parent.rglob("*.*") if path.suffix != ".pyc")
    assert ours + sum(map(installed_bytes, wanted)) < SLIM_BYTES


# -- the health check -------------------------------------------------------------------------------------------


@contextmanager
def answering(code: int) -> Iterator[int]:
    """Serve /livez with a status, and yield the port."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def healthcheck(port: int) -> int:
    environment = {**os.environ, "CDCSYNC_HEALTH": str(port), "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run([sys.executable, str(HEALTHCHECK)], env=environment, timeout=30).returncode


@pytest.mark.parametrize(("code", "status"), [(200, 0), (503, 1)])
def test_the_health_check_says_what_livez_says(code: int, status: int) -> None:
    with answering(code) as port:
        assert healthcheck(port) == status


PYTHON = "/opt/cdcsync/bin/python /opt/cdcsync/bin/cdcsync "


@pytest.mark.parametrize(
    ("command", "named", "asked"),
    [
        ("run", None, parse_address(Worker().listen)[1]),
        ("serve", None, parse_address(Serve().listen)[1]),
        ("serve -c /etc/cdcsync/serve.toml", None, 9478),
        ("run -c /etc/cdcsync/serve.toml", None, 9477),
        ("run", "8000", 8000),
        ("serve", "8000", 8000),
        ("serve", "", 9478),
        ("serve --stdio", None, None),
        ("serve -c /etc/cdcsync/serve.toml --stdio", "8000", None),
        ("--debug serve", None, 9478),
        ("serve; true", None, 9478),
        ("serve>/log", None, 9478),
        ("serve && echo --stdio", None, 9478),
        ("serve --stdio; true", None, None),
        ("search articles serve", None, 9477),
    ],
)
def test_the_health_check_asks_what_runs_in_the_container(command: str, named: str | None, asked: int | None) -> None:
    port = runpy.run_path(str(HEALTHCHECK))["port"]
    environment = {} if named is None else {"CDCSYNC_HEALTH": named}
    for line in (
        f"{PYTHON}{command}",
        f"/opt/cdcsync/bin/python -m cdcsync {command}",
        f"/sbin/docker-init -- {PYTHON}{command}",
        f"/bin/sh -c exec cdcsync {command}",
        f"/bin/sh -c cdcsync check &&\ncdcsync {command}",
    ):
        assert port(environment, line) == asked


@pytest.mark.parametrize(("named", "asked"), [(None, 9477), ("9478", 9478)])
@pytest.mark.parametrize("line", ["", "/pause ", "/usr/lib/cdcsync/serve ", "/bin/sh -c serve"])
def test_the_health_check_asks_what_the_environment_names_where_the_first_process_is_another_program(
    line: str, named: str | None, asked: int
) -> None:
    port = runpy.run_path(str(HEALTHCHECK))["port"]
    assert port({} if named is None else {"CDCSYNC_HEALTH": named}, line) == asked


@pytest.mark.skipif(not Path("/proc/1/cmdline").exists(), reason="the image is Linux, this machine is not")
def test_the_health_check_reads_what_the_first_process_was_started_with() -> None:
    line = runpy.run_path(str(HEALTHCHECK))["command_line"]()
    assert line == Path("/proc/1/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_the_health_check_does_without_a_first_process_that_it_may_not_read(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(Path, "read_text", refused)
    command_line = runpy.run_path(str(HEALTHCHECK))["command_line"]
    assert command_line() == ""


def test_a_worker_that_does_not_answer_is_not_healthy() -> None:
    with answering(200) as port:
        pass
    assert healthcheck(port) == 1
