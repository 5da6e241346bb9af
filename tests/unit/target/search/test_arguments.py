"""Arguments that no search can use are refused with what to do, before anything is spent on them."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from cdcsync.errors import UsageError
from cdcsync.target.search import MAX_HITS, check_arguments
from cdcsync.target.search.arguments import plain_filter

USUAL: dict[str, Any] = {
    "texts": {"text": "a query", "headline": None},
    "k": 10,
    "mode": "hybrid",
    "skip": 0,
    "filter": None,
    "per_document": True,
    "weights": (1.0, 1.0),
    "vector": None,
    "timeout_s": 30.0,
    "settings": {},
}


def nested(levels: int, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """Return lists or objects in one another."""
    value: Any = kind()
    for _ in range(levels - 1):
        value = [value] if kind is list else {"eq": value}
    return value


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"k": np.int64(3), "skip": MAX_HITS - 3},
        {"weights": (0, 2)},
        {"timeout_s": None},
        {"vector": [1, 2.5], "mode": "vector"},
        {"vector": np.ones(3, dtype=np.float32), "per_document": np.False_},
        {"filter": {"tenant": 3, "status": ["open", None], "price": {"gte": 1.5}, "large": 10**400}},
        {"filter": {"price": float("nan"), "weight": {"lt": [float("-inf")]}}},
        {"filter": {"name": {"in": ["\\u0000", "\\ud800"]}, "\\u0000": "\\\\u0000"}},
        {"texts": {"text": "ünï \U0001f600 \u2028", "headline": ""}},
    ],
)
def test_what_a_search_can_use_is_not_refused(arguments: dict[str, Any]) -> None:
    check_arguments(**USUAL | arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"k": 0}, "cannot return 0 hits"),
        ({"k": -1}, "cannot return -1 hits"),
        ({"skip": -1}, "cannot return 10 hits after skipping -1"),
        ({"skip": MAX_HITS}, "cannot return 10 hits after"),
        ({"k": 2.0}, "2.0 is not a whole number"),
        ({"skip": "3"}, "'3' is not a whole number"),
        ({"k": True}, "True is not a whole number"),
        ({"texts": {"text": "a", "headline": 5}}, "5 is not a text"),
        ({"filter": [3]}, r"the filter is \[3\]"),
        ({"filter": {"colour": object()}}, "the filter on colour compares with an object of object"),
        ({"filter": {"colour": {"in": [range(2)]}}}, "the filter on colour compares with an object of range"),
        ({"filter": {"colour": {"in": [[1]]}}}, "the filter on colour has lists or objects that are too deep"),
        ({"filter": {"colour": [[[1]]]}}, "too deep in one another"),
        ({"filter": {"colour": [[{}]]}}, "too deep in one another"),
        ({"filter": {"colour": {"eq": {"in": ()}}}}, "too deep in one another"),
        ({"filter": {"colour": np.zeros((2, 2, 2))}}, "too deep in one another"),
        ({"filter": {"colour": nested(500, list)}}, "too deep in one another"),
        ({"filter": {"colour": nested(2_000, dict)}}, "too deep in one another"),
        ({"weights": (1.0,)}, "the weights are"),
        ({"weights": (1.0, 1.0, 1.0)}, "the weights are"),
        ({"weights": (float("nan"), 1.0)}, "the weights are"),
        ({"weights": ("a", "b")}, "the weights are"),
        ({"weights": 1.0}, "the weights are"),
        ({"timeout_s": "5"}, "cannot take '5' seconds"),
        ({"settings": {"work_mem": 4}}, "the settings are"),
        ({"settings": ["work_mem"]}, "the settings are"),
        ({"mode": "words"}, "there is no mode 'words'"),
        ({"mode": ["text"]}, "there is no mode"),
        ({"per_document": 1}, "1 is neither True nor False"),
        ({"vector": 5}, "the query's vector is 5"),
        ({"vector": iter([1.0])}, "the query's vector is"),
        ({"vector": ["a"] * 1000}, "the query's vector is"),
        ({"vector": np.array([1.0, np.nan])}, "the query's vector is"),
        ({"vector": [[1.0]]}, "the query's vector is"),
        ({"timeout_s": float("inf")}, "cannot take inf seconds"),
        ({"timeout_s": float("nan")}, "cannot take nan seconds"),
        ({"timeout_s": 0}, "cannot take 0 seconds"),
        ({"texts": {"text": "a\0b"}}, "no text can hold"),
        ({"texts": {"text": "a", "headline": "\ud800"}}, "no text can hold"),
        ({"filter": {"name": {"in": ["fine", "a\udfffb"]}}}, "no text can hold"),
        ({"filter": {"na\0me": 1}}, "no text can hold"),
        ({"settings": {"app.tenant": "\0"}}, "no text can hold"),
    ],
)
def test_what_it_cannot_is_a_usage_error_with_the_fix(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        check_arguments(**USUAL | arguments)
    assert refused.value.hint


class State(Enum):
    OPEN = "open"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (b"\0\x13", "\\x0013"),
        (bytearray(b"\xff"), "\\xff"),
        (memoryview(b"\xff"), "\\xff"),
        ([b"\x01", "a"], ["\\x01", "a"]),
        ({"gte": date(2026, 1, 2)}, {"gte": "2026-01-02"}),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00+00:00"),
        (time(3, 4), "03:04:00"),
        (timedelta(days=-1, seconds=5), "-1 days 5 seconds 0 microseconds"),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (ip_address("10.0.0.1"), "10.0.0.1"),
        (State.OPEN, "open"),
        (np.float32(1.5), 1.5),
        ((1, None, True), [1, None, True]),
        ({"contains": {"a": [{"b": (1, Decimal("1.50"))}]}}, {"contains": {"a": [{"b": [1, Decimal("1.50")]}]}}),
        ({"overlaps": [Decimal("NaN"), date(2026, 1, 2)]}, {"overlaps": ["NaN", "2026-01-02"]}),
    ],
)
def test_a_value_of_a_filter_is_written_as_its_column_reads_it(value: object, plain: object) -> None:
    assert plain_filter({"column": value}) == {"column": plain}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Range(date(2026, 1, 1), None), '["2026-01-01",)'),
        (Range(None, 5, "(]"), '(,"5"]'),
        (Range(None, None, "()"), "(,)"),
        (Range(empty=True), "empty"),
        (Range('a"b', "c\\d", "[]"), '["a\\"b","c\\\\d"]'),
        (Multirange([Range(1, 2), Range(5, None)]), '{["1","2"),["5",)}'),
    ],
)
def test_a_range_is_written_as_the_server_reads_it(value: object, written: str) -> None:
    assert plain_filter({"valid": value}) == {"valid": written}


class Marked(str):
    """A text of a class of its own, as template engines have them."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "plain"),
    [(np.float64(1.5), 1.5), (np.str_("open"), "open"), (Marked("open"), "open")],
)
def test_values_of_classes_made_from_plain_ones_are_written_as_these(value: object, plain: object) -> None:
    written = plain_filter({"column": value, "other": {"in": [value]}})
    assert msgspec.json.decode(msgspec.json.encode(written)) == {"column": plain, "other": {"in": [plain]}}
