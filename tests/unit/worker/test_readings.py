"""Whether the target answers, by the outcomes of readings."""

from __future__ import annotations

import math
from contextlib import suppress

import anyio
import pytest

from cdcsync.errors import CdcsyncError, SetupError, TargetUnavailable
from cdcsync.worker.readings import AWAY_S, Readings
from tests.support.virtual import in_virtual_time

AWAY = TargetUnavailable("connection refused", where="target")
REFUSED = SetupError("permission denied", hint="grant it")


def never() -> float:
    return -math.inf


def reading(readings: Readings, outcome: Exception | None) -> None:
    with suppress(CdcsyncError, KeyError), readings.noted():
        if outcome is not None:
            raise outcome


@pytest.mark.parametrize(
    ("outcome", "answered", "why"),
    [
        (None, True, None),
        (AWAY, False, "the target does not answer: connection refused"),
        (REFUSED, True, "the status cannot be read: permission denied; grant it"),
        (KeyError("a mistake of ours"), True, None),
    ],
    ids=["answered", "away", "refused", "given up"],
)
def test_a_failed_reading_is_told_at_once_unless_it_is_likely_to_pass(
    outcome: Exception | None, answered: bool, why: str | None
) -> None:
    async def main() -> None:
        readings = Readings(never)
        reading(readings, outcome)
        passing = outcome is AWAY
        assert (readings.answered, readings.silent) == (answered, False)
        assert readings.why_failing == (None if passing else why)
        await anyio.sleep(AWAY_S)
        assert (readings.answered, readings.silent, readings.why_failing) == (answered, passing, why)
        reading(readings, None)
        assert (readings.answered, readings.silent, readings.why_failing) == (True, False, None)

    in_virtual_time(main)


def test_a_long_reading_is_no_silence_while_its_statements_are_answered() -> None:
    async def main() -> None:
        last = -math.inf
        readings = Readings(lambda: last)
        with readings.noted():
            await anyio.sleep(AWAY_S - 1)
            last = anyio.current_time()
            await anyio.sleep(AWAY_S - 1)
            assert (readings.silent, readings.why_failing) == (False, None)
            await anyio.sleep(1)
            assert (readings.silent, readings.why_failing) == (True, "the target does not answer")
        assert not readings.silent

    in_virtual_time(main)


def test_a_reading_that_is_given_up_leaves_the_silence_of_those_before() -> None:
    async def main() -> None:
        readings = Readings(never)
        reading(readings, AWAY)
        await anyio.sleep(AWAY_S - 1)
        with anyio.move_on_after(1), readings.noted():
            await anyio.sleep_forever()
        assert readings.silent

    in_virtual_time(main)


@pytest.mark.parametrize("found", [None, AWAY])
def test_what_else_asks_the_target_ends_the_silence_and_says_whether_it_answers(found: CdcsyncError | None) -> None:
    async def main() -> None:
        readings = Readings(never)
        reading(readings, AWAY)
        await anyio.sleep(AWAY_S)
        assert readings.silent
        readings.conclude(found)
        assert (readings.silent, readings.answered) == (False, found is None)

    in_virtual_time(main)
