"""A small judged collection, and searches of known quality over it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from cdcsync.flows.evaluate.collection import Collection
from cdcsync.flows.evaluate.judged import evaluate_judged
from cdcsync.target.judged_runs import Run

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
