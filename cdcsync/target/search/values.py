"""The values of an index's columns, as searches and documents return them: loaders for a cursor.

PostgreSQL's types hold more than Python's: a date after the year 9999 or `infinity`, the time 24:00, an interval of
months. Such a value comes as the server's text, which a filter and a key take as well, so that one row never spoils
the hits beside it. JSON holds less again: see `load_values`.

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

_CALENDAR = re.compile(rb"mon|year|infinity|[PY@]")
"""Intervals that are no fixed length of time, or written in a style that is not PostgreSQL's own."""

_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""What may be a surrogate without the other half of its pair, which json takes and no text can hold."""

NESTED = 100
"""A value of json with more levels of lists and objects comes as text: MCP's library writes 255 levels, those of the
answer around the value included."""

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
    "float4": _Number,
    "float8": _Number,
    **{f"{name}{kind}": _Text for name in _RANGES for kind in ("range", "multirange")},
}


def load_values(cursor: psycopg.AsyncCursor[Any] | psycopg.AsyncRawCursor[Any], *, for_json: bool = False) -> None:
    """Have a cursor load each value of every row, in ranges and arrays too; none of them makes it fail.

    :param for_json: also load as the server's text what JSON has no form for, such as bytes, intervals and NaN: the
        text finds the row again as the value of a filter and as a key.
    """
    for type_, loader in (_HELD | (_FOR_JSON if for_json else {})).items():
        cursor.adapters.register_loader(type_, loader)
    set_json_loads(_json_or_text, cursor)


def _json_or_text(data: str | bytes) -> Any:
    """Return a value of json or jsonb.

    Return its text if it holds a number that Python does not read or text that cannot be encoded, or is too deep.
    """
    written = data.encode() if isinstance(data, str) else data
    try:
        value = json.loads(written, parse_float=_finite)
        if _HALF_A_PAIR.search(written):
            json.dumps(value, ensure_ascii=False).encode()
        if written.count(b"[") + written.count(b"{") > NESTED and _levels(value) > NESTED:
            return written.decode()
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
