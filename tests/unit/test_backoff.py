"""Waiting after a failure: how long, for which errors, and until when."""

from __future__ import annotations

import anyio
import pytest

from cdcsync.backoff import ATTEMPT_S, Backoff, Cooldown, Failure, Outages, backoff_s
from cdcsync.errors import CdcsyncError, GapError, SourceUnavailable, TargetUnavailable
from tests.support.virtual import in_virtual_time

pytestmark = pytest.mark.anyio

AWAY = SourceUnavailable("no answer", where="source")
FULL = SourceUnavailable("all connections are in use", where="source", hint="close some")


@pytest.mark.parametrize(("attempt", "bound"), [(0, 1.0), (1, 2.0), (3, 8.0), (5, 10.0), (10_000, 10.0)])
def test_the_wait_doubles_up_to_its_bound_and_is_spread_over_the_upper_half(attempt: int, bound: float) -> None:
    for _ in range(50):
        assert bound / 2 <= backoff_s(attempt, first=1.0, most=10.0) <= bound


async def test_an_error_that_waiting_mends_is_told_waited_for_and_swallowed() -> None:
    told: list[Failure] = []
    backoff = Backoff(told.append, first=0.0)
    for _ in range(2):
        async with backoff:
            raise AWAY
    assert told == [Failure(AWAY, 1, 0.0), Failure(AWAY, 2, 0.0)]


async def test_any_other_error_leaves_the_block_at_once() -> None:
    with pytest.raises(GapError):
        async with Backoff(first=60.0):
            raise GapError("the slot is gone")
    with pytest.raises(SourceUnavailable):
        async with Backoff(first=60.0, errors=TargetUnavailable):
            raise AWAY


async def test_success_begins_again_with_the_shortest_wait_whether_noted_or_at_the_end_of_the_block() -> None:
    backoff = Backoff(first=0.0)
    for note in (True, False):
        async with backoff:
            raise AWAY
        assert backoff.failures > 0
        async with backoff:
            if note:
                backoff.succeeded()
                raise AWAY
        assert backoff.failures == (1 if note else 0)


def test_what_failures_in_a_row_end_with_is_told_once_they_have_lasted() -> None:
    async def main() -> list[CdcsyncError | None]:
        backoff, told = Backoff(), []
        for _ in range(3):
            await backoff.wait(AWAY, asked_s=4.0)
            told.append(backoff.failing_for(10.0))
        backoff.succeeded()
        told.append(backoff.failing_for(10.0))
        await backoff.wait(AWAY, asked_s=60.0)  # a first one, however long it is waited for
        return [*told, backoff.failing_for(10.0)]

    assert in_virtual_time(main) == [None, None, AWAY, None, None]


def test_what_waits_for_a_cause_is_told_by_cause_from_when_it_has_lasted_until_it_is_over() -> None:
    async def main() -> list[dict[str, list[str]]]:
        outages, told = Outages(), []
        with outages.noted():
            loops = [Backoff(waits=waits) for waits in ("the audit waits", "backfills wait", "backfills wait", "")]
            for asked_s in (4.0, 7.0):
                for loop in loops:
                    await loop.wait(FULL, asked_s=asked_s / len(loops))
                told.append(outages.lasting(10.0))
            loops[0].succeeded()
            told.append(outages.lasting(10.0))
        return [*told, outages.lasting(10.0)]

    waits = ["the audit waits", "backfills wait"]
    assert in_virtual_time(main) == [{}, {FULL.with_fix: waits}, {FULL.with_fix: waits[1:]}, {}]


@pytest.mark.parametrize(("attempt_s", "still_told"), [(ATTEMPT_S - 1.0, True), (ATTEMPT_S + 1.0, False)])
def test_an_outage_is_told_into_the_next_attempt_but_not_while_the_loop_waits_for_something_else(
    attempt_s: float, still_told: bool
) -> None:
    async def main() -> list[dict[str, list[str]]]:
        outages, loop, told = Outages(), Backoff(waits="vectors are not stored"), []
        with outages.noted():
            for _ in range(2):
                await loop.wait(AWAY, asked_s=60.0)
            for seconds in (attempt_s, 0.0):
                await anyio.sleep(seconds)
                told.append(outages.lasting(10.0))
                await loop.wait(AWAY, asked_s=60.0)
            loop.succeeded()
            return [*told, outages.lasting(0.0)]

    waits = {AWAY.with_fix: ["vectors are not stored"]}
    assert in_virtual_time(main) == [waits if still_told else {}, waits, {}]


def test_an_outage_is_told_for_as_long_as_the_next_attempt_is_waited_for() -> None:
    async def main() -> dict[str, list[str]]:
        outages, loop = Outages(), Backoff(waits="the audit waits")
        with outages.noted():
            await loop.wait(AWAY, asked_s=1.0)
            with anyio.move_on_after(1_000.0):
                await loop.wait(AWAY, asked_s=3_600.0)
            return outages.lasting(10.0)

    assert in_virtual_time(main) == {AWAY.with_fix: ["the audit waits"]}


def test_outside_of_a_worker_nobody_is_told_of_what_waits() -> None:
    async def main() -> dict[str, list[str]]:
        outages, loop = Outages(), Backoff(waits="the audit waits")
        for _ in range(3):
            await loop.wait(AWAY, asked_s=10.0)
        return outages.lasting(10.0)

    assert in_virtual_time(main) == {}


async def test_a_wait_ends_early_once_it_is_told_to() -> None:
    stopping = anyio.Event()
    backoff = Backoff(first=3_600.0, most=3_600.0, until=stopping)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(backoff.wait)
        await anyio.wait_all_tasks_blocked()
        assert backoff.failures == 1
        stopping.set()


async def test_a_wait_that_the_other_side_asked_for_is_kept() -> None:
    told: list[Failure] = []
    await Backoff(told.append, first=60.0).wait(AWAY, asked_s=0.01)
    assert told == [Failure(AWAY, 1, 0.01)]


async def test_a_cooldown_grows_and_is_longer_after_an_error_that_does_not_pass_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(anyio, "current_time", lambda: now)
    passing, lasting = Cooldown(most=3_600.0), Cooldown(most=3_600.0)
    assert passing.over
    passing.failed(AWAY)
    lasting.failed(GapError("the slot is gone"))
    assert not passing.over
    now = 4.0
    assert passing.over
    assert not lasting.over
    now = 3_600.0
    assert lasting.over
    for _ in range(20):
        passing.failed(AWAY)
    now += 1_700.0
    assert not passing.over
    passing.succeeded()
    passing.failed(AWAY)
    now += 4.0
    assert passing.over
