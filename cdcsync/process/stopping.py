"""Ctrl-C: once for an orderly end, with a word at once; twice to end without waiting for anything.

Ending at once is safe at any moment, as a crash is: what is committed stays, and what is not is done again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import NoReturn, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")

SHOW_CURSOR = b"\x1b[?25h"
"""The escape sequence that shows a terminal's cursor again, which bars and spinners hide."""
Arguments = TypeVarTuple("Arguments")


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End the process, as a signal's handler: neither the event loop nor threads nor connections are waited for."""
    if os.isatty(2):
        os.write(2, SHOW_CURSOR)
    os._exit(128 + number)


def end_before_the_start(number: int, frame: FrameType | None) -> NoReturn:
    """End a worker that is told to stop before it has begun, as a signal's handler: nothing was changed."""
    os.write(2, b"told to stop before the start; nothing was changed\n")
    os._exit(0)


async def interruptible(function: Callable[[Unpack[Arguments]], Awaitable[T]], *arguments: *Arguments) -> T:
    """Run a command's function; the first SIGINT says so and cancels it, the second ends the process.

    For the main task of `anyio.run`, whose own handler cancels it.
    """
    cancel = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, end_at_once)
        os.write(2, b"\nstopping; Ctrl-C again ends at once\n")
        if callable(cancel):
            cancel(number, frame)

    if callable(cancel):
        signal.signal(signal.SIGINT, interrupted)
    try:
        return await function(*arguments)
    finally:
        signal.signal(signal.SIGINT, cancel)
