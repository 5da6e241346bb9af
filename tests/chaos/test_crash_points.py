"""Crash points: every place that commits or acknowledges has one, and an armed one kills."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import ROOT
from tests.chaos import commits
from tests.chaos.scenes import ELSEWHERE, SCENES


def test_every_place_that_commits_or_acknowledges_has_a_crash_point() -> None:
    lacking = [
        f"{one.file}:{one.line} {one.function}: {one.what} lacks {one.lacks}"
        for one in commits.lacking(commits.sources())
    ]

    assert not lacking, "\n".join(lacking)


def test_no_two_crash_points_have_the_same_name() -> None:
    assert [name for name, times in Counter(commits.points()).items() if times > 1] == []


def test_a_point_that_no_history_comes_to_is_one_that_a_test_kills_at() -> None:
    assert set(ELSEWHERE) <= set(commits.points())
    assert not ELSEWHERE.keys() & SCENES.keys()
    for point, file in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        module = file.rpartition("test_")[2].removesuffix(".py")
        # By its name, or with all the points of the module that it tests.
        assert point in text or f"points({module})" in text, (point, file)


@pytest.mark.proof
def test_a_crash_point_that_is_taken_away_is_missed() -> None:
    files = commits.sources()
    unnoticed = []
    for name, text in files.items():
        lines = text.splitlines(keepends=True)
        for place, line in enumerate(lines):
            if line.strip().startswith("crash_point("):
                without = "".join([*lines[:place], line.replace("crash_point(", "print("), *lines[place + 1 :]])
                if not commits.lacking({**files, name: without}, only=name):
                    unnoticed.append(f"{name}: {line.strip()}")

    assert unnoticed == []
