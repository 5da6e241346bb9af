"""The tables of `cdcsync evaluate`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from cdcsync.cli.figures import print_answers, print_gathered, print_recall
from cdcsync.flows.evaluate.audited import Gathered
from cdcsync.flows.evaluate.gates import Verdict
from cdcsync.target.evaluations import Evaluation, Measured
from cdcsync.target.judged_runs import Figure, ModeRun, Run, Weighed

AT = datetime(2026, 1, 2, tzinfo=UTC)
BY_HNSW = Measured(40, 0.9876, True, True, 1.5, 2.5, settled_recall=0.9, settled_mean_ms=1.2)
EVALUATION = Evaluation("docs", 2, 10, 200, 5.0, 6.0, [BY_HNSW], AT)


def figure(mean: float, half: float = 0.02) -> Figure:
    return Figure(mean, mean - half, mean + half)


RUN = Run(
    "docs",
    1,
    "collection",
    76,
    ["nDCG@10", "R@100"],
    {},
    {
        "vector": ModeRun({"nDCG@10": figure(0.4), "R@100": figure(0.6)}, None, 3.0, 4.0, {}),
        "hybrid": ModeRun(
            {"nDCG@10": figure(0.45), "R@100": figure(0.7)}, {"nDCG@10": figure(0.05, 0.01)}, 5.0, 6.0, {}
        ),
    },
    [Weighed(0.3, {"nDCG@10": figure(0.44)}), Weighed(0.5, {"nDCG@10": figure(0.46)})],
    AT,
)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_recall_is_told_by_ef_search_beside_the_exact_search(capsys: pytest.CaptureFixture[str]) -> None:
    print_recall(EVALUATION, "tenant = 1", None)
    printed = " ".join(capsys.readouterr().out.split())
    assert "docs, generation 2: the 10 nearest where tenant = 1 of 200 stored vectors" in printed
    assert "40 0.9876 1.50 2.50 HNSW" in printed
    assert "40 settled alone 0.9000 1.20 HNSW" in printed
    assert "exact 1.0000 5.00 6.00 whole table" in printed
    assert "the planner found it cheaper" not in printed
    assert "zeros" not in printed
    print_recall(msgspec.structs.replace(EVALUATION, undirected=2), None, None)
    assert "2 vectors are all zeros" in " ".join(capsys.readouterr().out.split())


def test_a_search_that_read_the_whole_table_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    whole = msgspec.structs.replace(BY_HNSW, by_hnsw=False, settled_recall=None)
    print_recall(msgspec.structs.replace(EVALUATION, queries=1, measured=[whole]), None, "the role may not write")
    printed = " ".join(capsys.readouterr().out.split())
    assert "of 1 stored vector" in printed
    assert "the planner found it cheaper" in printed
    assert "not stored: the role may not write" in printed


def test_judged_modes_have_intervals_and_their_gain_over_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    print_answers(RUN, 7, None, [Verdict(True, "hybrid is not worse"), Verdict(False, "text is below 0.5")])
    printed = " ".join(capsys.readouterr().out.split())
    assert "76 judged questions of collection" in printed
    assert "vector 0.4000 ±0.020 0.6000 3.0" in printed
    assert "hybrid 0.4500 ±0.020 +0.0500 ±0.010 0.7000 5.0" in printed
    assert "0.3 0.4400 ±0.020 0.5 0.4600 ±0.020 best" in printed
    assert "✓ hybrid is not worse" in printed
    assert "✗ text is below 0.5" in printed
    assert printed.endswith("stored as run 7")


def test_figures_of_too_few_questions_have_no_interval_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    few = Figure(0.4, None, None)
    mode = ModeRun(dict.fromkeys(("nDCG@10", "R@100"), few), {"nDCG@10": few}, 3.0, 4.0, {})
    print_answers(
        msgspec.structs.replace(RUN, modes={"text": mode}, weights=[Weighed(0.3, {"nDCG@10": few})]), 7, None, []
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "text 0.4000 +0.4000 0.4000 3.0 too few questions to tell what is chance: an interval of 95 % takes 6"
        in printed
    )
    assert "±" not in printed


@pytest.mark.parametrize(("ungraded", "asked"), [(0, False), (3, True)])
def test_whoever_gathers_questions_is_told_to_grade_what_is_not(
    ungraded: int, asked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_gathered(Gathered(Path("set"), 4, 10, ungraded))
    printed = capsys.readouterr().out
    assert f"set: 4 questions, {10 + ungraded} answers, 10 graded" in printed
    assert ("Set grade to" in printed) == asked
