"""Gates: floors, comparisons with an earlier run, and arguments that cannot be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.collection import Collection
from cdcsync.flows.evaluate.gates import judge, parse_floor, parse_run, parse_weights
from cdcsync.flows.evaluate.judged import evaluate_judged
from cdcsync.target.judged_runs import Run
from tests.support.judging import HALF, PERFECT, SECOND, run_of

pytestmark = pytest.mark.anyio


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
    with pytest.raises(UsageError, match="is not a minimum"):
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
    ("questions", "worse", "passed"),
    [
        *((few, few, True) for few in range(1, 6)),  # all in the same direction, which chance does once in 16 times
        (6, 6, False),
        *((100, few, True) for few in range(6)),  # questions that do not change tell nothing, however many they are
        (100, 7, False),
    ],
)
async def test_a_run_fails_by_no_fewer_worse_answers_than_chance_would_explain(
    questions: int, worse: int, passed: bool
) -> None:
    ids = [str(number) for number in range(questions)]
    collection = Collection("some", dict.fromkeys(ids, ""), {id_: {"a": 1} for id_ in ids})

    async def first(query: str) -> list[str]:
        return ["a"]

    async def second(query: str) -> list[str]:
        return ["x", "a"] if int(query) < worse else ["a"]

    then, now = [
        await evaluate_judged("pets", 1, collection, {"text": find}, measures=["RR"]) for find in (first, second)
    ]
    (verdict,) = judge(now, [], then)
    assert verdict.passed is passed
    assert ("too few questions to tell" in verdict.text) == (questions < 6)


@pytest.mark.parametrize(
    ("text", "weights"),
    [("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]), ("0:1:0.1", [n / 10 for n in range(11)]), ("0.3:0.3:1", [0.3])],
)
def test_weights_are_a_range_with_both_ends(text: str, weights: list[float]) -> None:
    assert parse_weights(text) == weights


@pytest.mark.parametrize("text", ["", "0:1", "0:2:0.1", "1:0:0.1", "0:1:0", "a:b:c", "0:1:0.001", "0:1:1e999"])
def test_weights_that_are_no_range_are_a_wrong_argument(text: str) -> None:
    with pytest.raises(UsageError, match="is not a range of weights"):
        parse_weights(text)


def test_an_earlier_run_is_the_last_one_or_a_number() -> None:
    assert (parse_run(None), parse_run("LAST"), parse_run("17")) == (None, None, 17)
    with pytest.raises(UsageError, match="'-3' is not a run"):
        parse_run("-3")


@pytest.mark.parametrize("text", ["9999999999999999999", "9" * 5000])
def test_a_number_that_no_run_can_have_is_that_of_no_run(text: str) -> None:
    with pytest.raises(UsageError, match="there is no run 999999999999999999…"):
        parse_run(text)
