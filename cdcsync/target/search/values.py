"""The values of an index's columns, as searches and documents return them: loaders for a cursor.

PostgreSQL's types hold more than Python's: a date after the year 9999 or `infinity`, the time 24:00, an interval of
months. Such a value comes as the server's text, which a filter and a key take as well, so that one row never spoils
the hits beside it. JSON holds less again: see `load_values`. `written_value` goes the other way.

No two values of a type are told alike in JSON, so the key of a hit finds that row and no other.

Source: PostgreSQL, "Date/Time Types" (Special Values), "Binary Data Types" (bytea Hex Format); RFC 8259, section 6.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.types import TypeInfo
from psycopg.types.array import ArrayLoader
from psycopg.types.datetime import (
    DateLoader,
    IntervalLoader,
    TimeLoader,
    TimestampLoader,
    TimestamptzLoader,
    TimetzLoader,
)
from psycopg.types.json import set_json_loads
from psycopg.types.string import ByteaLoader

from cdcsync.target.ddl.filters import Column

_CALENDAR = re.compile(rb"mon|year|infinity|[PY@]")
"""Intervals that are no fixed length of time, or written in a style that is not PostgreSQL's own."""

_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""What may be a surrogate without the other half of its pair, which json takes and no text can hold."""

NESTED = 100
"""A value of json with more levels of lists and objects comes as text: MCP's library writes 255 levels, those of the
answer around the value included."""

_NO_LIST = re.compile(rb"^\[")
"""Arrays that a list does not tell whole: their first place is another than 1."""

_NO_LIST_OF_JSON = re.compile(rb'^\[|^\{\{|[{,]"null"')
"""Of json also those with JSON's null, which a list has for no value, and of several dimensions: lists of lists are
one-dimensional arrays of JSON's lists."""

_RANGES = ("int4", "int8", "num", "date", "ts", "tstz")


def _or_text(loader: type[Loader]) -> type[Loader]:
    """Return a loader that gives the server's text for a value that Python cannot hold."""

    class OrText(Loader):
        def __init__(self, oid: int, context: Any = None) -> None:
            super().__init__(oid, context)
            self._load = loader(oid, context).load

        def load(self, data: Buffer) -> Any:
            try:
                return self._load(data)
            except (psycopg.DataError, NotImplementedError):  # the latter: in another DateStyle or IntervalStyle
                return bytes(data).decode()

    return OrText


class _Interval(IntervalLoader):
    def load(self, data: Buffer) -> Any:
        if _CALENDAR.search(bytes(data)):
            raise psycopg.DataError("not a length of time")
        return super().load(data)


class _Text(Loader):
    def load(self, data: Buffer) -> str:
        return bytes(data).decode()


class _Hexadecimal(ByteaLoader):
    """Bytes as PostgreSQL writes them by default."""

    def load(self, data: Buffer) -> Any:
        return f"\\x{bytes(super().load(bytes(data))).hex()}"


class _Number(Loader):
    """A float, or the server's text for one that JSON has no number for."""

    def load(self, data: Buffer) -> Any:
        number = float(data)
        return number if math.isfinite(number) else bytes(data).decode()


def _list_or_text(element: TypeInfo) -> type[Loader]:
    """Return a loader of arrays that gives the server's text for one that a list does not tell whole."""
    no_list = _NO_LIST_OF_JSON if element.name in ("json", "jsonb") else _NO_LIST

    class ListOrText(ArrayLoader):
        base_oid = element.oid
        delimiter = element.delimiter.encode()

        def load(self, data: Buffer) -> Any:
            written = bytes(data)
            return written.decode() if no_list.search(written) else super().load(written)

    return ListOrText


_HELD: dict[str, type[Loader]] = {
    "date": _or_text(DateLoader),
    "timestamp": _or_text(TimestampLoader),
    "timestamptz": _or_text(TimestamptzLoader),
    "time": _or_text(TimeLoader),
    "timetz": _or_text(TimetzLoader),
    "interval": _or_text(_Interval),
}

