"""Sessions that wait for an exchange of the settled tier: their snapshots are older than the tables they read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl import rebuilding
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.ddl.tiers import describe_vectors
from tests.support.indexes import until_blocked

T = TypeVar("T")

ConnectTarget = Callable[[], Awaitable[Connection]]


async def read_after_exchange(
    monkeypatch: pytest.MonkeyPatch,
    connect_target: ConnectTarget,
    rebuild: Rebuild,
    read: Callable[[Connection], Awaitable[T]],
) -> T:
    """Build a settled tier anew; returns what a session read that waited for the end of the exchange."""
    reader, watching = await connect_target(), await connect_target()
    answers: list[T] = []

    async def answer() -> None:
        answers.append(await read(reader))

    async with anyio.create_task_group() as tasks:

        async def describe_once_awaited(*arguments: Any) -> None:
            tasks.start_soon(answer)
            await until_blocked(watching, reader)
            await describe_vectors(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(rebuilding, "describe_vectors", describe_once_awaited)
            await rebuild.run()
    return answers[0]
