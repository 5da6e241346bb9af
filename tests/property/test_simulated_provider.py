"""Embedding by a provider that misbehaves by seed, for each kind of embedder.

Whatever it does: every good text gets its own vector in the end, every bad one is listed with a reason, nothing else is
touched, and the calls stay within twice what is needed.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import islice, takewhile
from math import ceil, log2

import anyio
import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.errors import EmbedderUnavailable, TextRejected
from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.embed.calls import Made
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import EmbedderState
from tests.support.embedding import embedded
from tests.support.simulated import DIMENSIONS, KINDS, Simulated, Temper, embedder_of
from tests.support.virtual import in_virtual_time

TEXTS = [f"text {at} " + "of words " * (at % 23) for at in range(600)]


CALL_S = 0.25
"""What a dispatcher aims at for a call where none runs beside it."""

ATTEMPTS = 3
"""How often a text is tried that was not refused; embed loops do it more often, with long pauses between."""


async def drained(dispatcher: Dispatcher) -> Made:
    """Embed all texts as embed loops do, from a queue, until nothing is left."""
    waiting = deque((text.encode(), text) for text in TEXTS)
    attempts: Counter[bytes] = Counter()
    done = Made({}, {})

    async def batches() -> None:
        while waiting:
            await dispatcher.health.works()
            if not waiting:
                return
            fresh = dict(takewhile(lambda one: not attempts[one[0]], islice(waiting, 256)))
            batch = dict(list(fresh.items())[: dispatcher.batch(fresh)]) or dict([waiting[0]])
            for _ in batch:
                waiting.popleft()
            try:
                made = await embedded(dispatcher, batch)
            except EmbedderUnavailable:
                waiting.extendleft(batch.items())
                continue
            done.vectors.update(made.vectors)
            for one, error in made.failed.items():
                attempts[one] += 1
                if isinstance(error, TextRejected) or attempts[one] == ATTEMPTS:
                    done.failed[one] = error
                else:
                    waiting.append((one, batch[one]))

    async with anyio.create_task_group() as running:
        running.start_soon(dispatcher.run)
        await dispatcher.ready.wait()
        while waiting:
            async with anyio.create_task_group() as tasks:
                for _ in range(dispatcher.places + 1):
                    tasks.start_soon(batches)
        running.cancel_scope.cancel()
    return done


def needed(provider: Simulated, places: int) -> int:
    """Return how many calls one would make who knew the provider's limits, but neither its whims nor its bad texts.

    Finding a limit from above takes some calls of each place; finding a bad text takes a call and a word for each half.
    """
    temper = provider.temper
    # Calls are kept short, so that a live change does not wait for long ones.
    largest = max(1, min(provider.largest, int(CALL_S * min(places, 4) / temper.text_s)))
    if temper.most_s < CALL_S * 10:  # and a provider with a time limit takes the longer, the more run beside
        largest = max(1, min(largest, int((temper.most_s - 0.02) / temper.text_s / places)))
    packed, texts, size = 1, 0, 0
    for text in TEXTS:
        if texts + 1 > largest or (texts and size + len(text) > temper.most_bytes):
            packed, texts, size = packed + 1, 0, 0
        texts, size = texts + 1, size + len(text)
    levels = ceil(log2(128 / max(1, min(128, provider.largest)))) + 1 if provider.limited else 0
    halving = 3 * ceil(log2(provider.largest) + 1) + 4 * ATTEMPTS
    return packed + 2 * places * levels + len(temper.bad) * halving + 4 * provider.flakes + provider.in_outages + 6


def check(kind: str, seed: int, concurrency: int = 4, temper: Temper | None = None) -> Simulated:
    """Run one seed and check the properties."""
    provider = Simulated(temper or Temper.of(seed, TEXTS), seed)
    with pytest.MonkeyPatch.context() as patch:
        embedder = embedder_of(kind, provider, patch, concurrency)

        async def main() -> tuple[Made, Dispatcher]:
            dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
            made = await drained(dispatcher)
            await embedder.aclose()
            return made, dispatcher

        made, _ = in_virtual_time(main)
    bad, good = set(provider.temper.bad), [text for text in TEXTS if text not in provider.temper.bad]
    expected = HashEmbedder("h", config.HashEmbedder(dimensions=DIMENSIONS)).vectors(good)
    assert {one.decode() for one in made.failed} == bad, (kind, seed, provider.temper)
    assert {one.decode() for one in made.vectors} == set(good)
    for text, vector in zip(good, expected, strict=True):
        np.testing.assert_allclose(made.vectors[text.encode()], vector, rtol=1e-6)
    for one, error in made.failed.items():
        assert str(error).isprintable()
        assert one.decode() not in str(error)
    assert {text for text, times in provider.embedded.items() if times > 1 and text in good} == set()
    # On Ray an actor takes more than one call at a time.
    assert provider.calls <= 2 * needed(provider, embedder.concurrency)
    return provider


@pytest.mark.proof_from(8)
@pytest.mark.parametrize("seed", range(20))
def test_every_good_text_gets_its_vector_and_every_bad_one_its_reason(seed: int) -> None:
    check(KINDS[seed % len(KINDS)], seed)


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(500))
def test_the_same_over_many_seeds(seed: int) -> None:
    check(KINDS[seed % len(KINDS)], 1_000 + seed, concurrency=(1, 4, 16)[seed % 3])


LIMITS = {
    "texts": Temper(most_texts=7, limited_by="500"),
    "bytes": Temper(most_bytes=1_500, limited_by="cut"),
    "time": Temper(most_s=0.5, text_s=0.01, limited_by="silence"),
    "calls": Temper(most_calls=2, limited_by="500"),
}


@pytest.mark.parametrize("concurrency", [1, 4, 16])
@pytest.mark.parametrize("limit", LIMITS)
def test_calls_become_as_small_and_as_few_as_the_provider_takes(limit: str, concurrency: int) -> None:
    check("openai", concurrency, concurrency, LIMITS[limit])


@pytest.mark.parametrize("limit", ["texts", "bytes"])
def test_a_size_that_works_is_remembered_over_a_restart(limit: str) -> None:
    def limited(state: EmbedderState) -> tuple[EmbedderState, int]:
        provider = Simulated(LIMITS[limit])
        with pytest.MonkeyPatch.context() as patch:
            embedder = embedder_of("openai", provider, patch)

            async def main() -> EmbedderState:
                dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)
                dispatcher.recall(state)
                await drained(dispatcher)
                await embedder.aclose()
                return dispatcher.state

            return in_virtual_time(main), provider.limited

    state, before = limited(EmbedderState())
    _, after = limited(state)
    assert after < before
