"""Processes of cdcsync that are copies of one which has imported it: an import takes a second of processor time each.

    test ─► the first copy of a test run, `python -m tests.support.forked` ─► fork for each command

A copy is a process like any other: it has its own session, standard streams, environment and working directory, and
ends as the interpreter ends. What reads other variables than these while it is imported needs a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NoReturn, Protocol

import msgspec

import cdcsync
from cdcsync.process import crashpoints

ROOT = Path(__file__).parents[2]

IMPORTED = (
    *(
        f"cdcsync.cli.{one}"
        for one in ("commands", "init", "plan", "search", "replay", "verify", "evaluate", "failures")
    ),
    *(f"cdcsync.cli.{one}" for one in ("migrate", "teardown", "shipped", "entry")),
    "cdcsync.worker.run",
    "cdcsync.worker.pipeline",
    "cdcsync.embedders.hashing",
    "cdcsync.embedders.openai",
    "tests.support.hurried",
    # What the above import once they run.
    *("anyio._backends._asyncio", "httpx", "uvicorn.protocols.http.h11_impl"),
)
"""What the first copy imports, with all that they import; nothing of it starts a thread or opens a file."""

READ_LATE = frozenset(
    {
        *("PYTHONPATH", "COLUMNS", "NO_COLOR", "CDCSYNC_CONFIG", "PGPASSWORD"),
        *("HTTPS_PROXY", "NO_PROXY", crashpoints.VARIABLE),
        # What the libraries of models, and we for them, set where they are imported: the first imports none of them.
        *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR", "RAY_CLIENT_MODE"),
        *(
            "HF_HUB_DISABLE_PROGRESS_BARS",
            "HF_HUB_DISABLE_TELEMETRY",
            "ORT_DISABLE_TELEMETRY",
            "TOKENIZERS_PARALLELISM",
        ),
    }
)
"""The variables that are read once a command runs, or that a copy sees to: others may be read by what is imported."""

_BYTES = 1 << 20
"""The most that an order may take: the environment is the largest part."""


class Process(Protocol):
    """What tests need of a process, whether it is a copy or not."""

    pid: int
    returncode: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Order(msgspec.Struct, frozen=True):
    """A process to be made: `module` is run as `python -m` runs it."""

    module: str
    arguments: Sequence[str]
    environment: dict[str, str]
    directory: str
    session: bool


class Forked:
    """A copy, as `subprocess.Popen` would show it."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int = None  # type: ignore[assignment]  # as Popen has it until the process has ended
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        with self._lock:
            if self.returncode is None and _readable(self._status, 0):
                said = os.read(self._status, 8)
                os.close(self._status)
                assert said, "the first process has ended"
                self.returncode = os.waitstatus_to_exitcode(int.from_bytes(said, "big"))
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the process has ended.

        :raises subprocess.TimeoutExpired: it has not within `timeout` seconds.
        """
        if self.poll() is None and not _readable(self._status, timeout):
            raise subprocess.TimeoutExpired(["cdcsync"], timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _readable(file: int, timeout_s: float | None) -> bool:
    """Say whether there is something to read, within so many seconds."""
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    return bool(waiting.poll(None if timeout_s is None else 1000 * timeout_s))


class First:
    """The process that the others are copies of."""

    def __init__(self) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for one in (near, far):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BYTES)
        # The package that is under test, which may be another one than that beside the tests.
        paths = [str(Path(cdcsync.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._environment = {name: value for name, value in os.environ.items() if name != crashpoints.VARIABLE}
        with far:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.support.forked", str(far.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[far.fileno()],
                env={**self._environment, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
        self._socket = near
        self._lock = threading.Lock()
        atexit.register(self.close)

    def takes(self, environment: Mapping[str, str]) -> bool:
        """Say whether a copy can still have this environment: nothing that it has imported would have read it."""
        names = {*environment, *self._environment}
        differs = {name for name in names if environment.get(name) != self._environment.get(name)}
        return all(name in READ_LATE or name.startswith("PYTEST_") for name in differs)

    def make(self, order: Order, streams: Sequence[IO[bytes]]) -> Forked:
        """Make a copy with these three standard streams."""
        status, told = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._socket, [msgspec.json.encode(order)], [*(one.fileno() for one in streams), told])
                pid = int.from_bytes(self._socket.recv(8), "big")
        finally:
            os.close(told)
        assert pid, f"the first process ended with {self._process.poll()}"
        return Forked(pid, status)

    def close(self) -> None:
        """End it; its copies live on."""
        self._socket.close()
        self._process.wait()


_first: First | None = None
_making = threading.Lock()


def start(
    module: str,
    arguments: Sequence[str],
    streams: tuple[int | IO[bytes], IO[bytes], IO[bytes]],
    *,
    more: Mapping[str, str],
    directory: Path | None = None,
    session: bool = False,
) -> Process:
    """Run `python -m module` with these arguments in a process of its own: a copy, if it can be one.

    :param more: variables of its environment besides those of this process.
    :param directory: where it runs; where this process does by default.
    :param session: whether it leads a session of its own.
    """
    environment = {**os.environ, "NO_COLOR": "1", **more}
    first = _the_first()
    if not first.takes(environment):
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            env=environment,
            cwd=directory,
            start_new_session=session,
        )
    order = Order(module, arguments, environment, str(directory or Path.cwd()), session)
    if isinstance(streams[0], int):
        with Path(os.devnull).open("rb") as nothing:
            return first.make(order, (nothing, *streams[1:]))
    return first.make(order, (streams[0], *streams[1:]))


def _the_first() -> First:
    global _first
    with _making:
        if _first is None:
            _first = First()
        return _first


def run(
    *arguments: str, more: Mapping[str, str], directory: Path | None = None, answer: str = "", timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command of cdcsync to its end; `answer` is its standard input.

    :raises subprocess.TimeoutExpired: it does not end in time.
    """
    with TemporaryFile() as said, TemporaryFile() as out, TemporaryFile() as err:
        said.write(answer.encode())
        said.seek(0)
        process = start("cdcsync", arguments, (said, out, err), more=more, directory=directory)
        try:
            status = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, status, out.read().decode(), err.read().decode())


