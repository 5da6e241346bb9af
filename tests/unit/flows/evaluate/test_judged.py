"""Judged evaluation: measures, intervals that are paired, gates, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from shutil import which
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest
from ir_measures.measures import registry

from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.collection import Collection
from cdcsync.flows.evaluate.judged import document_id, evaluate_judged, parse_measures
from cdcsync.target.judged_runs import Run
from tests.support.judging import COLLECTION, HALF, PERFECT, SECOND, answers, run_of

pytestmark = pytest.mark.anyio


async def test_each_mode_is_measured_and_compared_with_vectors() -> None:
    run = await run_of(text=HALF, vector=SECOND, hybrid=PERFECT)
    assert (run.index, run.generation, run.collection, run.queries) == ("pets", 3, "cats", 2)
    assert list(run.modes) == ["text", "vector", "hybrid"]
    assert run.own_mode == "hybrid"
    text, vector, hybrid = run.modes.values()
    assert hybrid.figures["nDCG@10"].mean == hybrid.figures["RR"].mean == 1
    assert hybrid.figures["R@1"].mean == 0.75
    # By hand: 1/log2(3) for q1; (1 + 2/log2(3)) / (2 + 1/log2(3)) for q2, with grades as gains.
    expected = (1 / np.log2(3) + (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))) / 2
    assert vector.figures["nDCG@10"].mean == pytest.approx(expected, abs=1e-4)
    assert vector.over_vector is None
    assert text.scores["nDCG@10"] == {"q1": 1.0, "q2": 0.0}
    assert text.over_vector is not None
    assert text.over_vector["RR"].mean == pytest.approx(0.5 - 0.75, abs=1e-4)
    assert msgspec.convert(msgspec.to_builtins(run), Run) == run


async def test_weights_fuse_the_ranks_of_both_legs() -> None:
    ranks = {"text": answers({"q1": ["x", "y", "a"]}), "vector": answers({"q1": ["z", "a"], "q2": ["c"]})}
    run = await evaluate_judged("pets", 1, COLLECTION, ranks, measures=["RR"], weights=[0, 0.5, 1])  # type: ignore[arg-type]
    # By vectors alone a is second and c first; both legs agree on a, which makes it first; by words alone it is third.
    assert [(one.weight, one.figures["RR"].mean) for one in run.weights] == [(0, 0.75), (0.5, 1), (1, 0.1667)]
    with pytest.raises(UsageError, match="not two searches to weigh"):
        await evaluate_judged("pets", 1, COLLECTION, {"text": HALF}, weights=[0.5])


async def test_answers_without_any_judged_document_point_at_the_ids() -> None:
    with pytest.raises(UsageError, match="nothing that searches found is judged in cats") as refused:
        await run_of(text=answers({"q1": ["17"], "q2": ["4"]}))
    assert "keys such as 17, 4, and the judgements name a, b, c" in str(refused.value.hint)


def test_a_document_is_named_by_its_key() -> None:
    assert document_id({"id": 7}) == "7"
    assert document_id({"module": "heapq", "name": "merge"}) == "heapq,merge"
    key = {
        "a": True,
        "b": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "c": Decimal("1.50"),
        "d": UUID(int=10),
        "e": ["ü", None],
    }
    assert document_id(key) == 'true,2026-01-02T03:04:05Z,1.50,00000000-0000-0000-0000-00000000000a,["ü",null]'


@pytest.mark.skipif(which("perl") is None, reason="a program that ir-measures calls for this measure is in Perl")
async def test_a_measure_of_another_program_takes_any_ids_and_says_which_grades_it_cannot_take() -> None:
    run = await evaluate_judged("pets", 1, COLLECTION, {"text": PERFECT}, measures=["ERR@10", "RR"])
    assert run.modes["text"].scores["ERR@10"] == {"q1": 0.0625, "q2": pytest.approx(0.2129, abs=1e-3)}
    assert run.modes["text"].scores["RR"] == {"q1": 1, "q2": 1}
    high = Collection("cats", {"q1": "one"}, {"q1": {"a": 5}})
    with pytest.raises(UsageError, match="ERR@10 cannot be taken from the answers and grades of cats"):
        await evaluate_judged("pets", 1, high, {"text": PERFECT}, measures=["ERR@10"])


def measures_that_can_be_taken() -> list[str]:
    """Return every measure that ir-measures offers here, with a cutoff and without."""
    found = []
    for name in (f"{name}{cutoff}" for name in sorted(registry) for cutoff in ("", "@10")):
        with suppress(UsageError):
            found.append(str(parse_measures([name])[0]))
    return list(dict.fromkeys(found))


OF_JUDGEMENTS = {"NumQ": 1, "NumRel": 2}
"""Measures that do not look at what was found, of a question with two answers."""


@pytest.mark.parametrize("name", measures_that_can_be_taken())
async def test_a_mode_that_finds_nothing_asks_no_provider(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytrec-eval now and then says 0 of all questions, the judgements' measures too, if every ranking is empty.
    measure = parse_measures([name])[0]
    asked = []
    calculate = type(measure).iter_calc

    def iter_calc(of: Any, judged: Any, ranked: dict[str, dict[str, float]]) -> Iterator[Any]:
        asked.append(ranked)
        return calculate(of, judged, ranked)

    monkeypatch.setattr(type(measure), "iter_calc", iter_calc)
    found = answers({"q1": ["a", "x", "y"]})
    await evaluate_judged("pets", 1, COLLECTION, {"text": answers({}), "vector": found}, measures=[name])
    assert asked
    assert all(all(ranked.values()) for ranked in asked)


@pytest.mark.parametrize("name", measures_that_can_be_taken())
async def test_a_question_for_which_nothing_is_found_scores_zero_by_each_measure(name: str) -> None:
    # `Accuracy` divides by the number of wrong documents.
    some = answers({"q1": ["a", "x", "y"]})
    run = await evaluate_judged("pets", 1, COLLECTION, {"text": answers({}), "vector": some}, measures=[name])
    expected = OF_JUDGEMENTS.get(name.partition("@")[0], 0)
    assert {mode: run.modes[mode].scores[name]["q2"] for mode in run.modes} == {"text": expected, "vector": expected}
    assert run.modes["vector"].scores[name]["q1"] > 0


async def test_a_provider_that_fails_names_its_measure() -> None:
    with pytest.raises(UsageError, match=r"Accuracy@10 cannot be taken .*: ir-measures fails with ZeroDiv"):
        await evaluate_judged("pets", 1, COLLECTION, {"text": PERFECT}, measures=["RR", "Accuracy@10"])


@pytest.mark.parametrize(
    "name",
    [
        *("nonsense", "nDCG@x", "import os", "P"),
        *("P@0", "nDCG@-1", "P@1.5", "P@x", "P@'x'"),
        "R(rel=99999999999999999999)@10",
    ],
)
def test_a_measure_that_cannot_be_taken_is_a_wrong_argument(name: str) -> None:
    with pytest.raises(UsageError, match="is not a measure that can be taken") as refused:
        parse_measures([name])
    assert "nDCG@10" in str(refused.value.hint)


@pytest.mark.parametrize("name", ["P@101", "R(rel=2)@1000", "R@99999999999999999999", "nDCG@99999999999999999999"])
def test_a_measure_that_looks_deeper_than_searches_is_a_wrong_argument(name: str) -> None:
    with pytest.raises(UsageError, match="documents, and searches return 100") as refused:
        parse_measures(["RR@100", name])
    assert f"give {name.partition('@')[0]}@100" in str(refused.value.hint)
