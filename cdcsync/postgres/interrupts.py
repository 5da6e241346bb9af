"""Interrupts: how what waits is ended, on this side and on the server.

A wait for a server is not just left: psycopg's own would leave a session behind that waits for its lock, and a
transaction of which nobody knows whether it commits. So the server is asked to cancel, and the statement fails. And a
login that is given up is closed at once (`connected`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import psycopg

from cdcsync.errors import leading

C = TypeVar("C", bound=psycopg.AsyncConnection[Any])

CANCEL_S = 2.0
"""How long a cancel request may take: it is one small message to a server that was just reached."""

INTERRUPT_EVERY_S = 0.25
"""A request that meets no statement does nothing, so it is repeated."""

HANG_UP_AFTER = 8
"""Requests after which the server is not listening, and the connection is cut."""


async def connected(kind: type[C], settings: str) -> C:
    """Return a new connection in autocommit; a login that is cancelled, or takes too long, is closed at once.

    The driver closes it once nothing refers to the attempt any more, and the error does. The server would wait for the
    rest of the login (`authentication_timeout`), and a DROP DATABASE for the server.

    :raises psycopg.Error: the login failed.
    """
    try:
        return await kind.connect(settings, autocommit=True)
    except (psycopg.Error, anyio.get_cancelled_exc_class()) as error:
        traceback.clear_frames(error.__traceback__)
        raise


async def interrupt(connection: psycopg.AsyncConnection[Any]) -> None:
    """Make each statement on a connection fail, one after the other, until cancelled or the connection is closed.

    A server that does not react is disconnected. The task that waits for the statement gets an error for which a
    retry helps.
    """
    requests = 0
    while not connection.closed:
        with contextlib.suppress(psycopg.Error):
            await connection.cancel_safe(timeout=CANCEL_S)
        requests += 1
        if requests >= HANG_UP_AFTER:
            with contextlib.suppress(psycopg.Error, OSError):
                hang_up(connection.pgconn.socket)
            return
        await anyio.sleep(INTERRUPT_EVERY_S)


def hang_up(descriptor: int) -> None:
    """Shut a connection's socket down: a task that waits for it is woken, and finds it closed."""
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def interrupted_by(event: anyio.Event, *connections: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    """Make the statements of a block fail once an event is set."""
    try:
        async with anyio.create_task_group() as tasks:

            async def wait(connection: psycopg.AsyncConnection[Any]) -> None:
                await event.wait()
                await interrupt(connection)

            for connection in connections:
                tasks.start_soon(wait, connection)
            yield
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leading(group) from None


@asynccontextmanager
async def cancelled_by(event: anyio.Event) -> AsyncIterator[None]:
    """Leave the block where it is once an event is set: for what ends cleanly when it is cancelled."""
    try:
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                await event.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(wait)
            yield
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leading(group) from None