_FOR_JSON: dict[str, type[Loader]] = {
    "bytea": _Hexadecimal,
    "interval": _Text,
    "timetz": _Text,  # its offset may have seconds
    "float4": _Number,
    "float8": _Number,
    **{f"{name}{kind}": _Text for name in _RANGES for kind in ("range", "multirange")},
}

_LISTS = {one.array_oid: _list_or_text(one) for one in psycopg.adapters.types if one.array_oid}


def load_values(cursor: psycopg.AsyncCursor[Any] | psycopg.AsyncRawCursor[Any], *, for_json: bool) -> None:
    """Have a cursor load each value of every row, in ranges and arrays too; none of them makes it fail.

    :param for_json: also load as the server's text what JSON has no form for, such as bytes, intervals and NaN: the
        text finds the row again as the value of a filter and as a key.
    """
    for type_, loader in (_HELD | (_FOR_JSON if for_json else {})).items():
        cursor.adapters.register_loader(type_, loader)
    for array, loader in _LISTS.items() if for_json else ():
        cursor.adapters.register_loader(array, loader)
    set_json_loads(_json_or_text, cursor)


def written_value(column: Column, value: Any) -> str | None:
    """Return the text by which PostgreSQL reads a value that an answer has as JSON; None for null, unless it is JSON's.

    A value whose answer has the server's text, as of bytes or a date that is infinity, is that text.
    """
    if column.array and isinstance(value, list):
        return _written_array(value, of_json=column.type == "pg_catalog._jsonb")
    return _written(value, of_json=column.type == "pg_catalog.jsonb")


def value_in_path(column: Column, text: str) -> Any:
    """Return the value that a text in a path stands for: arrays and jsonb are JSON there, as in an answer.

    An array may also be written as PostgreSQL writes it, and a text of jsonb without its quotation marks.
    """
    if not column.array and column.type != "pg_catalog.jsonb":
        return text
    try:
        value = _read_json(text)
    except json.JSONDecodeError:
        return text
    return text if column.array and not isinstance(value, list) else value


def _written(value: Any, *, of_json: bool) -> str | None:
    if isinstance(value, str):
        return value if not of_json or _tells_json(value) else json.dumps(value)
    return None if value is None and not of_json else json.dumps(value)


def _written_array(values: list[Any], *, of_json: bool) -> str:
    parts = []
    for value in values:
        if isinstance(value, list) and not of_json:
            parts.append(_written_array(value, of_json=False))
        elif value is None:
            parts.append("NULL")
        else:
            text = str(_written(value, of_json=of_json))
            parts.append('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return "{" + ",".join(parts) + "}"


def _json_or_text(data: str | bytes) -> Any:
    """Return a value of json or jsonb as `_read_json` does, and a text's own text where it would be taken for such."""
    value = _read_json(data)
    if isinstance(value, str) and _tells_json(value):
        return data if isinstance(data, str) else data.decode()
    return value


def _tells_json(text: str) -> bool:
    """Say whether a text in an answer is that of a value of jsonb which is told as its text."""
    try:
        value = _read_json(text)
    except json.JSONDecodeError:
        return False
    return bool(value == text) or (isinstance(value, str) and _tells_json(value))


def _read_json(data: str | bytes) -> Any:
    """Return what JSON says.

    Return its text if it holds a number that Python does not read or text that cannot be encoded, or is too deep.

    :raises json.JSONDecodeError: it is not JSON.
    """
    written = data.encode() if isinstance(data, str) else data
    try:
        value = json.loads(written, parse_float=_finite)
        if _HALF_A_PAIR.search(written):
            json.dumps(value, ensure_ascii=False).encode()
        if written.count(b"[") + written.count(b"{") > NESTED and _levels(value) > NESTED:
            return written.decode()
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        return written.decode()
    return value


def _levels(value: Any) -> int:
    """Return how many lists and objects are in one another."""
    levels, values = 0, [value]
    while holders := [one for one in values if isinstance(one, list | dict)]:
        values = [inner for one in holders for inner in (one.values() if isinstance(one, dict) else one)]
        levels += 1
    return levels


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(digits)
    return number
