"""docs/systemd.md, typed line by line on a machine with systemd: a container that boots; `make image-test`.

The container needs an engine that lets systemd run in it, as podman and docker do with `--privileged`. The options for
this machine, and `CDCSYNC_ENGINE`, are those of the other images. Only the names of servers and ports differ from the
page, and the extra with PyTorch, which is large.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cdcsync.demo.cluster import free_port
from tests import ROOT
from tests.support.engines import engine
from tests.support.workers import until

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

PAGE = ROOT / "docs" / "systemd.md"
BOOT_S = 120

SERVERS = """
pg_conftool 17 main set wal_level logical
pg_conftool 17 main set port {port}
systemctl restart postgresql@17-main
cd /tmp
runuser -u postgres -- psql -p {port} -qv ON_ERROR_STOP=1 <<'END'
CREATE DATABASE shop;
CREATE DATABASE search;
CREATE ROLE cdcsync_source LOGIN REPLICATION PASSWORD 'the password of one';
CREATE ROLE cdcsync_target LOGIN PASSWORD 'the password of the other';
GRANT CREATE ON DATABASE shop TO cdcsync_source;
GRANT CREATE ON DATABASE search TO cdcsync_target;
\\c shop
CREATE TABLE articles (id int PRIMARY KEY, title text);
CREATE TABLE tickets (id int PRIMARY KEY, title text);
INSERT INTO articles SELECT i, 'title ' || i FROM generate_series(1, 50) AS i;
INSERT INTO tickets SELECT * FROM articles;
ALTER TABLE articles OWNER TO cdcsync_source;
ALTER TABLE tickets OWNER TO cdcsync_source;
\\c search
CREATE EXTENSION vector;
GRANT CREATE ON SCHEMA public TO cdcsync_target;
END
"""

REST = """
[worker]
listen = "127.0.0.1:{listen}"
log_format = "console"
[embedders.words]
type = "hash"
[indexes.{index}]
table = "public.{table}"
text = "{{title}}"
embedder = "words"
"""


def blocks() -> list[tuple[str, str]]:
    """Return the page's blocks in their order: what each is, and its text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


