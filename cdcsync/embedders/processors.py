"""How many processors this process may use.

Source: Linux, cgroup v2, "CPU Interface Files" (cpu.max); OpenMP, OMP_NUM_THREADS.
"""

from __future__ import annotations

import os
from pathlib import Path

from cdcsync.process.memory import GROUPS, OWN, control_groups


def processors(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return how many processors this process may use, at least 1.

    That is OMP_NUM_THREADS where it is set, by which all numeric libraries go; else the processors it may run on, and
    no more than a container's share of their time: threads beyond it would only wait for each other.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdecimal() and int(said):
        return int(said)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([here, *_shares(groups, own)]))


def _shares(groups: Path, own: Path) -> list[int]:
    """Return the limits of the control groups that this process is in, rounded up to whole processors."""
    found = []
    for said in control_groups("cpu.max", groups, own):
        quota, _, period = said.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            found.append(-(-int(quota) // int(period)))
    return found
