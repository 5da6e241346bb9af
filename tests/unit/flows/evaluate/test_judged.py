"""Judged evaluation: measures, intervals that are paired, gates, and what cannot be measured."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
import numpy as np
import pytest

from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.collection import Collection
from cdcsync.flows.evaluate.gates import judge, parse_floor, parse_weights
from cdcsync.flows.evaluate.intervals import difference, figure
from cdcsync.flows.evaluate.judged import document_id, evaluate_judged, parse_measures
from cdcsync.target.judged_runs import Run

pytestmark = pytest.mark.anyio

COLLECTION = Collection("cats", {"q1": "one", "q2": "two"}, {"q1": {"a": 1, "b": 0}, "q2": {"c": 2, "d": 1}})


def answers(of: Mapping[str, Sequence[str]]) -> Callable[[str], Awaitable[Sequence[str]]]:
    async def find(query: str) -> Sequence[str]:
        return of.get(query, ())

    return find


PERFECT = answers({"q1": ["a"], "q2": ["c", "d"]})
HALF = answers({"q1": ["a"]})
SECOND = answers({"q1": ["x", "a"], "q2": ["d", "c"]})


async def run_of(**finders: Callable[[str], Awaitable[Sequence[str]]]) -> Run:
    return await evaluate_judged("pets", 3, COLLECTION, finders, measures=["nDCG@10", "RR", "R@1"])  # type: ignore[arg-type]


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
    with pytest.raises(UsageError, match="no two searches to weigh"):
        await evaluate_judged("pets", 1, COLLECTION, {"text": HALF}, weights=[0.5])


async def test_answers_without_any_judged_document_point_at_the_ids() -> None:
    with pytest.raises(UsageError, match="nothing that searches found is judged in cats") as refused:
        await run_of(text=answers({"q1": ["17"], "q2": ["4"]}))
    assert "keys such as 17, 4, and the judgements name a, b, c" in str(refused.value.hint)


def test_a_document_is_named_by_its_key() -> None:
    assert document_id({"id": 7}) == "7"
    assert document_id({"module": "heapq", "name": "merge"}) == "heapq,merge"


@pytest.mark.parametrize("name", ["nonsense", "nDCG@x", "import os", "P"])
def test_a_measure_that_cannot_be_taken_is_a_wrong_argument(name: str) -> None:
    with pytest.raises(UsageError, match="is not a measure that can be taken") as refused:
        parse_measures([name])
    assert "nDCG@10" in str(refused.value.hint)


# -- intervals ------------------------------------------------------------------------------------------------------


def test_an_interval_holds_the_mean_and_narrows_with_the_number_of_queries() -> None:
    draw = random.Random(7)
    values = [draw.random() for _ in range(800)]
    few, many = figure(values[:20]), figure(values)
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 4
    # For a mean of many values the bootstrap agrees with the normal distribution.
    half = 1.96 * float(np.std(values)) / np.sqrt(len(values))
    assert many.high - many.mean == pytest.approx(half, rel=0.1)
    assert figure(values) == many


def test_a_small_gain_on_every_query_is_seen_through_differences_between_queries() -> None:
    draw = random.Random(7)
    theirs = [draw.random() for _ in range(50)]
    ours = [value + 0.01 + draw.random() / 100 for value in theirs]
    assert figure(ours).low < figure(theirs).high
    assert difference(ours, theirs).low > 0.01


# -- gates ----------------------------------------------------------------------------------------------------------


async def test_a_floor_is_for_the_search_that_the_index_gives_or_for_a_named_mode() -> None:
    run = await run_of(text=HALF, vector=SECOND, hybrid=PERFECT)
    floors = [parse_floor("nDCG@10=1.0"), parse_floor("text nDCG@10 = 0.51"), parse_floor("vector RR=.5")]
    assert [one.passed for one in judge(run, floors, None)] == [True, False, True]
    failed = judge(run, floors, None)[1]
    assert failed.text == "text nDCG@10 is 0.5000, and has to be at least 0.51"
    with pytest.raises(UsageError, match="the index has no reranked search"):
        judge(run, [parse_floor("reranked nDCG@10=0.1")], None)


@pytest.mark.parametrize("text", ["nDCG@10", "nDCG@10=x", "=0.4", "nowhere nDCG@10=0.4", ""])
def test_a_floor_that_cannot_be_read_is_a_wrong_argument(text: str) -> None:
    with pytest.raises(UsageError, match="is not a least value"):
        parse_floor(text)


async def test_a_run_that_is_surely_worse_than_an_earlier_one_fails() -> None:
    many = Collection("many", {str(n): "" for n in range(30)}, {str(n): {"a": 1} for n in range(30)})

    async def run(found: Callable[[int], list[str]]) -> Run:
        async def find(query: str) -> list[str]:
            return found(int(query))

        return await evaluate_judged("pets", 1, many, {"text": find}, measures=["RR"])

    good = await run(lambda n: ["a"])
    same = await run(lambda n: ["a"] if n else ["x", "a"])
    bad = await run(lambda n: ["x", "a"])
    assert [one.passed for one in judge(good, [], good)] == [True]
    assert [one.passed for one in judge(same, [], good)] == [True]
    (verdict,) = judge(bad, [], good)
    assert not verdict.passed
    assert verdict.text.startswith("text RR differs by -0.5000 [-0.5000, -0.5000] from the run of ")
    assert [one.passed for one in judge(good, [], bad)] == [True]
    other = await run_of(text=HALF)
    with pytest.raises(UsageError, match="no RR of these questions"):
        judge(good, [], other)


@pytest.mark.parametrize(
    ("text", "weights"),
    [("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]), ("0:1:0.1", [n / 10 for n in range(11)]), ("0.3:0.3:1", [0.3])],
)
def test_weights_are_a_range_with_both_ends(text: str, weights: list[float]) -> None:
    assert parse_weights(text) == weights


@pytest.mark.parametrize("text", ["", "0:1", "0:2:0.1", "1:0:0.1", "0:1:0", "a:b:c", "0:1:0.001"])
def test_weights_that_are_no_range_are_a_wrong_argument(text: str) -> None:
    with pytest.raises(UsageError, match="is not a range of weights"):
        parse_weights(text)
