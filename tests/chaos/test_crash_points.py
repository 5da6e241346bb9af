"""Crash points: every place that commits or acknowledges has one, and an armed one kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter

from cdcsync.crashpoints import VARIABLE
from tests.chaos import commits


def test_every_place_that_commits_or_acknowledges_has_a_crash_point() -> None:
    lacking = [
        f"{one.file}:{one.line} {one.function}: {one.what} lacks {one.lacks}"
        for one in commits.lacking(commits.sources())
    ]

    assert not lacking, "\n".join(lacking)


def test_no_two_crash_points_have_the_same_name() -> None:
    assert [name for name, times in Counter(commits.points()).items() if times > 1] == []


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


def _run(order: str | None) -> int:
    program = """
from cdcsync.crashpoints import crash_point
for turn in range(3):
    crash_point("another")
    crash_point("this")
"""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if order is not None:
        environment[VARIABLE] = order
    return subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode


def test_an_armed_crash_point_kills_the_process_when_it_is_reached() -> None:
    assert _run("this") == -signal.SIGKILL
    assert _run("this#3") == -signal.SIGKILL


def test_a_crash_point_that_is_not_armed_or_not_reached_does_nothing() -> None:
    assert _run(None) == 0
    assert _run("this#4") == 0
    assert _run("a third") == 0
