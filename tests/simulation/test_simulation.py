"""A bounded set of simulated histories, run with every test; `make simulate` runs them for as long as one likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from cdcsync.errors import CdcsyncError
from cdcsync.flows.setup.gaps import refuse_lost
from cdcsync.lsn import Lsn
from cdcsync.model.chain import Chain, continued
from cdcsync.model.progress import Progress
from tests.simulation import worker
from tests.simulation.history import run, schedule, shrink

BLOCK = 500


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("block", range(4))
def test_the_target_equals_the_source_after_any_history(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        assert (problem := run(seed, schedule(seed))) is None, f"seed {seed}: {problem}"


def test_targets_go_back_with_and_without_a_gap_and_workers_are_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: Counter[str] = Counter()

    def counted(decide: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> Any:
            try:
                return decide(*arguments)
            except CdcsyncError as error:
                raised[type(error).__name__] += 1
                raise

        return counting

    monkeypatch.setattr(worker, "refuse_lost", counted(refuse_lost))
    monkeypatch.setattr(worker, "continued", counted(continued))
    monkeypatch.setattr(Chain, "continue_with", counted(Chain.continue_with))

    for seed in range(60):
        assert run(seed, schedule(seed)) is None

    assert raised["LeaseLost"]
    assert 0 < raised["GapError"] < raised["TargetRewound"]


def test_a_seed_always_has_the_same_history() -> None:
    assert schedule(5) == schedule(5)


def test_a_failing_history_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is acknowledged too early is noticed by the first acknowledgement after something was received.
    monkeypatch.setattr(Progress, "acknowledge", lambda self: Lsn(self.received + 1))
    steps = schedule(0)
    assert run(0, steps) is not None

    smaller = shrink(0, steps)

    assert run(0, smaller) is not None
    assert len(smaller) < len(steps) / 10