class Machine:
    """A container in which systemd runs."""

    def __init__(self, command: list[str], name: str) -> None:
        self._command = command
        self.name = name
        self.database_port, self.serve_port = free_port(), free_port()

    def types(self, lines: str, *, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Type lines into root's shell, which stops at the first that fails."""
        shell = [*self._command, "exec", "-i", self.name, "bash", "-exc", f"cd /root\n{lines}"]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        assert not ok or done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}{self.said()}"
        return done

    def said(self) -> str:
        """Return the end of the journal."""
        shell = [*self._command, "exec", self.name, "journalctl", "--no-pager", "--lines=40"]
        return subprocess.run(shell, capture_output=True, text=True, timeout=60).stdout[-6000:]

    def boots(self) -> bool:
        """Whether systemd has started all that it starts."""
        shell = [*self._command, "exec", self.name, "systemctl", "is-system-running"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(shell, capture_output=True, text=True, timeout=30)
            return done.stdout.strip() in ("running", "degraded")
        return False

    def again(self) -> None:
        """Turn it off and on."""
        for action in ("stop", "start"):
            subprocess.run([*self._command, action, self.name], check=True, capture_output=True, timeout=300)
        until(self.boots, self.said, patience_s=BOOT_S)

    def here(self, text: str) -> str:
        """Return the page's text with this machine's ports and wheel, and without PyTorch."""
        text = (
            text.replace(":5432:", f":{self.database_port}:")
            .replace("/path/to/checkout", "cdcsync")
            .replace("[local]", "")
        )
        return text.replace(".example.org/", f".example.org:{self.database_port}/")

    def state(self, unit: str) -> str:
        return self.types(f"systemctl is-active {unit}", ok=False).stdout.strip()

    def shows(self, unit: str, name: str) -> str:
        return self.types(f"systemctl show --property {name} --value {unit}").stdout.strip()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    command = engine()
    context = tmp_path_factory.mktemp("machine")
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(context / "wheels"), str(ROOT)]
    subprocess.run(wheel, check=True, timeout=600)
    options = shlex.split(os.environ.get("CDCSYNC_BUILD_ARGS", ""))
    file = ["-f", str(Path(__file__).with_name("systemd.Dockerfile")), "-t", "cdcsync-test:systemd"]
    built = subprocess.run(
        [*command, "build", *options, *file, str(context)], capture_output=True, text=True, timeout=1700
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    name = f"cdcsync-test-{secrets.token_hex(4)}"
    hosts = [f"--add-host={host}.example.org:127.0.0.1" for host in ("db", "search")]
    run = ["run", "-d", "--name", name, "--privileged", "--tmpfs=/run", "--tmpfs=/run/lock", *hosts]
    if Path(command[0]).name == "podman":
        run.append("--systemd=always")
    subprocess.run(
        [*command, *run, *shlex.split(os.environ.get("CDCSYNC_RUN_ARGS", "")), "cdcsync-test:systemd"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    made = Machine(command, name)
    try:
        with contextlib.suppress(AssertionError):
            until(made.boots, "systemd to boot", patience_s=BOOT_S)
        if not made.boots():
            pytest.skip("systemd does not boot in a privileged container of this engine")
        made.types(SERVERS.format(port=made.database_port))
        yield made
    finally:
        subprocess.run([*command, "rm", "-f", name], capture_output=True, timeout=120)


def configure(machine: Machine, name: str, sections: str, table: str) -> None:
    """Write a configuration below /root, and for an instance where it belongs, with its passwords."""
    rest = REST.format(listen=free_port(), index=f"{table}_of_{name}", table=table)
    slot = f'[source]\nslot = "{name}"\npublication = "{name}"\n'
    content = machine.here(sections).replace("[source]\n", slot) + rest
    at = "/root/cdcsync.toml" if name == "cdcsync" else f"/etc/cdcsync/{name}.toml"
    machine.types(f"cat > {at} <<'END'\n{content}END\n")


UNITS = ("cdcsync", "cdcsync@articles", "cdcsync@tickets", "cdcsync-serve")


def test_what_the_page_starts_when_it_is_typed_survives_mistakes_kills_and_reboots(machine: Machine) -> None:
    type_the_page(machine)

    def up(unit: str) -> bool:
        return machine.state(unit) == "active"

    for unit in UNITS:
        assert up(unit), machine.said()
    until(lambda: machine.shows("cdcsync", "StatusText").startswith("up to date"), machine.said)

    file = "/etc/cdcsync/cdcsync.toml"
    running = machine.shows("cdcsync", "MainPID")
    machine.types(f"cp {file} keep.toml; echo 'nonsense = 1' >> {file}")
    assert machine.types("systemctl reload cdcsync", ok=False).returncode != 0
    assert "nonsense" in machine.types("journalctl --unit cdcsync --no-pager --lines 20").stdout
    assert (up("cdcsync"), machine.shows("cdcsync", "MainPID")) == (True, running)
    assert machine.types("systemctl restart cdcsync", ok=False).returncode != 0
    assert "fix:" in machine.types("journalctl --unit cdcsync --no-pager --lines 20").stdout
    machine.types(f"cp keep.toml {file}")
    until(lambda: up("cdcsync"), machine.said)

    killed = machine.shows("cdcsync", "MainPID")
    machine.types(f"kill -9 {killed}")
    until(lambda: up("cdcsync") and machine.shows("cdcsync", "MainPID") not in ("0", killed), machine.said)

    machine.again()
    for unit in UNITS:
        until(partial(up, unit), machine.said)


def type_the_page(machine: Machine) -> None:
    sections = ""
    for kind, text in blocks():
        if kind == "toml" and not sections:
            sections = text
            configure(machine, "cdcsync", sections, "articles")
        elif kind == "toml":
            listen = f'{text}listen = "127.0.0.1:{machine.serve_port}"\n'
            machine.types(f"cat >> /etc/cdcsync/cdcsync.toml <<'END'\n{listen}END\n")
        elif kind == "sh":
            if "cdcsync@tickets" in text:
                for name in ("articles", "tickets"):
                    configure(machine, name, sections, name)
                    machine.types(f"cp /etc/credstore/cdcsync.pgpass /etc/credstore/cdcsync-{name}.pgpass")
            machine.types(machine.here(text))
