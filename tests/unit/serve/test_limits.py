"""What a tenant may ask for: rate and burst, calls at the same time, text a day; and when everybody is told to wait."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from cdcsync.config.serving import Serve
from cdcsync.serve import limits as module
from cdcsync.serve.limits import COMING_BACK_S, CROWD, DAY_S, HELD_S, MESSAGES, REFUSALS_PER_S, Limits
from cdcsync.serve.problems import Problem
from tests.support.clocks import Clock

pytestmark = pytest.mark.anyio


def limits(clock: Clock, **settings: Any) -> Limits:
    return Limits(Serve(**settings), clock)


async def calls(made: Limits, account: str, count: int) -> list[float | None]:
    """Make calls one after the other; returns the wait that each refusal asks for, None for one that was let in."""
    waits: list[float | None] = []
    for _ in range(count):
        try:
            async with made.admitted(account):
                waits.append(None)
        except Problem as problem:
            waits.append(problem.retry_after_s)
    return waits


async def test_a_burst_is_let_in_and_then_the_rate(clock: Clock) -> None:
    made = limits(clock, requests_per_s=2.0, burst=3)
    assert await calls(made, "a", 4) == [None, None, None, 0.5]
    clock.now += 0.25
    assert not made.crowded("a")
    clock.now += 0.25
    assert await calls(made, "a", 1) == [None]
    clock.now += 3_600
    assert await calls(made, "a", 4) == [None, None, None, 0.5]  # it saves up no more than the burst


async def test_a_call_that_costs_several_is_made_up_for_before_the_next(clock: Clock) -> None:
    made = limits(clock, requests_per_s=2.0, burst=3)
    async with made.admitted("a"):
        made.count("a", 5)
    assert await calls(made, "b", 1) == [None]
    assert await calls(made, "a", 1) == [2.0]
    clock.now += 2
    assert await calls(made, "a", 2) == [None, 0.5]


async def test_callers_that_are_refused_together_are_told_to_come_back_one_after_the_other(clock: Clock) -> None:
    made = limits(clock, requests_per_s=2.0, burst=1)
    refused = [made.refusal("a") for _ in range(9 if await calls(made, "a", 1) == [None] else 0)]
    back = [one.held_s + (one.retry_after_s or 0) for one in refused if one is not None]
    assert back == pytest.approx([0.5 * place for place in range(1, 10)])
    made = limits(clock, requests_per_s=2.0, burst=1)
    await calls(made, "a", 1)
    waits = [one.retry_after_s or 0 for one in (made.refusal("a") for _ in range(1_000)) if one is not None]
    assert len(waits) == 1_000
    assert max(waits) <= COMING_BACK_S + 1


async def test_refusals_of_an_account_are_told_one_after_the_other_and_none_is_held_for_ever(clock: Clock) -> None:
    made = limits(clock)
    held = [made.held_s("a") for _ in range(1_000)]
    assert held[:3] == pytest.approx([0, 1 / REFUSALS_PER_S, 2 / REFUSALS_PER_S])
    assert max(held) <= HELD_S
    assert len({round(one, 1) for one in held[200:]}) > 10  # those beyond the line are not told together
    assert made.held_s("b") == 0  # another account has a line of its own
    clock.now += HELD_S + 1
    assert made.held_s("a") == 0


async def test_a_crowd_is_many_refusals_that_are_held_and_goes_as_they_are_told(clock: Clock) -> None:
    made = limits(clock)
    assert not made.crowded()
    made.held_s("a")
    assert not made.crowded("a")
    for _ in range(CROWD + 1):
        made.held_s("a")
    assert (made.crowded(), made.crowded("a"), made.crowded("b")) == (True, True, False)
    clock.now += CROWD / REFUSALS_PER_S
    assert (made.crowded(), made.crowded("a")) == (False, False)


async def test_messages_of_mcp_are_counted_apart_from_the_calls(clock: Clock) -> None:
    made = limits(clock, requests_per_s=2.0, burst=1)
    assert [made.message("a") for _ in range(MESSAGES)] == [None] * MESSAGES
    refused = made.message("a")
    assert refused is not None
    assert (refused.detail, refused.held_s) == ("more than 10 messages a second", 0)
    assert await calls(made, "a", 1) == [None]


async def test_tenants_do_not_share_a_bucket(clock: Clock) -> None:
    made = limits(clock, requests_per_s=1.0, burst=1)
    assert await calls(made, "a", 2) == [None, 1.0]
    assert await calls(made, "b", 1) == [None]


async def test_calls_of_a_tenant_at_the_same_time_are_bounded_and_end_even_if_they_fail(clock: Clock) -> None:
    made = limits(clock, concurrency=2)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(made.admitted("a"))
        assert await calls(made, "a", 1) == [1]
        assert await calls(made, "b", 1) == [None]
    with pytest.raises(ZeroDivisionError):
        async with made.admitted("a"):
            raise ZeroDivisionError
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(made.admitted("a"))


async def test_a_refused_call_costs_nothing_of_the_share(clock: Clock) -> None:
    made = limits(clock, requests_per_s=1.0, burst=2, concurrency=1)
    async with made.admitted("a"):
        assert None not in await calls(made, "a", 3)
    assert await calls(made, "a", 1) == [None]


async def test_the_days_text_ends_and_begins_again(clock: Clock) -> None:
    made = limits(clock, tokens_per_day=100)
    assert await calls(made, "a", 1) == [None]
    made.spend("a", 150)
    clock.now += 60
    assert await calls(made, "a", 1) == [DAY_S - 60]
    assert await calls(made, "b", 1) == [None]
    clock.now += DAY_S
    assert await calls(made, "a", 1) == [None]


async def test_beyond_those_who_may_wait_everybody_is_told_to_come_back(clock: Clock) -> None:
    made = limits(clock, connections=1, waiting=1)
    waits = anyio.Event()

    async def wait() -> None:
        async with made.admitted("b"):
            pass

    async with anyio.create_task_group() as tasks, made.admitted("a"):
        tasks.start_soon(wait)
        while not made.waiting:
            await anyio.lowlevel.checkpoint()
        with pytest.raises(Problem, match="too many calls wait") as refused:
            async with made.admitted("c"):
                waits.set()
        assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
    assert made.waiting == 0


async def test_a_call_that_gave_up_waiting_leaves_no_trace(clock: Clock) -> None:
    made = limits(clock, connections=1, concurrency=1)
    async with made.admitted("a"):
        with anyio.move_on_after(0):
            async with made.admitted("b"):
                pytest.fail("there was no room")
    assert made.waiting == 0
    assert await calls(made, "b", 1) == [None]


async def test_quiet_accounts_are_forgotten_and_busy_ones_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORGET_AFTER", 3)
    made = limits(clock, requests_per_s=0.001, burst=1)
    async with made.admitted("busy"):
        for number in range(10):
            await calls(made, f"quiet {number}", 1)
        assert len(made._accounts) == 3
        assert (await calls(made, "busy", 1))[0] is not None
