"""A bounded set of simulated histories, run with every test; `make simulate` runs them for as long as one likes."""

from __future__ import annotations

import pytest

from cdcsync.lsn import Lsn
from cdcsync.model.progress import Progress
from tests.simulation.history import run, schedule, shrink

BLOCK = 500


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("block", range(4))
def test_the_target_equals_the_source_after_any_history(block: int) -> None:
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        assert (problem := run(seed, schedule(seed))) is None, f"seed {seed}: {problem}"


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
