"""Finding a server's addresses: within a limit, for all hosts, and without keeping a process from ending."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest
from psycopg import conninfo

import cdcsync
from cdcsync.errors import SetupError
from cdcsync.postgres.logins import addresses_of, hosts_of, resolved
from cdcsync.postgres.sessions import connect

ADDRESSES = {"one": ["192.0.2.1", "2001:db8::1"], "two": ["192.0.2.2"]}


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answer as a name server that knows `ADDRESSES`; returns the names that it was asked for."""
    asked: list[str] = []

    def answer(host: str, *_: object, **__: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        if host not in ADDRESSES:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in ADDRESSES[host]]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


@pytest.mark.usefixtures("name_server")
@pytest.mark.parametrize(
    ("settings", "hosts", "addresses", "ports"),
    [
        ("host=two", "two", "192.0.2.2", "5432"),
        ("host=one,two port=1", "one,one,two", "192.0.2.1,2001:db8::1,192.0.2.2", "1,1,1"),
        ("host=one,two port=1,2", "one,one,two", "192.0.2.1,2001:db8::1,192.0.2.2", "1,1,2"),
        ("host=unknown,two port=1,2", "two", "192.0.2.2", "2"),
        ("host=/run,two,192.0.2.9 port=5", "/run,two,192.0.2.9", ",192.0.2.2,192.0.2.9", "5,5,5"),
    ],
)
async def test_each_host_is_tried_at_each_of_its_addresses(
    monkeypatch: pytest.MonkeyPatch, settings: str, hosts: str, addresses: str, ports: str
) -> None:
    monkeypatch.delenv("PGPORT", raising=False)
    found = conninfo.conninfo_to_dict(await resolved(f"{settings} dbname=app"))
    assert found == {"host": hosts, "hostaddr": addresses, "port": ports, "dbname": "app"}


@pytest.mark.parametrize(
    "settings",
    [
        "dbname=app",
        "host=/run,192.0.2.1,::1 port=5",
        "host=one hostaddr=192.0.2.9",
        "host=one,two port=1,2,3",  # the driver tells that there is a port too many
    ],
)
async def test_nobody_is_asked_where_there_is_nothing_to_ask(name_server: list[str], settings: str) -> None:
    assert await resolved(settings) == settings
    assert name_server == []


async def test_hosts_of_the_environment_are_asked_for(name_server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "two")
    monkeypatch.setenv("PGPORT", "7")
    found = conninfo.conninfo_to_dict(await resolved("dbname=app"))
    assert found == {"host": "two", "hostaddr": "192.0.2.2", "port": "7", "dbname": "app"}


@pytest.mark.usefixtures("name_server")
@pytest.mark.parametrize(
    ("file", "settings", "host", "address", "port"),
    [
        ("host=two\nport=7", "service=ours", "two", "192.0.2.2", "7"),
        ("port=7", "service=ours host=two", "two", "192.0.2.2", "7"),
        ("host=two\nport=7", "service=ours port=8", "two", "192.0.2.2", "8"),
        ("port=7", "service=ours", "elsewhere", "192.0.2.3", "7"),  # the environment's host
        ("host=one\nhostaddr=192.0.2.9", "service=ours", "one", "192.0.2.9", "99"),
        ("host=/run", "service=ours", "/run", None, "99"),
        ("", "service=another", None, None, None),  # the driver tells that there is none
    ],
)
async def test_what_the_service_of_a_dsn_says_comes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: str,
    settings: str,
    host: str | None,
    address: str | None,
    port: str | None,
) -> None:
    monkeypatch.setitem(ADDRESSES, "elsewhere", ["192.0.2.3"])
    (tmp_path / "services").write_text(f"[ours]\n{file}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGHOST", "elsewhere")
    monkeypatch.setenv("PGPORT", "99")
    found = conninfo.conninfo_to_dict(await resolved(settings))
    told = {"service": settings.split()[0].removeprefix("service="), "host": host, "hostaddr": address, "port": port}
    assert found == {key: value for key, value in told.items() if value is not None}


@pytest.mark.usefixtures("name_server")
async def test_hosts_that_are_unknown_are_told_in_the_drivers_words() -> None:
    with pytest.raises(psycopg.OperationalError, match=r"failed to resolve host 'nobody'"):
        await resolved("host=nobody,nobody")


