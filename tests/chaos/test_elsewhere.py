"""Deaths at crash points that no history comes to are counted, and a point without one fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcsync.process import crashpoints
from tests.chaos import elsewhere
from tests.chaos.scenes import ELSEWHERE
from tests.support.kills import Killed, kill_at


def test_what_dies_at_a_point_notes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setenv(crashpoints.NOTES, str(notes))
    monkeypatch.setattr("os.kill", lambda pid, number: None)
    armed = crashpoints._armed("slot created#2")
    for _ in range(3):
        armed("slot created")
    kill_at(monkeypatch, crashpoints, "slot dropped")
    with pytest.raises(Killed):
        crashpoints.crash_point("slot dropped")

    assert elsewhere.counted(notes.read_text()) == {"slot created": 1, "slot dropped": 1}


def test_a_point_at_which_nothing_died_is_told() -> None:
    wanted = {"slot created": "tests/a.py", "slot dropped": "tests/b.py"}

    assert elsewhere.never({"slot dropped": 2}, wanted) == ["slot created"]


def test_each_test_that_kills_at_such_a_point_is_run() -> None:
    found = elsewhere.killers()

    assert {one.partition("::")[0] for one in found} == set(ELSEWHERE.values())
    assert all("::test_" in one for one in found)


def test_at_every_such_point_something_died_in_the_run_on_record() -> None:
    assert elsewhere.never(elsewhere.recorded().at) == [], "run: make kills ARGS=--record"
