"""Waits of an application's tasks for positions of the WAL.

The function `wait_for` of the target holds a connection for as long as it waits, and the lock by which the worker sees
that somebody waits. Here only one task at a time waits in it, over a session of its own, which is enough for the
worker. The others look from time to time whether their position is reached, so that waits for a position that is far
away take no connection from searches, however many they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from cdcsync.errors import TargetUnavailable
from cdcsync.postgres.sessions import IDLE_S, Connection, Session

TURN_S = 1.0
"""How long a task waits in the target. The worker looks four times a second whether one does."""

FIRST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 0.25


class Waits:
    """Waits for positions. For any number of tasks of one event loop."""

    def __init__(self, dsn: str, *, application_name: str) -> None:
        self._session = Session(dsn, "target", application_name=application_name, idle_s=IDLE_S)
        self._turn = anyio.Lock()

    async def aclose(self) -> None:
        """Close the session."""
        await self._session.aclose()

    async def wait(
        self,
        look: Callable[[], Awaitable[bool]],
        reached: Callable[[Connection, float], Awaitable[bool]],
        timeout_s: float,
    ) -> bool:
        """Wait until a position is reached; return whether it is.

        :param look: says whether it is reached now.
        :param reached: waits for it in the target for so many seconds at most, and says whether it is reached.
        :raises CdcsyncError: `look` cannot say.
        """
        until, pause_s = anyio.current_time() + timeout_s, FIRST_PAUSE_S
        while not await look():
            left_s = until - anyio.current_time()
            if left_s <= 0:
                return False
            if await self._waited_in_target(reached, min(left_s, TURN_S)):
                return True
            await anyio.sleep(max(0.0, min(pause_s, until - anyio.current_time())))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return True

    async def _waited_in_target(self, reached: Callable[[Connection, float], Awaitable[bool]], within_s: float) -> bool:
        """Wait in the target unless another task does; return whether the position is reached."""
        try:
            self._turn.acquire_nowait()
        except anyio.WouldBlock:
            return False
        try:
            return await reached(await self._session.connection(), within_s)
        except TargetUnavailable:
            return False  # the session broke, or the target has no connection to spare: the next look tells which
        finally:
            self._turn.release()