@pytest.mark.parametrize(("option", "value"), [("port", "abc"), ("connect_timeout", "soon")])
async def test_what_is_no_number_is_told_as_such_and_not_as_an_unknown_host(option: str, value: str) -> None:
    with pytest.raises(SetupError, match=f"{option} is {value} in the DSN or the environment, and must be a whole"):
        await connect(f"host=localhost {option}={value}", "source")


async def test_name_servers_have_as_long_as_a_login_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    ended = threading.Event()

    def silent(*_: object, **__: object) -> list[tuple[Any, ...]]:
        ended.wait()
        return []

    def at_once(settings: object) -> int:
        asked.append(settings)
        return 0

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(conninfo, "timeout_from_conninfo", at_once)
    try:
        with pytest.raises(psycopg.OperationalError, match=r"host 'one': no name server has answered for 0 s"):
            await resolved("host=one connect_timeout=7")
    finally:
        ended.set()  # the end of the test's event loop waits for that thread
    assert asked == [{"host": "one", "connect_timeout": "7"}]


async def test_a_host_is_asked_for_once_at_a_time_however_many_wait_or_have_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Otherwise each attempt of each session would keep a thread of its own, until none is left for the other names.
    asked: list[str] = []
    answering = threading.Event()

    def late(host: str, *_: object, **__: object) -> list[tuple[Any, ...]]:
        asked.append(host)
        answering.wait()
        return [(0, 0, 0, "", ("192.0.2.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", late)
    found: list[list[str]] = []

    async def ask() -> None:
        found.append(await addresses_of("dead"))

    try:
        for _ in range(50):
            with anyio.move_on_after(0):
                await addresses_of("dead")
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
            await anyio.lowlevel.checkpoint()
            answering.set()
    finally:
        answering.set()
    assert found == [["192.0.2.1"]] * 3
    assert asked == ["dead"]


@pytest.mark.usefixtures("name_server")
async def test_hosts_are_tried_in_the_drivers_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "shuffle", list.reverse)

    async def tried(settings: str) -> list[tuple[str, str]]:
        hosts = hosts_of(await resolved(settings))
        return [
            (one.address, str(conninfo.conninfo_to_dict(one.settings).get("target_session_attrs"))) for one in hosts
        ]

    one, two, three = "192.0.2.1", "2001:db8::1", "192.0.2.2"
    assert await tried("host=one,two port=1") == [(one, "None"), (two, "None"), (three, "None")]
    assert await tried("host=one,two port=1,2 load_balance_hosts=random target_session_attrs=primary") == [
        (three, "primary"),
        (two, "primary"),
        (one, "primary"),
    ]
    assert await tried("host=one port=1 target_session_attrs=prefer-standby") == [
        (one, "standby"),
        (two, "standby"),
        (one, "any"),
        (two, "any"),
    ]


PROGRAM = """
import os, socket, sys, threading
from cdcsync.cli import main

def silent(*_, **__):
    os.write(2, b"asked\\n")
    threading.Event().wait()

socket.getaddrinfo = silent
main(sys.argv[1:])
"""

CONFIG = """
[source]
dsn = "postgresql://me@db.example.org/db?connect_timeout={limit_s}"
[embedders.words]
type = "hash"
[indexes.articles]
table = "articles"
text = "{{title}}"
embedder = "words"
"""


def start(tmp_path: Path, limit_s: int) -> subprocess.Popen[str]:
    """Begin to ask for the status of a pipeline, in a process to which no name server ever answers."""
    config = tmp_path / "cdcsync.toml"
    config.write_text(CONFIG.format(limit_s=limit_s))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "status", "-c", str(config)],
        env={**os.environ, "PYTHONPATH": str(Path(cdcsync.__file__).parents[1]), "COLUMNS": "200"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_command_ends_although_no_name_server_answers(tmp_path: Path) -> None:
    with start(tmp_path, 2) as process:
        try:
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "no name server answers for db.example.org" in said


def test_an_interrupt_does_not_wait_for_a_name_server(tmp_path: Path) -> None:
    with start(tmp_path, 3_600) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "asked\n"
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
