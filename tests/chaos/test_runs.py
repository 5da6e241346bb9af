"""What a command came to is kept by its last line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.runs import keep, peers, runs, table


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """An empty record."""
    path = tmp_path / "runs.json"
    path.write_text("{}")
    return path


def test_the_last_line_of_the_last_run_counts(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep("make simulate", ["seed 7: lost\n"], kept)
    keep("make simulate", ["some\n", "7 histories; no failure\n", "\n"], kept)

    assert [one.said for one in runs(kept).values()] == ["7 histories; no failure"]
    assert table(kept)[0].endswith("| 7 histories; no failure |")
    assert "some\n" in capsys.readouterr().out


def test_a_command_that_printed_nothing_leaves_the_record_as_it_was(kept: Path) -> None:
    with pytest.raises(ValueError, match="make fuzz printed nothing"):
        keep("make fuzz", ["\n"], kept)

    assert runs(kept) == {}


def test_the_figures_of_kills_are_a_row_each_with_both_sides(kept: Path) -> None:
    figures = {"cdcsync_kills_lost_documents": 0, "pgai_kills_lost_documents": 1234, "pgai_live_s": 3.5}
    keep("bench/peers.py", [json.dumps({"bench": "peers", "figures": figures})], kept)

    assert peers(kept) == ["| lost documents | 0 | 1,234 |"]
    assert table(kept) == []


def test_a_side_that_was_not_measured_is_not_said_to_have_lost_nothing(kept: Path) -> None:
    figures = {"cdcsync_kills_lost_documents": 0, "cdcsync_kills_workers_killed": 15, "pgai_kills_workers_killed": 15}
    keep("bench/peers.py", [json.dumps({"bench": "peers", "figures": figures})], kept)

    assert peers(kept) == ["| lost documents | 0 | not measured |", "| workers killed | 15 | 15 |"]
