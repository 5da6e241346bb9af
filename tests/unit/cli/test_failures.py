"""`cdcsync failures`: what it takes; what it does is tested against a worker."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from cdcsync.cli import main
from cdcsync.cli.failures import _print
from cdcsync.target.failures.documents import Listed
from cdcsync.target.failures.listing import Failure
from tests.support.configs import NO_SERVER


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["article", "list"], 2, "there are: articles"),
        (["articles", "forget"], 2, "forget"),
        (["articles"], 2, "discard"),
        (["articles", "list"], 1, "target"),
        (["articles", "discard", "--discarded"], 2, "belongs to list and retry"),
    ],
    ids=["unknown index", "unknown action", "no action", "no server", "discarding what was discarded"],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_text(NO_SERVER)

    with pytest.raises(SystemExit) as exited:
        main(["failures", *arguments, "-c", str(path)])

    assert exited.value.code == status
    assert said in capsys.readouterr().err


REFUSED = Failure({"id": "7"}, 2, "400: too long", 8, None)
LATER = Failure({"id": "8"}, 0, "503", 3, datetime(2026, 5, 4, 12, 0, tzinfo=UTC))
UNMADE = Failure({"region": "eu", "id": "9\x1b[31m"}, None, "f failed with ValueError", 2, None, "document")


def shown(found: list[Failure], listed: Listed, capsys: pytest.CaptureFixture[str], *, limit: int = 100) -> str:
    _print("articles", found, listed, limit)
    return " ".join(capsys.readouterr().out.split())


def test_each_failure_is_shown_with_its_key_its_reason_and_whom_it_waits_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = shown([UNMADE, REFUSED, LATER], Listed(1, 0), capsys)

    assert "region=eu, id=9" in said
    assert "\x1b[31m" not in said
    assert "no document attempts 2 waits for you f failed with ValueError" in said
    assert "id=7 chunk 2 attempts 8 waits for you 400: too long" in said
    assert "id=8 chunk 0 attempts 3 next attempt 2026-05-04 12:00:00 UTC" in said
    assert "--limit" not in said
    assert "listed" not in said


@pytest.mark.parametrize("found", [[UNMADE, LATER, REFUSED], [UNMADE, UNMADE]])
def test_more_of_a_kind_than_is_shown_is_said(found: list[Failure], capsys: pytest.CaptureFixture[str]) -> None:
    assert "the first 2 of each kind; --limit shows more" in shown(found, Listed(2, 0), capsys, limit=2)


def test_rows_that_are_not_listed_are_said_to_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`cdcsync verify articles` finds the others" in shown([UNMADE], Listed(1, 5), capsys)


def test_nothing_that_failed_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown([], Listed(), capsys) == "nothing has failed"


def test_texts_that_were_discarded_are_counted_or_listed_apart(capsys: pytest.CaptureFixture[str]) -> None:
    _print("articles", [], Listed(), 100, discarded=2)
    assert " ".join(capsys.readouterr().out.split()) == (
        "nothing has failed 2 texts were discarded; --discarded lists them, too"
    )
    discarded = msgspec.structs.replace(REFUSED, discarded=True)
    assert "id=7 chunk 2 attempts 8 discarded 400: too long" in shown([discarded], Listed(), capsys)
