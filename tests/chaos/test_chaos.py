"""A bounded set of histories, run with every test; `make chaos` runs as many as one likes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.chaos import commits
from tests.chaos.campaign import plan, run_seed
from tests.chaos.faults import FAULTS, says
from tests.chaos.history import Broken, History
from tests.chaos.scenes import SCENES, reachable
from tests.chaos.servers import Side
from tests.chaos.worker import Worker

SEED = 91561
"""The history that runs with every test: half a minute on two processors that have nothing else to do. It was looked
for among many: `BOUNDED` says what its plan has."""

BOUNDED = ("fails over with loss", "kill -9", "provider")
"""Parts of the names of the faults that the bounded set must have, besides a death by SIGKILL at a crash point."""


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
def test_an_index_equals_its_source_whatever_went_wrong(sides: tuple[Side, Side], tmp_path: Path) -> None:
    outcome = run_seed(SEED, *sides, tmp_path)

    assert outcome.problem is None, (tmp_path / f"seed{SEED}" / "history.txt").read_text()


def test_the_history_that_runs_with_every_test_has_a_kill_a_failover_with_loss_a_half_open_network_and_a_provider() -> (
    None
):
    point, faults, one_server = plan(SEED, sorted(FAULTS), reachable())

    assert point is not None
    assert not one_server
    assert [part for part in BOUNDED if not any(part in one for one in faults)] == [], "look for another seed"


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


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """A history that has no servers."""
    monkeypatch.setattr(History, "look_what_is_held", lambda self: None)
    nowhere = cast(Side, None)
    return History(1, nowhere, nowhere, tmp_path)


def ended(history: History, script: str, said: str = "", crash_at: str | None = None) -> Worker:
    """Add a worker to a history: a process that has run this script of the shell to its end."""
    worker = Worker.__new__(Worker)
    worker.log = history.directory / f"worker{len(history.workers) + 1}.log"
    worker.log.write_text(said)
    worker.process = subprocess.Popen(["sh", "-c", script])
    worker.process.wait()
    worker.crash_at, worker.killed, worker._events, worker._read = crash_at, False, [], 0
    history.workers.append(worker)
    return worker


@pytest.mark.parametrize("script", ["exit 0", "exit 1", "kill -9 $$"])
def test_a_worker_that_ends_by_itself_breaks_a_history(history: History, script: str) -> None:
    ended(history, script)

    for look in (history.settle_crash, history.kill, history.stop, history.ensure_worker):
        with pytest.raises(Broken, match="ended by itself"):
            look()


def test_a_worker_may_end_at_its_crash_point_or_when_it_is_asked_to(history: History) -> None:
    ended(history, "exit 0", '{"event": "stopping", "signal": "SIGTERM"}\n')
    history.settle_crash()

    ended(history, "kill -9 $$", crash_at="batch committed#2")
    history.settle_crash()
    assert history.hit == {"batch committed"}


@pytest.mark.parametrize(
    ("event", "cause"),
    [("gap", "gap_expected"), ("target_rewound", "rewind_expected"), ("index_paused", "pause_expected")],
)
def test_a_worker_may_report_only_what_the_history_caused(history: History, event: str, cause: str) -> None:
    ended(history, "exit 0", f'{{"event": "{event}"}}\n')

    with pytest.raises(Broken, match=f"reported {event} where nothing had caused it"):
        history.refuse_what_had_no_cause()

    setattr(history, cause, True)
    history.refuse_what_had_no_cause()


def test_neither_an_old_line_nor_the_end_of_a_worker_counts_as_an_effect(history: History) -> None:
    assert not says(ended(history, "exit 0", "No space left\n"), "No space left", len("No space left\n"), 0)
    assert says(ended(history, "exit 0", "No space left\n"), "No space left", 0, 0)
