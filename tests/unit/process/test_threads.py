"""Threads that no one has to wait for: a load that nobody does twice, and calls that keep their place."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest

import cdcsync
from cdcsync.process.threads import Calls, Loading, end_process


class Slow:
    """A load, or a call, that ends when it is told to."""

    def __init__(self) -> None:
        self.times = 0
        self.began = threading.Event()
        self.may_end = threading.Event()
        self.error: Exception | None = None

    def __call__(self) -> None:
        self.times += 1
        self.began.set()
        assert self.may_end.wait(60)
        if self.error is not None:
            raise self.error


async def leave(loads: Loading | Calls, slow: Slow) -> None:
    """Begin it, and be cancelled on the way."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loads.run, slow)
        await anyio.to_thread.run_sync(slow.began.wait)
        tasks.cancel_scope.cancel()


async def test_a_cancelled_caller_leaves_the_load_and_the_next_ones_join_it() -> None:
    loads, slow = Loading(), Slow()
    with anyio.fail_after(60):
        await leave(loads, slow)
        assert not slow.may_end.is_set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(loads.run, slow)
            tasks.start_soon(loads.run, slow)
            await anyio.lowlevel.checkpoint()
            slow.may_end.set()
    assert slow.times == 1


async def test_what_a_load_raises_reaches_its_caller_and_the_next_call_loads_again() -> None:
    loads, slow = Loading(), Slow()
    slow.may_end.set()
    slow.error = ValueError("no such file")
    for _ in range(2):
        with pytest.raises(ValueError, match="no such file"):
            await loads.run(slow)
    slow.error = None
    await loads.run(slow)
    assert slow.times == 3


async def test_a_load_that_fails_after_everyone_has_left_is_done_again() -> None:
    loads, slow = Loading(), Slow()
    slow.error = ValueError("no such file")
    with anyio.fail_after(60):
        await leave(loads, slow)
        joined = anyio.Event()

        async def join() -> None:
            with pytest.raises(ValueError, match="no such file"):
                await loads.run(slow)
            joined.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(join)
            await anyio.lowlevel.checkpoint()
            slow.may_end.set()
        assert joined.is_set()
        slow.error = None
        await loads.run(slow)
    assert slow.times == 2


async def test_a_call_that_was_left_keeps_its_place_until_it_is_done() -> None:
    calls, slow = Calls(1), Slow()
    with anyio.fail_after(60):
        await leave(calls, slow)
        answers: list[int] = []

        async def ask() -> None:
            answers.append(await calls.run(lambda: 7))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with anyio.move_on_after(0.05):
                await calls.run(lambda: answers.append(0))  # waits behind it, and gives up
            assert answers == []
            slow.may_end.set()
        assert answers == [7]
    calls.close()


async def test_as_many_calls_run_at_a_time_as_may_and_each_caller_has_its_own_answer() -> None:
    calls, together = Calls(3), threading.Barrier(3)
    answers: dict[int, int] = {}

    async def ask(number: int) -> None:
        def call() -> int:
            together.wait(60)  # broken unless three are here
            return number

        answers[number] = await calls.run(call)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for number in range(9):
                tasks.start_soon(ask, number)
    assert answers == {number: number for number in range(9)}
    calls.close()
    with pytest.raises(ValueError, match="no such text"):
        await calls.run(_fail)  # closed and used again
    calls.close()


def _fail() -> None:
    raise ValueError("no such text")


async def test_a_process_without_a_load_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    loads, slow = Loading(), Slow()
    slow.may_end.set()
    await loads.run(slow)
    end_process(3)
    assert ended == []


PROGRAM = """
import threading
import anyio
from cdcsync.process.threads import Calls, Loading, end_process

began = threading.Event()

def load():
    began.set()
    threading.Event().wait()

async def command():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(KIND.run, load)
        await anyio.to_thread.run_sync(began.wait)
        tasks.cancel_scope.cancel()

anyio.run(command)
print("left it")
end_process(7)
"""


@pytest.mark.parametrize("kind", ["Loading()", "Calls(1)"])
def test_a_process_with_a_thread_at_work_ends_without_it_and_loses_no_output(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("KIND", kind)],
        env={**os.environ, "PYTHONPATH": str(Path(cdcsync.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "left it\n", "")
