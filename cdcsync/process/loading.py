"""Loading a model, which takes long and which nobody has to wait for.

A thread cannot be stopped. A caller that is cancelled while its thread loads therefore leaves the thread behind, and
the next caller joins it instead of loading a second time. A command that ends in the meantime calls `end_process`,
because the interpreter would wait for the thread. Nothing is lost by that: a load only reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

from cdcsync.errors import CdcsyncError

_under_way: set[Future[None]] = set()


class Loading:
    """A load that one thread does at a time, however many callers wait for it."""

    def __init__(self) -> None:
        self._future: Future[None] | None = None

    async def run(self, load: Callable[[], None]) -> None:
        """Call `load` in a thread, or wait for the call that an earlier caller has left behind.

        A cancelled caller returns at once. `load` keeps what it has loaded, so it has to look first whether that is
        there already.

        :raises BaseException: whatever `load` raises.
        """
        if self._future is None or self._future.done():
            self._future = _start(load)
        await asyncio.wrap_future(self._future)


def _start(load: Callable[[], None]) -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()  # from here on, cancelling a waiter does not cancel it
    context = contextvars.copy_context()

    def work() -> None:
        try:
            context.run(load)
        except BaseException as error:
            _under_way.discard(future)
            future.set_exception(error)
        else:
            _under_way.discard(future)
            future.set_result(None)

    _under_way.add(future)
    threading.Thread(target=work, name="load").start()
    return future


def end_process(status: int) -> None:
    """End the process with this status if a load is still under way; otherwise do nothing."""
    if _under_way:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(CdcsyncError):
                stream.flush()
        os._exit(status)
