"""Named points at which a process can be told to die, so that tests can see what a crash there leaves behind.

Every place that commits or acknowledges has one directly after it, and a transaction has one before its end as well.
Nothing happens unless the environment variable `CDCSYNC_CRASH_AT` names a point: "batch committed" dies there the
first time, "batch committed#3" the third time. The process gets SIGKILL: no handler runs and no buffer is flushed,
as when the kernel runs out of memory.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "CDCSYNC_CRASH_AT"
"""The environment variable that arms a point. It is read once, when this module is imported."""

NOTES = "CDCSYNC_CRASHED"
"""The environment variable that names a file, to which a process that dies at a point adds its name as a line."""


def _pass(point: str) -> None:
    """Do nothing: no point is armed."""


def note(point: str) -> None:
    """Add a point to the file of those at which a process died, if there is one."""
    if path := os.environ.get(NOTES):
        with Path(path).open("a", encoding="utf-8") as notes:
            notes.write(f"{point}\n")


def _armed(order: str) -> Callable[[str], None]:
    """Return a function that kills this process when it is called for the ordered point, the n-th time."""
    wanted, _, times = order.partition("#")
    left = int(times or 1)

    def reach(point: str) -> None:
        nonlocal left
        if point == wanted:
            left -= 1
            if left == 0:
                note(point)
                os.kill(os.getpid(), signal.SIGKILL)

    return reach


crash_point: Callable[[str], None] = _armed(os.environ[VARIABLE]) if VARIABLE in os.environ else _pass
"""Call it with the name of the point, in plain words: what has just been done."""
