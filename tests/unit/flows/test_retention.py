"""A slot: how much it holds of what it may, and when that is worth a word."""

from __future__ import annotations

import pytest

from cdcsync.flows.retention import Retention, retained_share
from cdcsync.metrics import Metrics
from cdcsync.source.catalog import Slot


def slot(wal_status: str, retained_bytes: int | None, safe_bytes: int | None) -> Slot:
    return Slot("s", "pgoutput", "d", None, None, None, wal_status, retained_bytes, safe_bytes)


@pytest.mark.parametrize(
    ("facts", "share"),
    [
        (("reserved", 0, 100), 0.0),
        (("reserved", 25, 75), 0.25),
        (("extended", 80, 20), 0.8),
        (("unreserved", 110, -10), 1.1),
        (("unreserved", 50, -60), 1.0),
        (("lost", None, None), 1.0),
        (("reserved", 10**12, None), 0.0),  # without a limit
    ],
)
def test_the_share_is_of_what_the_slot_may_hold(facts: tuple[str, int | None, int | None], share: float) -> None:
    assert retained_share(slot(*facts)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("shares", "crossings"),
    [
        ([0.1, 0.49, 0.5, 0.6, 0.79], [None, None, 0.5, None, None]),
        ([0.5, 0.8, 0.9, 1.0], [0.5, 0.8, None, None]),
        ([0.2, 0.95, 0.95], [None, 0.8, None]),  # one word for both
        ([0.5, 0.48, 0.51, 0.49], [0.5, None, None, None]),  # by a segment to and fro
        ([0.5, 0.1, 0.5], [0.5, None, 0.5]),
        ([0.9, 0.6, 0.9, 0.1, 0.9], [0.8, None, 0.8, None, 0.8]),
    ],
)
def test_each_crossing_is_told_once(shares: list[float], crossings: list[float | None]) -> None:
    retention = Retention(Metrics())
    assert [retention.crossed(share) for share in shares] == crossings
