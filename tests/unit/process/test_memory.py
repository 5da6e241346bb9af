"""How much memory there is: what the machine has, and what a container or a limit leaves of it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cdcsync.process import memory
from cdcsync.process.memory import LEAST_BYTES, SHARE, largest_value

GIGABYTE = 1024**3


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups, of which this process is in `a/b`, on a machine of 16 GB."""
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 1024**2}.get)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "own").write_text("1:memory:/old\n0::/a/b\n")
    return tmp_path


def found(groups: Path) -> int:
    return memory.memory(groups, groups / "own")


def test_all_of_the_machine_where_nothing_limits_it(groups: Path) -> None:
    (groups / "a" / "b" / "memory.max").write_text("max\n")

    assert found(groups) == 16 * GIGABYTE


def test_the_smallest_limit_of_the_groups_around(groups: Path) -> None:
    (groups / "a" / "b" / "memory.max").write_text(f"{4 * GIGABYTE}\n")
    (groups / "a" / "memory.max").write_text(f"{2 * GIGABYTE}\n")

    assert found(groups) == 2 * GIGABYTE


def test_a_limit_of_the_process(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (GIGABYTE, resource.RLIM_INFINITY))

    assert found(groups) == GIGABYTE


@pytest.mark.parametrize(("there", "largest"), [(16 * GIGABYTE, GIGABYTE), (SHARE, LEAST_BYTES)])
def test_a_value_may_have_a_part_of_it_but_ordinary_rows_are_always_taken(
    monkeypatch: pytest.MonkeyPatch, there: int, largest: int
) -> None:
    monkeypatch.setattr(memory, "memory", lambda: there)
    largest_value.cache_clear()
    try:
        assert largest_value() == largest
    finally:
        largest_value.cache_clear()


SHARING = """
import ctypes, threading
from cdcsync.process.memory import share_arena
shared = share_arena()
done = threading.Event()

def hold():
    kept = [bytes(1000) for _ in range(100)]
    ready.wait()
    done.wait()

ready = threading.Barrier(6)
for _ in range(5):
    threading.Thread(target=hold, daemon=True).start()
ready.wait()
libc = ctypes.CDLL(None)
libc.malloc_stats()  # to standard error
done.set()
print(shared)
"""


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
@pytest.mark.parametrize(("chosen", "arenas"), [(None, 1), ("3", 3)])
def test_all_threads_allocate_from_one_arena_unless_the_environment_says_otherwise(
    chosen: str | None, arenas: int
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != memory.ARENAS_VARIABLE}
    environment |= {} if chosen is None else {memory.ARENAS_VARIABLE: chosen}
    done = subprocess.run(
        [sys.executable, "-c", SHARING], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"{chosen is None}\n"
    assert done.stderr.count("Arena ") == arenas
