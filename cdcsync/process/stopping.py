"""Signals: Ctrl-C once for an orderly end, with a word at once; twice to end without waiting for anything.

Ending at once is safe at any moment, as a crash is: what is committed stays, and what is not is done again.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import NoReturn, TypeVar, TypeVarTuple, Unpack

from cdcsync.process.threads import leave_name_servers_behind

T = TypeVar("T")

SHOW_CURSOR = b"\x1b[?25h"
"""The escape sequence that shows a terminal's cursor again, which bars and spinners hide."""
Arguments = TypeVarTuple("Arguments")


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End the process, as a signal's handler: neither the event loop nor threads nor connections are waited for."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(128 + number)


def take_signals_before_the_start() -> None:
    """Take a worker's signals from its first moment on; by their own actions they would end it.

    The worker takes them over once its checks have passed. SIGTERM ends it, with status 0, and SIGHUP is put off.
    """
    signal.signal(signal.SIGTERM, end_before_the_start)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL and not ends_with_its_terminal():
        signal.signal(signal.SIGHUP, PutOff())


class PutOff:
    """The handler of a signal that nobody can act on yet.

    :ivar came: whether there was one.
    """

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note that the signal came."""
        self.came = True


def ends_with_its_terminal() -> bool:
    """Say whether this process belongs to a terminal, wherever its output goes, and was not started by nohup."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return signal.getsignal(signal.SIGHUP) != signal.SIG_IGN


def end_before_the_start(number: int, frame: FrameType | None) -> NoReturn:
    """End a worker that is told to stop before it has begun, as a signal's handler: nothing was changed."""
    os.write(2, b"told to stop before the start; nothing was changed\n")
    os._exit(0)


def wake_for_signals() -> None:
    """Have any signal wake the running event loop, to the end of it, so that handlers run at once. Main thread only.

    Otherwise one that comes just before the loop begins to wait, or to another thread, is acted on only when the loop
    has something else to do. A loop that handles a signal itself wakes up for all: here one that nobody sends.
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGURG, lambda: None)


async def interruptible(function: Callable[[Unpack[Arguments]], Awaitable[T]], *arguments: *Arguments) -> T:
    """Run a command's function; the first SIGINT says so and cancels it, the second ends the process.

    The process ends without waiting for name servers. For the main task of `anyio.run`, whose own handler cancels it.
    """
    cancel = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, end_at_once)
        os.write(2, b"\nstopping; Ctrl-C again ends at once\n")
        if callable(cancel):
            cancel(number, frame)

    leave_name_servers_behind()
    wake_for_signals()
    if callable(cancel):
        signal.signal(signal.SIGINT, interrupted)
    try:
        return await function(*arguments)
    finally:
        signal.signal(signal.SIGINT, cancel)
