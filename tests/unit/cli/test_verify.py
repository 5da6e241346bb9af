"""What a verification prints."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cdcsync.cli.failures import _print
from cdcsync.cli.verify import _print as print_verification
from cdcsync.flows.audit import Verification
from cdcsync.target.failures.documents import Listed
from cdcsync.target.failures.listing import Failure


def shown(found: list[Failure], listed: Listed, capsys: pytest.CaptureFixture[str], *, limit: int = 100) -> str:
    _print("articles", found, listed, limit)
    return " ".join(capsys.readouterr().out.split())


def found_to_be(differences: dict[str, int], undecided: int = 0) -> Verification:
    return Verification(
        index="articles",
        equal=False,
        documents=10,
        candidates=2,
        differences=differences,
        examples={problem: [("7",)] for problem in differences},
        undecided=undecided,
        waiting=0,
        vectors_orphaned=0,
        seconds=0.1,
        finished_at=datetime(2026, 5, 4, tzinfo=UTC),
    )


def test_an_index_is_not_called_equal_while_a_document_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    print_verification(found_to_be({}, undecided=1))
    shown = " ".join(capsys.readouterr().out.split())
    assert "! 1 document changed at every look: nothing is known" in shown
    assert "the index equals" not in shown
    assert "everything else equals the source" in shown
    assert not found_to_be({}, undecided=1).differs


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ({"failed": 2}, "some rows have failed; `cdcsync failures articles list` says why"),
        ({"failed": 2, "stale": 1}, "`cdcsync verify articles --repair` repairs them"),
    ],
)
def test_a_verification_sends_whoever_only_lacks_such_rows_to_their_list(
    differences: dict[str, int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_verification(found_to_be(differences))
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown
    assert "2 failed: no document could be made of the row" in shown
