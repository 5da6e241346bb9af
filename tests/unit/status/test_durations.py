"""Sizes and durations, at the borders of their units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.status.durations import human_bytes, human_seconds


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 kB"),
        (10 * 1024, "10 kB"),
        (999 * 1024, "999 kB"),
        (1000 * 1024, "1.0 MB"),
        (3 * 1024**4, "3.0 TB"),
        (2**63, "8192 PB"),
        (5 * 1024**3, "5.0 GB"),
        (2**60, "1024 PB"),
    ],
)
def test_a_size_is_told_in_the_largest_unit_that_fits(count: int, words: str) -> None:
    assert human_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.0001, "1 ms"),
        (0.009, "9 ms"),
        (0.4, "0.4 s"),
        (12, "12 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (99 * 3600, "4 d 3 h"),
        (0.094, "94 ms"),
        (0.44, "0.4 s"),
        (59.4, "59 s"),
        (47 * 3600, "47 h 0 min"),
    ],
)
def test_a_duration_is_told_by_its_two_largest_units(seconds: float, words: str) -> None:
    assert human_seconds(seconds) == words


@given(seconds=st.floats(0, 1e9))
def test_no_unit_is_as_large_as_the_next(seconds: float) -> None:
    most = {"ms": 999, "s": 59, "min": 59, "h": 47, "d": 10**9}
    numbers = human_seconds(seconds).split()
    assert all(float(number) <= most[unit] for number, unit in zip(numbers[::2], numbers[1::2], strict=True))
