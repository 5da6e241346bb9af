"""A bounded set of histories, run with every test; `make chaos` runs as many as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import commits
from tests.chaos.campaign import plan, run_seed
from tests.chaos.faults import FAULTS
from tests.chaos.scenes import SCENES, reachable
from tests.chaos.servers import Side

SEEDS = range(2)
"""So many run with every test: a minute or so on two processors."""


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    """A source and a target for the histories of this process."""
    source, target = Side("source"), Side("target")
    try:
        yield source, target
    finally:
        source.close()
        target.close()


@pytest.mark.server
@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_an_index_equals_its_source_whatever_went_wrong(seed: int, sides: tuple[Side, Side], tmp_path: Path) -> None:
    outcome = run_seed(seed, *sides, tmp_path)

    assert outcome.problem is None, (tmp_path / f"seed{seed}" / "history.txt").read_text()


def test_every_fault_and_every_crash_point_has_its_turn_within_two_hundred_seeds() -> None:
    faults, points = sorted(FAULTS), reachable()
    plans = [plan(seed, faults, points) for seed in range(200)]

    assert {point for point, _, _ in plans} == set(points)
    assert {fault for _, chosen, _ in plans for fault in chosen} == set(faults)


def test_a_scene_is_of_a_crash_point_that_exists() -> None:
    assert set(SCENES) <= set(commits.points())


def test_a_seed_always_has_the_same_plan() -> None:
    faults, points = sorted(FAULTS), reachable()

    assert plan(17, faults, points) == plan(17, faults, points)
