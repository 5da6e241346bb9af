"""Other work is noticed, and waited for."""

from __future__ import annotations

import pytest

from bench._quiet import LOOK_S, QUIET_PATIENCE_S, busy, quiet, ticks


def test_the_share_is_that_of_the_ticks_between_two_looks() -> None:
    looks = iter([(1_000, 5_000), (1_150, 5_200)])

    assert busy(lambda: next(looks), lambda _: None) == pytest.approx(0.25)


def test_a_quiet_machine_is_not_waited_for() -> None:
    shares = iter([0.03, 0.9])

    assert quiet(lambda: next(shares)) == 0.03


def test_other_work_is_waited_for_a_minute_at_most() -> None:
    shares, asked = iter([0.9, 0.5, 0.02]), list[float]()

    def never() -> float:
        asked.append(0.7)
        return 0.7

    assert quiet(lambda: next(shares)) == 0.02
    assert quiet(never) == 0.7
    assert len(asked) == QUIET_PATIENCE_S / LOOK_S


def test_this_machine_has_ticks() -> None:
    idle, total = ticks()

    assert 0 <= idle <= total
