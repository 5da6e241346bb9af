"""What the service manager is told: with a socket of our own in its place."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import anyio
import pytest

from cdcsync.worker.systemd import BEAT_S, ServiceManager, keep_informed


class Manager:
    """A service manager that writes down what it hears."""

    def __init__(self, address: str, patience_s: float = 20) -> None:
        self.address = address
        self._patience_s = patience_s
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.setblocking(False)

    async def hear(self, wanted: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Return the next message that is wanted."""
        with anyio.fail_after(self._patience_s):
            while True:
                await anyio.wait_readable(self._socket)
                message = dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())
                self.heard.append(message)
                if wanted(message):
                    return message

    def names(self) -> set[str]:
        """Return the names of all assignments so far, those waiting included."""
        while True:
            try:
                message = self._socket.recv(4096)
            except BlockingIOError:
                return {name for message_ in self.heard for name in message_}
            self.heard.append(dict(line.split("=", 1) for line in message.decode().splitlines()))

    def close(self) -> None:
        self._socket.close()


class View:
    """A worker that is as the test says."""

    def __init__(self) -> None:
        self.standby = False
        self.streaming = False
        self.stopping = anyio.Event()
        self.lag_seconds = 0.0
        self.headline: str | None = None
        self.reasons: list[str] = []
        self.is_alive = True

    def alive(self) -> bool:
        return self.is_alive

    def not_ready(self) -> list[str]:
        return self.reasons


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


@contextmanager
def listening(address: str) -> Iterator[Manager]:
    made = Manager(address)
    try:
        yield made
    finally:
        made.close()


def told(manager: Manager, watchdog_s: float | None = 0.03) -> ServiceManager:
    return ServiceManager(manager.address, watchdog_s)


async def test_it_is_ready_once_it_streams_and_asks_for_time_until_then(manager: Manager) -> None:
    view = View()
    view.reasons = ["the replication stream is not connected"]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_informed, told(manager), view)
        extension = await manager.hear(lambda message: "EXTEND_TIMEOUT_USEC" in message)
        assert int(extension["EXTEND_TIMEOUT_USEC"]) >= 10_000_000
        assert "READY" not in manager.names()

        view.streaming, view.reasons = True, []

        assert await manager.hear(lambda message: "READY" in message) == {"READY": "1"}
        assert (await manager.hear(lambda message: "STATUS" in message))["STATUS"] == "streaming, 0 s behind"
        tasks.cancel_scope.cancel()


async def test_it_says_how_the_index_is_that_is_worst_off_unless_it_cannot_work(manager: Manager) -> None:
    view = View()
    view.streaming, view.headline = True, "articles: loading 42%"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_informed, told(manager), view)
        await manager.hear(lambda message: message.get("STATUS") == "articles: loading 42%")
        view.reasons = ["the replication stream is not connected"]
        await manager.hear(lambda message: message.get("STATUS") == view.reasons[0])
        tasks.cancel_scope.cancel()


async def test_a_standby_is_ready_because_it_waits_for_as_long_as_the_other_one_runs(manager: Manager) -> None:
    view = View()
    view.standby, view.reasons = True, ["standby: another worker holds the pipeline"]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_informed, told(manager), view)
        await manager.hear(lambda message: "READY" in message)
        assert (await manager.hear(lambda message: "STATUS" in message))["STATUS"] == view.reasons[0]
        tasks.cancel_scope.cancel()


async def test_the_watchdog_is_fed_while_the_worker_is_alive_and_not_after(manager: Manager) -> None:
    view = View()
    view.streaming = True
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_informed, told(manager), view)
        for _ in range(3):
            await manager.hear(lambda message: "WATCHDOG" in message)

        view.is_alive, view.reasons = False, ["stuck"]
        await manager.hear(lambda message: message.get("STATUS") == "stuck")
        manager.heard.clear()
        for step in range(3):
            view.reasons = [f"step {step}"]
            await manager.hear(lambda message, step=step: message.get("STATUS") == f"step {step}")  # type: ignore[misc]

        assert manager.names() == {"STATUS"}
        tasks.cancel_scope.cancel()


async def test_the_end_is_announced_and_the_watchdog_fed_until_it_is_there(manager: Manager) -> None:
    view = View()
    view.streaming = True
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_informed, told(manager), view)
        await manager.hear(lambda message: "READY" in message)

        view.stopping.set()

        await manager.hear(lambda message: "STOPPING" in message)
        assert "stopping" in (await manager.hear(lambda message: "STATUS" in message))["STATUS"]
        await manager.hear(lambda message: "WATCHDOG" in message)
        tasks.cancel_scope.cancel()
    assert [message for message in manager.heard if "STOPPING" in message] == [{"STOPPING": "1"}]


async def test_a_manager_that_is_away_is_told_again_when_it_is_back(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    view = View()
    view.streaming = True
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep_informed, ServiceManager(address, 0.03), view)
        await anyio.wait_all_tasks_blocked()
        with listening(address) as late:
            await late.hear(lambda message: "READY" in message)
            tasks.cancel_scope.cancel()


def test_a_status_is_one_line(manager: Manager) -> None:
    with closing(told(manager)) as telling:
        assert telling.tell(STATUS="a\nREADY=1\r\nb")
    assert manager.names() == {"STATUS"}
    assert manager.heard == [{"STATUS": "a READY=1 b"}]


def test_the_abstract_namespace_is_reached() -> None:
    with listening(f"@cdcsync-test-{os.getpid()}") as abstract, closing(told(abstract)) as telling:
        assert telling.tell(READY=1)
        assert abstract.names() == {"READY"}


def test_nobody_listens_and_nothing_happens(tmp_path: Path) -> None:
    with closing(ServiceManager(str(tmp_path / "nosuch"))) as telling:
        assert not telling.tell(READY=1)


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "our own"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "nonsense"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
    ids=str,
)
def test_the_watchdog_is_that_of_the_environment(environment: dict[str, str], watchdog_s: float | None) -> None:
    ours = {name: value.replace("our own", str(os.getpid())) for name, value in environment.items()}
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": "/nosuch", **ours})
    assert manager is not None
    assert manager.watchdog_s == watchdog_s
    assert manager.beat_s <= (watchdog_s or BEAT_S) / (3 if watchdog_s and watchdog_s < 15 else 1)
    manager.close()


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234"])
def test_without_a_socket_there_is_no_manager(address: str | None) -> None:
    assert ServiceManager.from_environment({} if address is None else {"NOTIFY_SOCKET": address}) is None
