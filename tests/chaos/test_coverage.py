"""What a campaign came to can be told of the histories that ended, however it ended itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.chaos.campaign import main
from tests.chaos.coverage import (
    TABLE,
    Outcome,
    Record,
    beside,
    commit,
    note,
    read,
    record,
    recorded,
    report,
    write_table,
)

KILLED = Outcome(3, 7.0, ["batch committed", "kill -9", "kill -9"], {"kill -9": 2}, {"batch committed"}, 50)
CUT = Outcome(4, 5.0, ["slot created", "target unreachable"], {"target unreachable": 1}, set(), 20, "Broken: lost")
FAULTS, POINTS = ("kill -9", "target unreachable", "column added"), ("batch committed", "slot created")


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """The directory of a campaign in which three histories ended, two of them of one seed."""
    for outcome in (msgspec.structs.replace(KILLED, problem="Broken: at first"), CUT, KILLED):
        note(tmp_path, outcome)
    return tmp_path


def test_the_last_outcome_of_each_seed_counts(campaign: Path) -> None:
    assert read(campaign) == [KILLED, CUT]
    assert read(campaign, [4, 5]) == [CUT]


def test_of_a_campaign_in_which_no_history_ended_there_is_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == []


def test_failures_are_those_of_histories_and_of_a_whole_campaign_what_never_came(
    campaign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(read(campaign), FAULTS, POINTS) == ["seed 4: Broken: lost"]
    assert report(read(campaign), FAULTS, POINTS, whole=True) == [
        "seed 4: Broken: lost",
        "never fired: column added",
        "never hit: slot created",
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["kill", "-9", "2", "2"] in lines
    assert ["slot", "created", "1", "0"] in lines


def test_the_table_counts_histories_that_hit_a_point_beside_a_fault(campaign: Path) -> None:
    outcomes = read(campaign)
    assert beside(outcomes) == {("batch committed", "kill -9"): 1}
    write_table(campaign, outcomes, FAULTS, POINTS)
    assert (campaign / TABLE).read_text().splitlines() == [
        "crash point\tcolumn added\tkill -9\ttarget unreachable",
        "batch committed\t0\t1\t0",
        "slot created\t0\t0\t0",
    ]


def test_a_campaign_that_was_interrupted_is_told_of_by_its_directory(
    campaign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--report", str(campaign)]) == 1
    said = capsys.readouterr().out
    assert "2 histories" in said
    assert "FAIL seed 4: Broken: lost" in said
    assert (campaign / TABLE).exists()


def test_what_a_campaign_came_to_is_kept_by_histories(campaign: Path, tmp_path: Path) -> None:
    record(read(campaign), tmp_path / "kept.json")

    assert recorded(tmp_path / "kept.json") == Record(
        2, 70, 1, {"kill -9": 1, "target unreachable": 1}, {"batch committed": 1}, commit(), (3, 4)
    )
