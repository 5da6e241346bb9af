"""The configuration read again by a running worker, on SIGHUP: what can change live changes, the rest is named.

    RELOADING=1 ─► read the file ─► compare ─► take over LIVE ─► READY=1
                        │ wrong          │ other keys differ
                        ▼                ▼
                  reload_failed    restart_needed

A faulty file changes nothing: the worker keeps its configuration. Keys are named in the log, values never: some
are secret.

Source: systemd, sd_notify(3); systemd.service(5), Type=notify.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Protocol

import anyio.abc
import msgspec
import structlog

from cdcsync import logs
from cdcsync.config import Config
from cdcsync.config.differences import differences as differing
from cdcsync.errors import ConfigError
from cdcsync.process.stopping import PutOff
from cdcsync.process.threads import Calls
from cdcsync.worker.systemd import ServiceManager

log = structlog.get_logger()

LIVE = (
    "log_level",
    "log_format",
    "batch_rows",
    "batch_bytes",
    "backfill_page_rows",
    "backfill_max_rows_per_s",
    "settle_connections",
    "settle_share",
    "settle_after_s",
    "stop_timeout_s",
    "ready_max_lag_s",
    "ready_max_lag_bytes",
)
"""Keys of [worker] that change without a restart: the log, and how much is done at a time, or waited for. What servers,
tables and models are concerned with is examined before a start, and so needs one."""


class Reconfigurable(Protocol):
    """Takes a new configuration."""

    @property
    def config(self) -> Config:
        """The configuration in effect."""
        ...

    def reconfigure(self, config: Config) -> None:
        """Take over what may change live."""
        ...


async def reload_on_signal(
    worker: Reconfigurable,
    reread: Callable[[], Config],
    manager: ServiceManager | None,
    *,
    task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Read the configuration again at each SIGHUP, until cancelled; at once if one was put off during the start.

    :param reread: reads the file; a `ConfigError` of it is logged.
    """
    before = signal.getsignal(signal.SIGHUP)
    with anyio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        if isinstance(before, PutOff) and before.came:
            signal.raise_signal(signal.SIGHUP)
        async for _ in signals:
            if manager is not None:
                manager.reloading()
            await take_over(worker, reread)
            if manager is not None:
                manager.reloaded()


async def take_over(worker: Reconfigurable, reread: Callable[[], Config]) -> None:
    """Read the configuration again and take over what may change live.

    It is read in a thread: a file system that does not answer keeps neither changes nor the worker's end waiting.
    """
    reading = Calls(1)
    try:
        new = await reading.run(reread)
    except ConfigError as error:
        log.error("reload_failed", error=error.message, where=error.where, fix=error.hint)
        return
    finally:
        reading.close()
    changed = list(differences(worker.config, new))
    live = {f"worker.{key}" for key in LIVE}
    taken = [key for key in changed if key in live]
    if taken:
        worker.reconfigure(merged(worker.config, new))
        logs.configure(new.worker.log_level, new.worker.log_format)
    log.info("reloaded", keys=taken)
    if waiting := [key for key in changed if key not in live]:
        log.warning("restart_needed", keys=waiting)


def merged(current: Config, new: Config) -> Config:
    """Return `current` with the live keys of `new`."""
    worker = msgspec.structs.replace(current.worker, **{key: getattr(new.worker, key) for key in LIVE})
    return msgspec.structs.replace(current, worker=worker)


def differences(one: Config, other: Config) -> Iterator[str]:
    """Yield the keys whose values differ, as they are written in the file, without the values."""
    for change in differing(msgspec.to_builtins(one), msgspec.to_builtins(other)):
        yield change.key
