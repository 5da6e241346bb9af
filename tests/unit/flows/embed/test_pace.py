"""What is learnt of an embedder's speed: from its calls, from those that failed, and from before a restart."""

from __future__ import annotations

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.embed.pace import MOST_WINDOWS, SKIPPED, SMALL_CALL_TEXTS, WINDOW_TEXTS, Pace
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import EmbedderState


def test_a_rate_counts_the_calls_that_run_beside_each_other_and_is_noted_to_two_digits() -> None:
    pace = Pace(3, 0.5)
    assert (pace.texts_per_s, pace.measured) == (None, False)
    pace.succeeded(100, 700, 0.7)
    assert (pace.texts_per_s, pace.measured) == (430.0, True)


def test_the_rate_of_before_a_restart_is_kept_and_used_until_a_call_tells_another() -> None:
    dispatcher = Dispatcher(HashEmbedder("hash", config.HashEmbedder(dimensions=3)), Metrics(), lambda: 0.0)
    dispatcher.recall(EmbedderState(texts_per_s=2_000.0))
    assert dispatcher.state.texts_per_s == 2_000.0
    assert dispatcher.pace.window_texts == 2_000
    assert not dispatcher.pace.measured

    dispatcher.pace.succeeded(10, 50, 0.1)
    assert dispatcher.state.texts_per_s == 100.0


def test_a_window_has_texts_for_every_call_and_no_more_than_memory_allows() -> None:
    assert Pace(4, 0.5).window_texts == 4 * WINDOW_TEXTS
    assert Pace(1_000, 0.5).window_texts == MOST_WINDOWS * WINDOW_TEXTS


def test_small_calls_are_judged_by_small_calls_and_tried_again_after_some_that_were_skipped() -> None:
    pace = Pace(1, 0.5)
    pace.succeeded(SMALL_CALL_TEXTS + 1, 500, 100.0)
    assert pace.fits(1, 0.001), "a large call says nothing of small ones"
    pace.succeeded(1, 5, 1.0)
    skipped = 0
    while not pace.fits(1, 0.5):
        skipped += 1
    assert SKIPPED**skipped <= 0.5 < SKIPPED ** (skipped - 1)


def test_an_embedder_that_hangs_before_it_fails_counts_as_slow() -> None:
    pace = Pace(1, 0.5)
    pace.succeeded(10, 50, 0.1)
    pace.failed(1, 60.0)
    assert pace.seconds_per_text == 60.0
    pace.failed(10, 0.001)
    assert pace.seconds_per_text == 60.0
