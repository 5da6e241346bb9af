"""Vectors that a search can find, as pgvector computes with them."""

from __future__ import annotations

import numpy as np
import pytest

from cdcsync.model.vectors import FloatVector, unusable, unusable_rows


def vector(*components: float) -> FloatVector:
    return np.array(components, np.float32)


@pytest.mark.parametrize(
    ("components", "stored", "distance", "fault"),
    [
        ((1.0, 0.5), "vector", "cosine", None),
        ((float("nan"), 1.0), "vector", "l2", "not numbers"),
        ((float("inf"), 1.0), "vector", "l2", "infinite"),
        ((0.0, 0.0), "vector", "inner_product", "all zeros"),
        ((65_504.0, 1.0), "halfvec", "l2", None),
        ((70_000.0, 1.0), "halfvec", "l2", "largest number of a halfvec"),
        ((70_000.0, 1.0), "vector", "l2", None),
        ((1e-9, -1e-9), "halfvec", "l2", "all zeros once it is stored as halfvec"),
        ((1e-9, -1e-9), "vector", "cosine", None),
        ((1e-30, 1e-30), "vector", "cosine", "so short"),
        ((1e-30, 1e-30), "vector", "l2", None),
        ((1e20, 1.0), "vector", "l2", "overflows"),
    ],
)
def test_what_is_checked_is_what_will_be_stored_and_compared(
    components: tuple[float, ...], stored: str, distance: str, fault: str | None
) -> None:
    found = unusable(vector(*components), stored, distance)  # type: ignore[arg-type]
    assert found is None if fault is None else fault in (found or "")


def test_the_rows_at_fault_are_found_among_many() -> None:
    rows = np.ones((100, 4), np.float32)
    rows[7, 2] = np.nan
    rows[99] = 0
    rows[50] = 1e-20  # fine for some distances
    assert set(unusable_rows(rows)) == {7, 99}