# -- in the first copy ---------------------------------------------------------------------------------------------


def _serve(orders: socket.socket) -> str:
    """Make copies until nobody asks any more; returns only in a copy, with the module that it is to run."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    told: dict[int, int] = {}
    waiting = select.poll()
    for file in (orders.fileno(), woken):
        waiting.register(file, select.POLLIN)
    while True:
        ready = {file for file, _ in waiting.poll()}
        if woken in ready:
            os.read(woken, 4096)
            _tell(told)
        if orders.fileno() not in ready:
            continue
        said, files, _, _ = socket.recv_fds(orders, _BYTES, 4)
        if not said:
            sys.exit()
        order = msgspec.json.decode(said, type=Order)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for one in (woken, wake, *told.values(), files[3]):
                os.close(one)
            _become(order, files[:3])
            with orders:
                orders.send(os.getpid().to_bytes(8, "big"))  # as Popen returns once the program runs
            return order.module
        told[pid] = files[3]
        for one in files[:3]:
            os.close(one)


def _tell(told: dict[int, int]) -> None:
    """Say of each copy that has ended how it did."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with os.fdopen(told.pop(pid), "wb") as answer, contextlib.suppress(BrokenPipeError):
                answer.write(status.to_bytes(8, "big"))
                answer.flush()


def _become(order: Order, streams: Sequence[int]) -> None:
    """Give a copy what the order says."""
    if order.session:
        os.setsid()
    for number, one in enumerate(streams):
        os.dup2(one, number)
        os.close(one)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.directory)
    paths = order.environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [order.directory, *(one for one in paths if one and one not in sys.path)]
    sys.argv = [f"{order.module}/__main__.py", *order.arguments]
    if crashpoints.VARIABLE in order.environment:
        _arm(crashpoints._armed(order.environment[crashpoints.VARIABLE]))


def _arm(armed: Callable[[str], None]) -> None:
    """Have the crash points do what they would do if the variable had been there when they were imported."""
    idle = crashpoints.crash_point
    for module in list(sys.modules.values()):
        if getattr(module, "crash_point", None) is idle:
            vars(module)["crash_point"] = armed


def _run(module: str) -> NoReturn:
    from cdcsync.cli import main
    from tests.support import hurried

    (hurried.main if module == hurried.__name__ else main)()
    raise AssertionError


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
