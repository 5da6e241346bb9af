"""The table of `cdcsync migrate INDEX status`."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.cli import main
from cdcsync.cli.migrate import _print_generations
from cdcsync.status.generations import GenerationStatus

LIVE = GenerationStatus(1, "live", "old", "m", 384, "vector", "cosine", None, None, 0, 0, 0, 0, 0, None)


@pytest.mark.parametrize(
    ("state", "chunks", "vectors", "shown"),
    [
        ("live", 0, 0, "100.0% of 0"),
        ("filling", 0, 0, "0.0% of 0"),
        ("filling", 60, 30, "50.0% of 60"),
        ("ready", 60, 61, "100.0% of 60"),
    ],
)
def test_a_generation_whose_chunks_are_not_counted_yet_is_not_called_filled(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    chunks: int,
    vectors: int,
    shown: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _print_generations("articles", [msgspec.structs.replace(LIVE, state=state, chunks=chunks, vectors=vectors)])
    assert f" {shown} " in capsys.readouterr().out


def test_an_index_and_a_step_the_other_way_round_are_told_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["migrate", "start", "tickets"])
    assert ended.value.code == 2
    assert "not tickets; the other way round: cdcsync migrate tickets start" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(SystemExit):
        main(["migrate", "tickets", "begin"])
    assert "the other way round" not in capsys.readouterr().err
