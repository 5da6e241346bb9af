"""The lag: how late the stream is, and from when to when it is far behind."""

from __future__ import annotations

import math

from cdcsync.lsn import Lsn
from cdcsync.model.lag import CLOSE_S, FAR_BEHIND_S, Lag
from tests.support.clocks import Clock


def test_the_lag_is_the_age_of_the_oldest_commit_that_waits(clock: Clock) -> None:
    lag = Lag(clock, clock)
    lag.begin(Lsn(10), 60.0)
    assert (lag.seconds, lag.caught_up) == (0.0, False)
    lag.note(990.0, caught_up=False)
    assert lag.seconds == 10.0
    clock.now += 5
    assert lag.seconds == 15.0
    lag.note(None, caught_up=True)
    assert (lag.seconds, lag.caught_up) == (0.0, True)


def test_a_commit_from_the_future_of_a_clock_that_is_ahead_is_no_lag(clock: Clock) -> None:
    lag = Lag(clock, clock)
    lag.note(1_001.0, caught_up=False)
    assert lag.seconds == 0.0


def test_a_worker_begins_far_behind_until_it_has_caught_up(clock: Clock) -> None:
    lag = Lag(clock, clock)
    assert lag.far_behind
    lag.note(None, caught_up=False)
    assert lag.far_behind
    lag.note(None, caught_up=True)
    assert not lag.far_behind


def test_a_stream_that_is_never_empty_has_caught_up_once_it_is_close(clock: Clock) -> None:
    lag = Lag(clock, clock)
    for age, far_behind in (
        (FAR_BEHIND_S + 1, True),
        (CLOSE_S * 2, True),
        (CLOSE_S / 2, False),
        (FAR_BEHIND_S - 0.1, False),
        (FAR_BEHIND_S + 0.1, True),
        (FAR_BEHIND_S - 0.1, True),
    ):
        lag.note(clock.now - age, caught_up=False)
        assert lag.far_behind is far_behind, age


def test_while_the_source_is_not_heard_the_lag_is_unknown_unless_something_waits(clock: Clock) -> None:
    lag = Lag(clock, clock)
    assert math.isnan(lag.seconds)
    lag.begin(Lsn(10), 60.0)
    assert (lag.heard_lately, lag.silent) == (True, False)
    clock.now += 31
    assert (lag.heard_lately, lag.silent, lag.silent_s) == (False, False, 31)
    assert math.isnan(lag.seconds)
    lag.note(clock.now - 5, caught_up=False)
    assert lag.seconds == 5.0
    clock.now += 30
    assert lag.silent
    lag.hear(Lsn(20))
    assert (lag.heard_lately, lag.silent, lag.heard) == (True, False, 20)
    lag.hear(Lsn(15))
    assert lag.heard == 20
    lag.end()
    assert not lag.heard_lately


def test_who_did_not_listen_has_heard_no_silence(clock: Clock) -> None:
    lag = Lag(clock, clock)
    lag.begin(Lsn(10), 60.0)
    clock.now += 300
    lag.listen()
    assert (lag.heard_lately, lag.silent) == (True, False)
