"""Tells the service manager how the worker is, in systemd's notification protocol: datagrams on a socket that it names.

    EXTEND_TIMEOUT_USEC=…   until ready: a slot that waits for an old transaction takes the time that it takes
    READY=1                 once it streams, or stands by for a worker that does
    STATUS=…                what `systemctl status` shows
    WATCHDOG=1              while the worker is alive; systemd restarts one that no longer says so
    RELOADING=1             when it reads its configuration again, and READY=1 when it is done with that
    STOPPING=1              from the signal on

Without NOTIFY_SOCKET in the environment nothing of this happens. No answer ever comes, and a manager that does not
listen harms nobody.

Source: systemd, sd_notify(3), sd_watchdog_enabled(3), systemd.service(5).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Protocol, Self

import anyio

BEAT_S = 5.0
"""How often the manager hears of the worker, at least: the age of what `systemctl status` shows."""

BEATS_IN_WATCHDOG = 3
"""Two beats may be late before the watchdog bites; systemd itself advises half of its time."""

START_EXTENSION_S = 60
"""How much longer each beat before readiness lets the start take: many beats, so that one may be lost."""


class WorkerView(Protocol):
    """The part of a worker that the manager is told about."""

    standby: bool
    stopping: anyio.Event

    @property
    def streaming(self) -> bool:
        """Whether changes flow."""
        ...

    @property
    def lag_seconds(self) -> float:
        """How old the oldest change is that is not applied."""
        ...

    @property
    def headline(self) -> str | None:
        """How it is, in a few words, as the status page says it; None until the status was read."""
        ...

    def alive(self) -> bool:
        """Say whether the worker makes progress."""
        ...

    def not_ready(self) -> list[str]:
        """Return why the worker is not doing its work just now."""
        ...


class ServiceManager:
    """The socket of the service manager, and what it wants to hear.

    :param address: a path, or a name in the abstract namespace with `@` in front.
    :param watchdog_s: after how many seconds of silence the manager ends us, None if never.
    """

    def __init__(self, address: str, watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._ready = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the manager that started this process; None when none wants to be told."""
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return None
        watchdog_s = None
        if environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                watchdog_s = int(environment.get("WATCHDOG_USEC", "")) / 1e6 or None
        return cls(address, watchdog_s)

    @property
    def beat_s(self) -> float:
        """How often to tell something."""
        return min(BEAT_S, self.watchdog_s / BEATS_IN_WATCHDOG) if self.watchdog_s else BEAT_S

    def tell(self, **fields: str | int) -> bool:
        """Send assignments in one datagram; returns whether the manager took them."""
        lines = [f"{name}={' '.join(str(value).split())}" for name, value in fields.items()]
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            # It restarts, or its queue is full. The next beat comes soon.
            return False
        return True

    def ready(self) -> bool:
        """Say that the start is over; returns whether the manager took it."""
        self._ready = self.tell(READY=1)
        return self._ready

    def reloading(self) -> None:
        """Say that the configuration is being read again; `reloaded` must follow. Nothing to say during the start."""
        if self._ready:
            self.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def reloaded(self) -> None:
        """Say that reading the configuration again has ended, in success or failure."""
        if self._ready:
            self.tell(READY=1)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


async def keep_informed(manager: ServiceManager, view: WorkerView) -> None:
    """Tell the manager how the worker is until cancelled; then close the socket.

    It runs on the worker's own event loop: a loop that is stuck is silent, which is what the watchdog waits for.
    """
    ready = stopping = False
    shown = ""
    try:
        while True:
            if view.alive():
                manager.tell(WATCHDOG=1)
            if not ready:
                if view.streaming or view.standby:
                    ready = manager.ready()
                else:
                    manager.tell(EXTEND_TIMEOUT_USEC=int(START_EXTENSION_S * 1e6))
            if view.stopping.is_set() and not stopping:
                stopping = manager.tell(STOPPING=1)
            status = _status(view)
            if status != shown and manager.tell(STATUS=status):
                shown = status
            with anyio.move_on_after(manager.beat_s if ready else min(1.0, manager.beat_s)):
                await (anyio.sleep_forever() if view.stopping.is_set() else view.stopping.wait())
    finally:
        manager.close()


def _status(view: WorkerView) -> str:
    if view.stopping.is_set():
        return "stopping: the current batch is being finished"
    if reasons := view.not_ready():
        return "; ".join(reasons)
    return view.headline or f"streaming, {view.lag_seconds:.0f} s behind"
