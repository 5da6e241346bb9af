"""What a bench prints of its ratios."""

from __future__ import annotations

import json

import pytest

from bench.report import FIXED, not_run, of_goal, report


def test_the_last_line_says_what_each_ratio_is_against(capsys: pytest.CaptureFixture[str]) -> None:
    report("drain", {"s": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}, {"a": FIXED, "b": "psycopg2, same run"})

    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["against"] == {"a": "a fixed goal", "b": "psycopg2, same run"}
    assert said["smaller"] == {}


def test_one_side_may_be_that_of_all_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    report("decode", {}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}, FIXED)

    assert json.loads(capsys.readouterr().out.splitlines()[-1])["against"] == {"a": FIXED, "b": FIXED}


@pytest.mark.parametrize("against", ["", {}, {"a": ""}, {"a": FIXED, "b": FIXED}])
def test_a_ratio_without_its_other_side_is_refused(against: str | dict[str, str]) -> None:
    with pytest.raises(ValueError, match="lacks its goal or what it is against"):
        report("decode", {}, {"a": 1.0}, {"a": 1.0}, against)


def test_a_run_below_the_goals_size_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {"a": of_goal(100_000, 1_000_000, "rows"), "b": of_goal(3, 3, "rounds")}
    report("scale", {}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}, FIXED, smaller)

    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["smaller"] == {"a": "100,000 of 1,000,000 rows"}
    assert lines[1].endswith("met; 100,000 of 1,000,000 rows")
    assert lines[2].endswith("missed")


def test_a_bench_that_cannot_measure_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    not_run("gpu", "there is no accelerator")

    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "bench": "gpu",
        "not_run": "there is no accelerator",
    }


def test_a_run_that_cannot_tell_gives_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    report("writes", {}, {"a": 0.98}, {"a": 0.97}, FIXED, undecided={"a": "between 0.91 and 1.05"})

    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("undecided, between 0.91 and 1.05")
    assert json.loads(last)["undecided"] == {"a": "between 0.91 and 1.05"}


def test_notes_are_said_of_the_ratios_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    report("native", {}, {"plain_text": 0.2}, {"plain_text": 0.6}, FIXED, notes={"plain": "why", "large": "why else"})

    assert json.loads(capsys.readouterr().out.splitlines()[-1])["notes"] == {"plain": "why"}


def test_no_verdict_is_withheld_of_a_ratio_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="lacks its goal"):
        report("writes", {}, {"a": 1.0}, {"a": 1.0}, FIXED, undecided={"b": "between 0.91 and 1.05"})
