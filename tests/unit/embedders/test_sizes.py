"""Sizes of calls: they shrink on failures, recover, and only the suspects shrink."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.embedders.sizes import CallSizes, Limit
from cdcsync.model.embedding import Learnt


def send(sizes: CallSizes, rows: int, works: Callable[[int, int], bool], *, size: int = 100) -> tuple[int, int]:
    """Send so many rows as large as is allowed; returns the calls that worked and those that failed."""
    good = bad = 0
    while rows > 0:
        texts = min(rows, sizes.texts, max(1, sizes.bytes // size))
        if works(texts, texts * size) or texts == 1:
            sizes.works(texts, texts * size, 1)
            rows -= texts
            good += 1
        else:
            sizes.fails(texts, texts * size)
            bad += 1
    return good, bad


@pytest.mark.parametrize("most", [1, 7, 32, 500])
def test_calls_of_a_provider_that_takes_few_texts_are_seldom_refused(most: int) -> None:
    sizes = CallSizes(1)
    send(sizes, 2_000, lambda texts, _: texts <= most)
    good, bad = send(sizes, 200 * most, lambda texts, _: texts <= most)
    assert good + bad <= 2 * 200
    assert bad <= good / 8


def test_a_limit_of_bytes_is_learnt_without_a_lasting_limit_of_texts() -> None:
    sizes = CallSizes(1)
    send(sizes, 2_000, lambda _, size: size <= 5_000)
    assert sizes.bytes <= 2 * 5_000
    send(sizes, 100_000, lambda _, __: True, size=1)
    assert sizes.texts > 50


def test_a_limit_that_goes_away_is_forgotten() -> None:
    sizes = CallSizes(1)
    send(sizes, 2_000, lambda texts, _: texts <= 4)
    assert sizes.learnt != Learnt()
    send(sizes, 200_000, lambda _, __: True)
    assert sizes.texts == CallSizes.MOST_TEXTS


def test_what_worked_lately_is_not_suspected() -> None:
    sizes = CallSizes(4)
    sizes.works(5, 100, 1)
    sizes.fails(3, 9_000)
    assert (sizes.texts, sizes.bytes, sizes.calls) == (10_000, 4_500, 4)


def test_a_first_failure_of_sizes_that_work_is_an_accident_and_the_next_is_not() -> None:
    sizes = CallSizes(1)
    sizes.works(8, 800, 1)
    sizes.fails(8, 800)
    assert sizes.learnt == Learnt()
    sizes.fails(8, 800)
    assert (sizes.texts, sizes.bytes) == (4, 400)


def test_calls_at_a_time_are_limited_too() -> None:
    sizes = CallSizes(8)
    sizes.crowded(8)
    assert sizes.calls == 4


def test_sizes_survive_a_restart_and_never_pass_the_configuration() -> None:
    sizes = CallSizes(8, Learnt(texts=12.0, bytes=3_000.0, calls=99.0))
    assert (sizes.texts, sizes.bytes, sizes.calls) == (12, 3_000, 8)
    assert sizes.learnt == Learnt(12.0, 3_000.0, None)


def test_an_earlier_limit_is_restored_if_a_text_was_at_fault() -> None:
    sizes = CallSizes(2)
    before = sizes.learnt
    sizes.fails(10, 1_000)
    assert sizes.learnt != before
    sizes.restore(before)
    assert sizes.learnt == before


def test_a_limit_never_falls_below_one() -> None:
    limit = Limit(100.0)
    for _ in range(20):
        limit.fails(limit.now)
    assert limit.now == 1.0
