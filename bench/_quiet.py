"""Whether the machine does other work: benches share its processors with whatever else runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

BUSY = 0.1
"""From this share of the processors on, other work counts."""
LOOK_S = 1.0
QUIET_PATIENCE_S = 60.0
"""How long a bench waits for others: `make bench` has 20 minutes for all of them."""


def ticks() -> tuple[int, int]:
    """Return how many ticks all processors have been idle, and how many there were.

    Time that a hypervisor gave to other machines counts as busy; time in which a disk is waited for does not.

    Source: proc_stat(5); user, nice, system, idle, iowait, irq, softirq, steal.
    """
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def busy(look: Callable[[], tuple[int, int]] = ticks, sleep: Callable[[float], None] = time.sleep) -> float:
    """Return the share of the processors that was busy for a second."""
    idle, total = look()
    sleep(LOOK_S)
    idle_then, total_then = look()
    return 1 - (idle_then - idle) / max(1, total_then - total)


def quiet(measure: Callable[[], float] = busy) -> float:
    """Wait until the machine is quiet, for a minute at most; return the share that was busy in the end."""
    for _ in range(int(QUIET_PATIENCE_S / LOOK_S) - 1):
        if (share := measure()) < BUSY:
            return share
    return measure()
