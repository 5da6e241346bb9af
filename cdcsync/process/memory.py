"""How much memory this process may use, how large a value of a row may be for it, and how memory is given back.

A value passes through a dozen hands, several of which copy it: the connection's buffer, the message, the text, the
document, its chunks, and what goes to the target. So a value of a sixteenth of the memory is about what fits beside
everything else. A larger one costs its row, which is listed, and not the process.

Texts are made in one thread and freed in another. glibc gives each thread an arena of its own, up to eight for a
processor, and keeps what is free in one from all others. As only one thread at a time runs Python, one arena for all
costs nothing where no model runs in the process: a transaction of 90,000 rows of 2,000 bytes took 84 MB with it, and
100 MB without.

Source: Linux, cgroup v2, "Memory Interface Files" (memory.max); getrlimit(2); mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import resource
from functools import cache
from pathlib import Path

SHARE = 16
"""A value may have this part of the memory."""

LEAST_BYTES = 1024 * 1024
"""A limit below this would leave out ordinary rows, and means that the memory is misread."""

ARENAS_VARIABLE = "MALLOC_ARENA_MAX"
"""The environment variable by which an operator chooses how many arenas there are."""

_M_ARENA_MAX = -8
"""The parameter of glibc's `mallopt`."""

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@cache
def largest_value() -> int:
    """Return the size in bytes above which a value is not taken in; as of when it is first asked."""
    return max(LEAST_BYTES, memory() // SHARE)


def share_arena() -> bool:
    """Have all threads allocate from one arena, unless the environment says how many; returns whether they do.

    Threads that have one already keep it. Other C libraries than glibc have no such arenas.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.get(ARENAS_VARIABLE):
        return False
    return bool(mallopt(_M_ARENA_MAX, 1))


def memory(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Return how many bytes of memory this process may have: the machine's, a container's or a limit of its own."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [int(said) for said in control_groups("memory.max", groups, own) if said.isdecimal()]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def control_groups(name: str, groups: Path, own: Path) -> list[str]:
    """Return what a file of the control groups says, for each group that this process is in."""
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:
        return []
    found = []
    for path in [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]:
        for group in [groups / path, *(groups / path).parents]:
            try:
                found.append((group / name).read_text("utf-8").strip())
            except OSError:
                continue
    return found
