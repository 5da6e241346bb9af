"""How many processors this process may use.

Source: Linux, cgroup v2, "CPU Interface Files" (cpu.max); OpenMP, OMP_NUM_THREADS.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def processors(groups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
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
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for path in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for group in [groups / path, *(groups / path).parents]:
            try:
                quota, period = (group / "cpu.max").read_text().split()
            except (OSError, ValueError):
                continue
            if quota.isdecimal():
                found.append(-(-int(quota) // int(period)))
    return found
