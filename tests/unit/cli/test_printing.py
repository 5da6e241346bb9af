"""What the commands print: texts from databases, errors, findings and hits."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from cdcsync.cli.printing import (
    MARKS,
    excerpt,
    plain,
    print_hits,
    print_json,
    print_line,
    print_verdict,
    shares,
    three_lines,
)
from cdcsync.preflight import Finding
from cdcsync.target.search import Hit

HIT = Hit({"id": 7}, {"tenant": 3}, 0, "First line\n\nsecond line", 0.0325, 0.25, 2, False, vector_rank=1)


def test_a_text_cannot_take_over_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x07\nc\r") == "a·[2Jb·\nc·"


def test_a_record_is_one_line_whatever_its_parts_hold(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("a\nb", "c\r\nd", "e\x1b[2J\x9bf", "[bold]g", "")
    assert capsys.readouterr().out == "a b  c d  e·[2J·f  [bold]g  \n"


@pytest.mark.parametrize("indent", [True, False])
def test_json_holds_no_character_that_a_terminal_acts_on(capsys: pytest.CaptureFixture[str], indent: bool) -> None:
    value = {"a\x9b": "".join(map(chr, [*range(32), *range(126, 161), 0x2028, 0x202E, 0x2066])) + "é€\U0001f600"}
    print_json(value, indent=indent)
    shown = capsys.readouterr().out
    assert [one for one in shown if not one.isprintable() and one not in "\n\xa0"] == []
    assert "é€\U0001f600" in shown
    assert json.loads(shown) == value


def test_an_excerpt_is_cut_by_lines_and_by_characters_and_says_so() -> None:
    assert excerpt("a\n\n  b  \nc", indent="> ", lines=2) == "> a\n>   b …"
    assert excerpt("a\nb", lines=2) == "a\nb"
    assert excerpt("x" * 500) == "x" * 400 + " …"


def test_an_error_has_what_where_and_the_fix_as_far_as_it_has_them() -> None:
    assert three_lines("it broke", "slot a", "mend it").plain == "error: it broke\nwhere: slot a\nfix:   mend it"
    assert three_lines("it broke", None, None).plain == "error: it broke"


@pytest.mark.parametrize(
    ("levels", "last"),
    [
        (["ok"], "All checks passed. Start the worker with: cdcsync run"),
        (["ok", "warning"], "No errors, 1 warning. Start the worker with: cdcsync run"),
        (["error", "warning", "error"], "2 errors, 1 warning. Correct the errors, then run again: cdcsync check"),
    ],
)
def test_findings_end_with_whether_run_would_start(
    levels: list[Any], last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_verdict([Finding(level, f"part {at}", "message", "hint") for at, level in enumerate(levels)], "")
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_hit_shows_its_key_its_ranks_and_the_beginning_of_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_hits([HIT], explain=True)
    printed = capsys.readouterr().out
    for part in ("id=7", "score 0.0325", "distance 0.2500", "text rank 2", "vector rank 1", "tenant=3", "First line"):
        assert part in printed


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "c is null"),
        ("None", "c=None"),
        ("", "c="),
        (True, "c=true"),
        (["a", None, 1], 'c=["a",null,1]'),
        ({"a": {"b": False}}, 'c={"a":{"b":false}}'),
        (Decimal("1.50"), "c=1.50"),
        (math.nan, "c=nan"),
        ([datetime.date(2026, 1, 31), Decimal("1.50")], 'c=["2026-01-31","1.50"]'),
        (["\x1b[2J\x9b"], 'c=["\\u001b[2J·"]'),
    ],
)
def test_a_value_is_shown_as_filters_and_json_have_it(
    value: Any, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_hits([msgspec.structs.replace(HIT, key={"flag": True}, carried={"c": value, "last": 1})])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert "flag=true" in first
    assert second.strip() == f"{shown}  last=1"


def test_a_stale_vector_is_told_and_matched_words_stand_without_marks(capsys: pytest.CaptureFixture[str]) -> None:
    opening, closing = MARKS
    print_hits([msgspec.structs.replace(HIT, stale=True, headline=f"second {opening}line{closing} here")])
    printed = capsys.readouterr().out
    assert "its vector is not up to date" in printed
    assert "second line here" in printed
    assert not set(MARKS) & set(printed)


def test_only_a_hit_of_both_legs_has_shares() -> None:
    assert shares(HIT)
    assert shares(msgspec.structs.replace(HIT, text_rank=None)) == []
    assert shares(msgspec.structs.replace(HIT, vector_rank=None)) == []


def test_json_has_a_text_for_what_json_has_no_form_for(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"value": 1 + 2j}, indent=False)
    assert json.loads(capsys.readouterr().out) == {"value": "(1+2j)"}
