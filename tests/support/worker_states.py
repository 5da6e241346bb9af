"""Workers as others see them, with what they read in place of servers."""

from __future__ import annotations

from collections.abc import Callable

import anyio.lowlevel

from cdcsync.config import parse
from cdcsync.lsn import Lsn
from cdcsync.model.lag import Lag
from cdcsync.status import Status
from cdcsync.worker.state import WorkerState
from tests.support.configs import configuration

CONFIG = parse(configuration("dbname=nowhere"), {}, where="the test's configuration")


def read_as(state: WorkerState, reading: Callable[[], Status]) -> None:
    """Have the worker's status read by a function instead of from servers."""

    async def read() -> Status:
        await anyio.lowlevel.checkpoint()
        return reading()

    state._read = read  # type: ignore[method-assign]


def gauge(worker: WorkerState, name: str, **labels: str) -> float | None:
    return worker.metrics.registry.get_sample_value(name, labels)


async def follow(state: WorkerState) -> None:
    """Let a worker follow a stream in which nothing happens."""
    lag = Lag(lambda: 1_000.0, lambda: 0.0)
    lag.begin(Lsn(0x100), 60.0)
    lag.note(None, caught_up=True)
    state.attach(lag, lambda: Lsn(0x100), lambda _: None, {}, lambda _: None)
    state.connected(True)
