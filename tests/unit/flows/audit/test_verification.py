"""What a verification on a schedule tells."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cdcsync.flows.audit.comparison import FAILED
from cdcsync.flows.audit.rolling import report
from cdcsync.flows.audit.verification import Verification, as_a_whole
from cdcsync.metrics import Metrics


@pytest.mark.parametrize(
    ("differences", "orphaned", "expected"), [({}, 0, 0.0), ({FAILED: 4}, 0, 0.0), ({FAILED: 4, "stale": 2}, 1, 3.0)]
)
def test_rows_that_no_document_could_be_made_of_are_no_difference_to_be_called_for(
    differences: dict[str, int], orphaned: int, expected: float
) -> None:
    metrics = Metrics()
    found = Verification(
        index="articles",
        equal=not differences,
        documents=9,
        candidates=5,
        differences=differences,
        examples={},
        undecided=0,
        waiting=0,
        vectors_orphaned=orphaned,
        seconds=1.0,
        finished_at=datetime.now(UTC),
    )

    report(found, metrics)

    assert metrics.registry.get_sample_value("cdcsync_verify_differences", {"index": "articles"}) == expected


@pytest.mark.parametrize(
    ("differing", "looked", "estimate", "whole"),
    [
        (4_999, 4_999, 0, False),  # few keys cost less than a table
        (5_000, 5_000, 0, True),
        (5_000, 10_001, 0, False),  # less than half
        (5_000, 5_000, 60_000, False),  # the rest may be equal
        (6_000, 6_000, 60_000, True),
        (50_000, 50_000, 10**9, True),  # no more keys than these are kept in memory
    ],
)
def test_a_table_is_read_as_a_whole_once_much_of_it_was_looked_at_and_half_of_that_differs(
    differing: int, looked: int, estimate: int, whole: bool
) -> None:
    assert as_a_whole(differing, looked, estimate) is whole
