"""Threads that load a model or run it, read a file, or ask a name server, and that nobody has to wait for.

A thread cannot be stopped. A caller that is cancelled while its thread works therefore leaves the thread behind. A load
that was left behind is joined by the next caller instead of being done a second time; a call keeps its place among
those that may run at the same time until it is done. A command that ends in the meantime calls `end_process`, because
the interpreter would wait for the threads. Nothing is lost by that: a load only reads, and nobody wants the result of
a call any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from cdcsync.errors import CdcsyncError

T = TypeVar("T")

LOOKUPS = 32
"""So many names are asked for at a time: of those whose answers nobody awaits any more, some are still under way."""

_under_way: set[object] = set()


class Calls:
    """Calls, as of a model, each in a thread, and only so many at a time.

    :param at_a_time: how many may run at the same time. The others wait, in the order in which they came.
    """

    def __init__(self, at_a_time: int) -> None:
        self.at_a_time = at_a_time
        self._threads: ThreadPoolExecutor | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, in a thread.

        A cancelled caller returns at once: its call never begins, or runs to its end and is forgotten.

        :raises BaseException: whatever `call` raises.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.at_a_time, thread_name_prefix="call")
        return await asyncio.wrap_future(self._threads.submit(contextvars.copy_context().run, _counted, call))

    def close(self) -> None:
        """Let the threads end once they are done, with the calls that wait for them."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None


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
            context.run(_counted, load)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=work, name="load").start()
    return future


class _OfALoop(ThreadPoolExecutor):
    """An event loop's own threads, which ask name servers; the loop's end waits for none of them."""

    def submit(self, call: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """Have a thread call it, and be known to be under way meanwhile."""
        return super().submit(_counted, functools.partial(call, *arguments, **named))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end once they are done."""
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def leave_name_servers_behind() -> None:
    """Have the end of the running event loop wait for no name server, which may not answer for minutes."""
    asyncio.get_running_loop().set_default_executor(_OfALoop(LOOKUPS, thread_name_prefix="loop"))


def _counted(call: Callable[[], T]) -> T:
    """Call it, and be known to be under way meanwhile."""
    token = object()
    _under_way.add(token)
    try:
        return call()
    finally:
        _under_way.discard(token)


def end_process(status: int) -> None:
    """End the process with this status if a thread is still at work; otherwise do nothing."""
    if _under_way:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(CdcsyncError):
                stream.flush()
        os._exit(status)
