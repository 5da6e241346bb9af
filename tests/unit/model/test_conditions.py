"""Conditions: the words that they hold, and those that a row's values decide."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.documents.lexer import Unreadable, named_columns, tokens
from cdcsync.model.conditions import ColumnKind, Where, columns_read, understood
from cdcsync.pgoutput.messages import UNCHANGED, Value

COLUMNS: dict[str, ColumnKind] = {
    "active": "boolean",
    "deleted_at": "plain",
    "n": "integer",
    "status": "text",
    "pair": "row",
    "user": "text",
    "Größe": "text",
}


def where(text: str, *, utf8: bool = True) -> Where:
    return understood(text, tokens(text), COLUMNS, utf8=utf8)


def holds(text: str, **values: Value) -> bool | None:
    condition = where(text)
    assert condition.terms is not None, f"left to the server: {text}"
    return condition.holds([values.get(column) for column in condition.deciding])


@pytest.mark.parametrize(
    ("text", "of"),
    [
        ("deleted_at IS NULL", {None: True, "2026-01-01": False, UNCHANGED: False}),
        ("deleted_at is not null", {None: False, "2026-01-01": True, UNCHANGED: True}),
        ("active", {"t": True, "f": False, None: False}),
        ("NOT active", {"t": False, "f": True, None: False}),
        ("active IS TRUE", {"t": True, "f": False, None: False}),
        ("active IS NOT TRUE", {"t": False, "f": True, None: True}),
        ("active IS FALSE", {"t": False, "f": True, None: False}),
        ("active IS NOT FALSE", {"t": True, "f": False, None: True}),
        ("active IS UNKNOWN", {"t": False, "f": False, None: True}),
        ("active IS NOT UNKNOWN", {"t": True, "f": True, None: False}),
        ("active = true", {"t": True, "f": False, None: False}),
        ("status = 'it''s'", {"it's": True, "its": False, None: False, UNCHANGED: None}),
        ("status <> 'spam'", {"spam": False, "Spam": True, "": True, None: False}),
        ("status != 'spam'", {"spam": False, "ham": True}),
        ("status IS DISTINCT FROM 'spam'", {"spam": False, "ham": True, None: True}),
        ("status IS NOT DISTINCT FROM 'spam'", {"spam": True, "ham": False, None: False}),
        ("status IN ('a', 'b')", {"a": True, "b": True, "c": False, None: False}),
        ("status NOT IN ('a','b')", {"a": False, "c": True, None: False}),
        ("\"Größe\" = 'ß'", {"ß": True, "s": False}),
        ("\"user\" = 'x'", {"x": True}),
        ("n = 007", {"7": True, "07": False}),
        ("n=-5", {"-5": True, "5": False}),
        ("n <> - 5", {"-5": False, "5": True}),
        ("((n IN (1, -2)))", {"1": True, "-2": True, "2": False}),
    ],
)
def test_conditions_of_these_forms_are_decided_by_a_value(text: str, of: dict[Value, bool | None]) -> None:
    condition = where(text)
    assert condition.terms is not None
    assert {value: condition.holds([value]) for value in of} == of


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("to_jsonb(t) ->> 'status' = 'open'", ("*",)),
        ("to_jsonb(t.*) ? 'n'", ("*",)),
        ('"t" IS NOT NULL', ("*",)),
        ("t.n > 0 AND status <> 't'", ("n", "status")),
        ("(pair).t > 0", ("pair",)),
        ("active", ("active",)),
    ],
)
def test_a_condition_that_names_the_row_reads_all_its_columns(text: str, named: tuple[str, ...]) -> None:
    assert columns_read(tokens(text), COLUMNS) == named


def test_a_conjunction_is_false_as_soon_as_one_part_is_and_unknown_only_if_it_matters() -> None:
    text = "deleted_at IS NULL AND (status <> 'spam' AND active)"
    assert where(text).deciding == ("deleted_at", "status", "active")
    assert holds(text, status="ham", active="t") is True
    assert holds(text, status=UNCHANGED, active="t") is None
    assert holds(text, status=UNCHANGED, active="f") is False
    assert holds(text, status="ham", active="t", deleted_at="2026-01-01") is False


@pytest.mark.parametrize(
    "text",
    [
        "n > 5",
        "n = 5.0",
        "n = 1e3",
        "n = '5'",
        "n = n",
        "n = 5 + 1",
        "n = 5 OR active",
        "NOT n = 5",
        "NOT status IS NULL",
        "NOT (active)",
        "pair IS NULL",
        "status = E'a\\nb'",
        "status = $$a$$",
        "status = 'a' COLLATE \"C\"",
        "status = 'a' || 'b'",
        "status = 'a'\n'b'",
        "status IN ('a', NULL)",
        "status = ANY('{a}')",
        "status LIKE 'a%'",
        "lower(status) = 'a'",
        "user = 'x'",
        "Größe = 'x'",
        "t.active",
        "active IS NULL IS TRUE",
        "active = true = true",
        "active, active",
        "unknown_column IS NULL",
        "deleted_at = '2026-01-01'",
        "active AND",
        "(active",
        "active)",
        "",
        "true",
    ],
)
def test_conditions_of_other_forms_are_left_to_the_server(text: str) -> None:
    condition = where(text)
    assert condition.terms is None
    assert condition.holds([]) is None


def test_in_another_encoding_only_ascii_is_compared_here() -> None:
    assert where("status = 'ß'", utf8=False).terms is None
    assert where("status = 's'", utf8=False).terms is not None


def test_the_columns_that_a_condition_may_read_are_those_that_it_names() -> None:
    text = "lower(status) = 'n' AND \"user\" IS NULL AND status <> ''"
    assert named_columns(tokens(text), COLUMNS) == ("status", "user")


@given(st.text(alphabet=st.sampled_from("ab 'E$\"U&().;,-/*=<1\n\\"), max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        words = tokens(text)
    except Unreadable:
        return
    assert understood(text, words, {"a": "text", "b": "boolean"}, utf8=True).text == text
