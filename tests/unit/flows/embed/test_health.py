"""Whose fault a failed call is, and until when a broken embedder is left alone. Time is virtual."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
import pytest

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.protocol import WORD, Kind, Vectors
from cdcsync.errors import CdcsyncError, EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.flows.embed.health import MOST_ASKED_S, MOST_PAUSE_S, PATIENCE_S, SLOW_S, WORD_S, Health, asked_s, known
from tests.support.virtual import in_virtual_time

AWAY = EmbedderUnavailable("nobody is at home", hint="start it")


class Told(HashEmbedder):
    """Fails at the word as it is told to, call by call, and works once there is nothing left; None hangs."""

    def __init__(self, *failures: Exception | None) -> None:
        super().__init__("told", config.HashEmbedder(dimensions=8))
        self.failures = deque(failures)
        self.asked: list[float] = []

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        assert texts == [WORD]
        self.asked.append(anyio.current_time())
        if not self.failures:
            return self.vectors(texts)
        failure = self.failures.popleft()
        if failure is None:
            await anyio.sleep_forever()
            raise AssertionError
        raise failure


def in_time(embedder: Told, scene: Callable[[Health], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await scene(Health(embedder, anyio.current_time, anyio.CapacityLimiter(1)))

    in_virtual_time(main)


def test_a_call_is_at_fault_if_a_harmless_word_works_after_it() -> None:
    embedder = Told()

    async def scene(health: Health) -> None:
        await health.confirm(EmbedError("the answer is not JSON"), anyio.current_time())
        assert health.problem is None
        health.usable()

    in_time(embedder, scene)
    assert len(embedder.asked) == 1


def test_the_embedder_is_at_fault_if_the_word_fails_too_and_its_own_words_say_why() -> None:
    async def scene(health: Health) -> None:
        with pytest.raises(EmbedderUnavailable, match="nobody is at home") as refused:
            await health.confirm(EmbedError("the answer is not JSON"), anyio.current_time())
        assert 0 < (refused.value.retry_after_s or 0) <= MOST_PAUSE_S
        assert health.problem is not None
        assert (health.problem.message, health.problem.hint) == ("nobody is at home", "start it")
        assert health.problem.until is not None
        with pytest.raises(EmbedderUnavailable):
            health.usable()

    in_time(Told(AWAY), scene)


def test_callers_that_failed_before_the_word_worked_do_not_ask_it_again() -> None:
    embedder = Told()

    async def scene(health: Health) -> None:
        failed = anyio.current_time()
        for _ in range(3):
            await health.confirm(EmbedError("too many texts"), failed)

    in_time(embedder, scene)
    assert len(embedder.asked) == 1


def test_a_wait_that_the_embedder_asks_for_comes_before_the_word() -> None:
    embedder = Told(EmbedderUnavailable("slow down", retry_after_s=20))

    async def scene(health: Health) -> None:
        await health.confirm(EmbedderUnavailable("slow down", retry_after_s=10), anyio.current_time())
        assert health.problem is None

    in_time(embedder, scene)
    assert embedder.asked == [10, 30]


def test_an_embedder_that_asks_for_more_patience_than_we_have_is_not_working_until_then() -> None:
    async def scene(health: Health) -> None:
        patience = EmbedderUnavailable("come back tomorrow", retry_after_s=PATIENCE_S + 1)
        with pytest.raises(EmbedderUnavailable, match="come back tomorrow") as refused:
            await health.confirm(patience, anyio.current_time())
        assert refused.value.retry_after_s == PATIENCE_S + 1

    embedder = Told()
    in_time(embedder, scene)
    assert embedder.asked == []


def test_silence_does_not_hide_what_the_embedder_said_before() -> None:
    async def scene(health: Health) -> None:
        with pytest.raises(EmbedderUnavailable, match="quota exceeded"):
            await health.confirm(EmbedderUnavailable("quota exceeded"), anyio.current_time())
        assert anyio.current_time() >= WORD_S

    in_time(Told(None), scene)


def test_a_broken_embedder_is_tried_after_longer_and_longer_pauses_until_it_works() -> None:
    embedder = Told(*[AWAY] * 8)

    async def scene(health: Health) -> None:
        changes: list[bool] = []
        health.changed = lambda: changes.append(health.problem is None)
        health.fails(AWAY)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(health.recover)
            await health.works()
            tasks.cancel_scope.cancel()
        health.usable()
        assert changes == [False] * 9 + [True]

    in_time(embedder, scene)
    pauses = [after - before for before, after in zip(embedder.asked, embedder.asked[1:], strict=False)]
    assert pauses[-1] > 4 * pauses[0]
    assert max(pauses) <= MOST_PAUSE_S


def test_a_call_that_does_not_end_is_a_problem_in_itself() -> None:
    async def scene(health: Health) -> None:
        with health.running():
            await anyio.sleep(SLOW_S)
            assert health.problem is None
            await anyio.sleep(1)
            assert health.problem is not None
            assert "has been running for 301 s" in health.problem.message
        assert health.problem is None

    in_time(Told(), scene)


def test_a_word_that_no_time_limit_ends_is_a_problem_for_as_long_as_it_runs() -> None:
    class Stuck(Told):
        """Hangs in a thread, which cannot be cancelled."""

        async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(10 * WORD_S)
            return self.vectors(texts)

    async def scene(health: Health) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(health.confirm, EmbedError("CUDA error"), anyio.current_time())
            await anyio.sleep(WORD_S)
            assert health.problem is None
            await anyio.sleep(WORD_S)
            assert health.problem is not None
            assert health.problem.message == "the embedder has been trying a single word for 120 s"
            tasks.cancel_scope.cancel()
        assert health.problem is None

    in_time(Stuck(), scene)


@pytest.mark.parametrize(
    ("error", "wait"),
    [
        (EmbedderUnavailable("away"), 0.0),
        (EmbedderUnavailable("away", retry_after_s=3), 3.0),
        (EmbedderUnavailable("away", retry_after_s=-3), 0.0),
        (EmbedderUnavailable("away", retry_after_s=10.0**20), MOST_ASKED_S),
        (TextRejected("too long"), 0.0),
    ],
)
def test_no_wait_is_longer_than_an_hour(error: CdcsyncError, wait: float) -> None:
    assert asked_s(error) == wait


def test_what_foreign_code_raises_becomes_an_error_of_ours_that_quotes_no_text() -> None:
    found = known(ValueError("cannot embed 'my secret text'"), ["my secret text"], "mine")
    assert isinstance(found, EmbedError)
    assert found.where == "embedders.mine"
    assert "secret" not in found.message
    assert known(KeyError(), [], "mine").message == "the embedder fails: KeyError"
    ours = EmbedderSetupError("no such model")
    assert known(ours, [], "mine") is ours
