"""Requests that are made from the API's own description, right and wrong ones: each answer is one that it describes."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("ignore")]

EXAMPLES = 25
"""Requests for each operation: some 2 s."""


def test_every_answer_is_one_that_the_description_names(served_address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{served_address}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) == 4
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        def answered(case: Any) -> None:
            # A filter of the right form may still name no column; the description cannot know.
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

        answered()
