"""Gates on the comparison of two generations."""

from __future__ import annotations

import pytest

from cdcsync.errors import UsageError
from cdcsync.flows.migrate.compare import Quality, parse_floors

QUALITY = Quality(k=10, queries=5, recall={1: 0.99, 2: None, 3: 0.9}, overlap=0.8)


def test_recall_and_overlap_have_gates_of_their_own_and_the_rest_is_for_judged_questions() -> None:
    own, others = parse_floors(["recall = 0.95", "nDCG@10=0.4", "overlap=0", "text nDCG@10=0.3"])
    assert own == {"recall": 0.95, "overlap": 0.0}
    assert others == ["nDCG@10=0.4", "text nDCG@10=0.3"]


@pytest.mark.parametrize("text", ["recall=1.5", "overlap=-0.1", "recall=much", "recall", "recall=nan"])
def test_a_least_value_is_a_share(text: str) -> None:
    with pytest.raises(UsageError, match="is not a minimum") as refused:
        parse_floors([text])
    assert refused.value.where == "--min"


@pytest.mark.parametrize(
    ("generation", "least", "passed"), [(1, 0.99, True), (1, 0.995, False), (3, 0.9, True), (2, 0.0, False)]
)
def test_a_gate_asks_for_the_recall_of_the_generation_that_would_become_live(
    generation: int, least: float, passed: bool
) -> None:
    (verdict,) = QUALITY.judge(generation, {"recall": least})
    assert verdict.passed is passed


def test_what_could_not_be_measured_does_not_pass() -> None:
    verdicts = Quality(10, 0, {}, None).judge(2, {"recall": 0.0, "overlap": 0.0})
    assert [one.passed for one in verdicts] == [False, False]
    assert all("could not be measured" in one.text for one in verdicts)
