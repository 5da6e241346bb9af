"""What a verification on a schedule tells."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cdcsync.flows.audit.comparison import FAILED
from cdcsync.flows.audit.rolling import report
from cdcsync.flows.audit.verification import Verification
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
