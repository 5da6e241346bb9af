"""Suspects: which texts are asked for together, and that they take one place of the embedder. Time is virtual."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio
import pytest

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.protocol import WORD, Kind, Vectors
from cdcsync.errors import EmbedderUnavailable, EmbedError
from cdcsync.flows.embed import Dispatcher, suspects
from cdcsync.flows.embed.calls import QUICK_S
from cdcsync.flows.embed.suspects import UNKNOWN, Suspects, Suspicion
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import EmbedderState, Learnt
from tests.support.embedding import embedded
from tests.support.virtual import in_virtual_time

LIMIT_S = 30.0
"""The time limit of a call."""


def named(*texts: str) -> dict[bytes, str]:
    return {text.encode(): text for text in texts}


def test_texts_of_one_call_are_asked_for_together_and_no_more_of_them_than_it_says() -> None:
    found = Suspects()
    found.note(named("a", "b", "c"), Suspicion(2))
    found.note(named("d"), Suspicion(2))

    assert found.together(named("a", "b", "c", "d")) == named("a", "b")
    assert found.together(named("c", "d")) == named("c")
    assert found.of(b"e") is UNKNOWN
    assert found.together(named("e", "f")) == named("e")


def test_a_text_is_suspected_until_it_is_acquitted() -> None:
    found = Suspects()
    found.note(named("a", "b"), Suspicion(2))
    found.acquit([b"a", b"z"])
    assert (b"a" in found, b"b" in found, list(found)) == (False, True, [b"b"])


def test_the_memory_for_suspects_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MOST", 2)
    found = Suspects()
    found.note(named("a", "b", "c"), Suspicion(3))
    assert list(found) == [b"b", b"c"]


class Hanging(HashEmbedder):
    """Takes a tenth of a second for a call, hangs at texts with `poison`, and fails at everything while `away`."""

    concurrency = 4

    def __init__(self) -> None:
        super().__init__("hanging", config.HashEmbedder(dimensions=8))
        self.away = False
        self.hung: list[int] = []
        """How many texts each call had that hung."""
        self.at_once = self.most_at_once = 0

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        await anyio.sleep(0.1)
        if self.away:
            raise EmbedderUnavailable("nobody is at home")
        if any("poison" in text for text in texts):
            self.hung.append(len(texts))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                await anyio.sleep(LIMIT_S)
            finally:
                self.at_once -= 1
            raise EmbedError("no answer")
        return self.vectors(texts)


def in_time(embedder: HashEmbedder, scene: Callable[[Dispatcher], Awaitable[None]]) -> None:
    async def main() -> None:
        dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dispatcher.run)
            await dispatcher.ready.wait()
            await scene(dispatcher)
            tasks.cancel_scope.cancel()

    in_virtual_time(main)


def test_what_hangs_takes_one_place_and_no_other_text_waits_for_it() -> None:
    embedder = Hanging()

    async def scene(dispatcher: Dispatcher) -> None:
        batches = [named(*(f"{batch} {at} {'poison' * (at == 5)}" for at in range(16))) for batch in range(4)]
        for batch in batches:
            assert not (await dispatcher.embed(batch)).failed
        assert set(dispatcher.suspects) > {one for batch in batches for one in batch if b"poison" in one}
        embedder.most_at_once = 0
        failed = list[bytes]()

        async def ask(batch: dict[bytes, str]) -> None:
            made = await embedded(dispatcher, batch)
            assert len(made.vectors) == 15
            failed.extend(made.failed)

        async with anyio.create_task_group() as tasks:
            for batch in batches:
                tasks.start_soon(ask, batch)
            for number in range(100):
                began = anyio.current_time()
                made = await embedded(dispatcher, named(f"live {number}"))
                assert (len(made.vectors), anyio.current_time() - began < 1) == (1, True)
        assert embedder.most_at_once == 1
        assert len(failed) == 4
        assert not list(dispatcher.suspects)

    in_time(embedder, scene)
    # Beside the others, in a quarter, and alone: nothing is asked twice that took its whole time.
    assert embedder.hung.count(1) == 4
    assert len(embedder.hung) <= 3 * 4


def test_an_outage_in_between_is_no_texts_fault_and_suspects_are_suspected_after_it() -> None:
    embedder = Hanging()

    async def scene(dispatcher: Dispatcher) -> None:
        batch = named("a", "b", "poison")
        await dispatcher.embed(batch)
        embedder.away = True
        with pytest.raises(EmbedderUnavailable):
            await embedded(dispatcher, batch)
        assert set(dispatcher.suspects) == set(batch)
        embedder.away = False
        await dispatcher.health.works()
        made = await embedded(dispatcher, batch)
        assert (set(made.vectors), set(made.failed)) == ({b"a", b"b"}, {b"poison"})

    in_time(embedder, scene)


def test_a_call_that_is_made_alone_holds_others_back_for_a_moment_only() -> None:
    class Refusing(Hanging):
        """Refuses a text at once, and hangs at it from then on."""

        async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
            if not self.hung and "poison" in texts:
                self.hung.append(len(texts))
                raise EmbedError("no")
            return await super().embed(texts, kind=kind)

    embedder = Refusing()

    async def scene(dispatcher: Dispatcher) -> None:
        await dispatcher.embed(named("poison"))
        assert dispatcher.suspects.of(b"poison").alone
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(embedded, dispatcher, named("poison"))
            await anyio.sleep(0.05)
            began = anyio.current_time()
            await embedded(dispatcher, named("live"))
            assert QUICK_S / 2 < anyio.current_time() - began < QUICK_S + 1
            assert embedder.at_once == 1

    in_time(embedder, scene)


class Busy(HashEmbedder):
    """Takes half a second for a call, and refuses texts of the load while another call runs."""

    concurrency = 4
    running = 0

    def __init__(self) -> None:
        super().__init__("busy", config.HashEmbedder(dimensions=8))

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        if self.running and any("load" in text for text in texts):
            raise EmbedError("busy")
        self.running += 1
        try:
            await anyio.sleep(0.5)
        finally:
            self.running -= 1
        return self.vectors(texts)


def test_the_last_text_of_a_call_that_was_turned_away_is_asked_for_alone_too() -> None:
    async def scene(dispatcher: Dispatcher) -> None:
        dispatcher.suspects.note(named("load 1", "load 2"), Suspicion(2, alone=True, beside=2))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(embedded, dispatcher, named("other"))
            await anyio.sleep(0.1)
            parts = [part async for part in dispatcher.parts(named("load 1"), apart=True)]
        assert [(list(part.vectors), list(part.failed)) for part in parts] == [([b"load 1"], [])]
        assert dispatcher.state.learnt.calls is None

    in_time(Busy(), scene)


def test_a_text_that_failed_before_a_restart_is_at_fault_after_one_call_that_hangs_and_says_nothing_of_sizes() -> None:
    embedder = Hanging()

    async def scene(dispatcher: Dispatcher) -> None:
        learnt = Learnt(texts=3.0)
        dispatcher.recall(EmbedderState(learnt))
        parts = [part async for part in dispatcher.parts(named("poison"), apart=True)]
        assert [list(part.failed) for part in parts] == [[b"poison"]]
        assert dispatcher.state.learnt == learnt

    in_time(embedder, scene)
    assert embedder.hung == [1]


def test_the_word_is_no_suspect() -> None:
    embedder = Hanging()

    async def scene(dispatcher: Dispatcher) -> None:
        await dispatcher.embed(named("poison", "a"))
        assert WORD.encode() not in dispatcher.suspects

    in_time(embedder, scene)
