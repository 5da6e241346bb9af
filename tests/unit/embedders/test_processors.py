"""How many processors there are to use: what is said, what there is, and what a container may have of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cdcsync.embedders.processors import processors


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups, of which this process is in `a/b`, on a machine of sixteen processors."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "own").write_text("1:cpu:/old\n0::/a/b\n")
    return tmp_path


def found(groups: Path) -> int:
    return processors(groups, groups / "own")


def test_all_that_it_may_run_on(groups: Path) -> None:
    (groups / "a" / "b" / "cpu.max").write_text("max 100000\n")

    assert found(groups) == 16


@pytest.mark.parametrize(("limit", "expected"), [("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1)])
def test_no_more_than_the_container_may_have(groups: Path, limit: str, expected: int) -> None:
    (groups / "a" / "b" / "cpu.max").write_text(f"{limit}\n")

    assert found(groups) == expected


def test_the_limit_of_a_group_around_counts_too(groups: Path) -> None:
    (groups / "a" / "b" / "cpu.max").write_text("800000 100000\n")
    (groups / "a" / "cpu.max").write_text("400000 100000\n")

    assert found(groups) == 4


def test_without_control_groups_there_is_no_limit(groups: Path) -> None:
    assert processors(groups / "none", groups / "nothing") == 16


@pytest.mark.parametrize(("said", "expected"), [("3", 3), ("4,2", 4), ("", 16), ("0", 16), ("many", 16)])
def test_what_is_said_counts(groups: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)

    assert found(groups) == expected
