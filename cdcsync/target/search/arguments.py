"""The arguments of an index's calls, checked before anything is spent: no model is asked and no session is lent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from numbers import Real
from typing import Any, Literal, cast, get_args
from uuid import UUID

from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from cdcsync.config import Config
from cdcsync.errors import UsageError
from cdcsync.postgres.texts import is_text
from cdcsync.target.ddl.nearness import MAX_HITS

Mode = Literal["hybrid", "vector", "text"]

NESTED = 2
"""The lists and objects of a filter on one column that may be in one another: values by operator, of which one is a
list."""

NESTED_JSON = 100
"""The same where an operator takes JSON, values by operator among them: more than anybody writes."""

TAKES_JSON = ("contains", "overlaps")
"""The operators whose values are JSON, or lists of it."""

HINTS = {
    "text": "write the query in quotes",
    "vector": "give a list of numbers that fit into 4 bytes, as the index's model makes them",
    "filter": 'give values by column, such as {"tenant": 3}',
    "headline": 'give options of ts_headline, such as "MaxWords=20, MinWords=5", or "" for the usual ones',
    "settings": 'give texts by name, such as {"work_mem": "8MB"}, that SET takes in a session of this role',
}
"""How the arguments of a search are given that the server reads, by their names."""

LONGEST_S = 1e6
"""More than the server's timers can count."""


MOST_CONNECTIONS = 1_000
"""More than a server lends to one process."""


def check_arguments(
    *,
    texts: Mapping[str, str | None],
    k: int,
    mode: str,
    skip: int,
    filter: Mapping[str, Any] | None,
    per_document: bool,
    weights: Sequence[float],
    vector: object,
    timeout_s: float | None,
    settings: object,
) -> None:
    """Refuse what no search can use.

    :param texts: the query and the options of headlines, by the names of these arguments.
    :raises UsageError: one of them cannot be used.
    """
    for number in (k, skip):
        check_whole(number, "-k", hint="k and skip are counts")
    for name, text in texts.items():
        if text is not None:
            check_text(text, name, hint=HINTS[name])
    if not (k >= 1 and skip >= 0 and skip + k <= MAX_HITS):
        after = f" after skipping {skip}" if skip else ""
        raise UsageError(f"cannot return {k} hits{after}", where="-k", hint=f"ask for hits within the first {MAX_HITS}")
    if mode not in get_args(Mode):
        raise UsageError(f"there is no mode {mode!r}", where="mode", hint=f"the modes are {', '.join(get_args(Mode))}")
    check_switch(per_document, "per_document")
    if vector is not None and not (isinstance(vector, Sized) and all_finite(vector)):
        raise UsageError(f"the query's vector is {_shown(vector)}", where="vector", hint=HINTS["vector"])
    if not all_finite(weights) or len(weights) != 2:
        hint = "give two numbers: of vectors and of words"
        raise UsageError(f"the weights are {weights!r}", where="weights", hint=hint)
    if timeout_s is not None and not (all_finite([timeout_s]) and 0 < timeout_s <= LONGEST_S):
        raise UsageError(
            f"a search cannot take {timeout_s!r} seconds", where="timeout_s", hint="give a number of seconds above 0"
        )
    if not isinstance(settings, Mapping) or not all(isinstance(one, str) for pair in settings.items() for one in pair):
        raise UsageError(f"the settings are {_shown(settings)}", where="settings", hint=HINTS["settings"])
    for name, given in (("settings", settings), ("filter", plain_filter(filter))):
        for value in _within(given):
            if isinstance(value, str):
                check_text(value, name, hint=HINTS[name])


def check_opening(config: object, *, connections: int, model_timeout_s: float, application_name: str) -> None:
    """Refuse what no index can be opened with.

    :raises UsageError: one of them cannot be used.
    """
    if not isinstance(config, Config):
        raise UsageError(
            f"{_shown(config)} is not a configuration", where="config", hint='give load_config("cdcsync.toml")'
        )
    hint = f"give a number of connections, from 1 to {MOST_CONNECTIONS}"
    check_whole(connections, "connections", hint=hint)
    if not 1 <= connections <= MOST_CONNECTIONS:
        raise UsageError(f"no index has {connections} connections", where="connections", hint=hint)
    check_wait(model_timeout_s, "model_timeout_s")
    check_text(application_name, "application_name", hint="give the name that pg_stat_activity shows")


def check_text(text: object, where: str, *, hint: str) -> None:
    """Refuse what is not a text that the server can hold.

    :raises UsageError: it is none.
    """
    if not isinstance(text, str):
        raise UsageError(f"{_shown(text)} is not a text", where=where, hint=hint)
    if not is_text(text):
        raise UsageError(
            f"{_shown(text)} holds a character that no text can hold",
            where=where,
            hint=f"{hint}, without NUL and lone surrogates",
        )


def check_whole(number: object, where: str, *, hint: str) -> None:
    """Refuse what is not a whole number.

    :raises UsageError: it is none.
    """
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise UsageError(f"{_shown(number)} is not a whole number", where=where, hint=hint)


def check_wait(seconds: object, where: str) -> None:
    """Refuse what is no time to wait; `inf` is one without an end.

    :raises UsageError: it is none.
    """
    try:
        known = isinstance(seconds, Real) and not math.isnan(seconds)
    except OverflowError:
        known = False
    if not known:
        raise UsageError(
            f"{_shown(seconds)} is not a number of seconds", where=where, hint="give a number, such as 2.5"
        )


def check_switch(value: object, where: str) -> None:
    """Refuse what is neither true nor false.

    :raises UsageError: it is neither.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's, too
        raise UsageError(f"{_shown(value)} is neither True nor False", where=where, hint="give True or False")


def _shown(value: object) -> str:
    """Return a value as an error shows it: a vector may have thousands of numbers."""
    return repr(value)[:80]


def all_finite(numbers: object) -> bool:
    """Say whether something is a series of numbers of which each is finite."""
    try:
        return all(map(math.isfinite, cast(Iterable[float], numbers)))
    except (TypeError, ValueError, OverflowError):
        return False


def plain_filter(filter: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a filter with its values as JSON has them; what JSON lacks is the text that the column's type reads.

    :raises UsageError: it has a value that is none of a column.
    """
    if not isinstance(filter, Mapping | None):
        raise UsageError(f"the filter is {filter!r}", where="filter", hint=HINTS["filter"])
    return {column: _plain(column, value) for column, value in (filter or {}).items()}


def _plain(column: str, value: object, within: int = 0, most: int = NESTED) -> object:
    """Return a value of a column's filter as JSON has it.

    :param within: in how many lists and mappings it is.
    :param most: in how many of these it may be; JSON, in which numbers are numbers, may be in more than other values.
    """
    match value:
        case Enum():
            return _plain(column, value.value, within, most)
        case bool() | None:
            return value
        case str():
            return str.__str__(value)  # of classes made from these, such as numpy's or Markup, the plain value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case Mapping() | list() | tuple() | set() | frozenset() if within == most:
            raise UsageError(
                f"the filter on {column} has lists or objects that are too deep in one another",
                where="filter",
                hint='give a value, a list of values, or either by operator, such as {"in": [1, 2]};'
                " write an array or JSON as text",
            )
        case Mapping():
            return {
                name: _plain(column, one, within + 1, NESTED_JSON if not within and name in TAKES_JSON else most)
                for name, one in value.items()
            }
        case list() | tuple() | set() | frozenset():
            return [_plain(column, one, within + 1, most) for one in value]
        case bytes() | bytearray() | memoryview():
            return f"\\x{bytes(value).hex()}"
        case date() | time():
            return value.isoformat()
        case timedelta():
            return f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"
        case Decimal() if most == NESTED_JSON and value.is_finite():
            return value
        case Decimal() | UUID():
            return str(value)
        case Range():
            return _range(column, value)
        case Multirange():
            return f"{{{','.join(_range(column, one) for one in value)}}}"
        case IPv4Address() | IPv6Address() | IPv4Network() | IPv6Network() | IPv4Interface() | IPv6Interface():
            return str(value)
        case _ if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return _plain(column, value.tolist(), within, most)
    raise UsageError(
        f"the filter on {column} compares with an object of {type(value).__name__}",
        where="filter",
        hint="give None, or a bool, int, float, Decimal, str, bytes, date, time, datetime, timedelta, UUID, IP address,"
        " range or Enum of these, or a list; write a value of any other type as text",
    )


def _range(column: str, value: Range[Any]) -> str:
    """Return a range as the server reads it: a bound that is not there is empty, and every other one quoted."""
    if value.isempty:
        return "empty"
    lower, upper = (
        "" if bound is None else '"' + re.sub(r'(["\\])', r"\\\1", str(_plain(column, bound))) + '"'
        for bound in (value.lower, value.upper)
    )
    return f"{value.bounds[0]}{lower},{upper}{value.bounds[1]}"


def _within(value: object) -> Iterator[object]:
    """Yield the plain values in lists and mappings, names included."""
    match value:
        case Mapping():
            for name, one in value.items():
                yield name
                yield from _within(one)
        case list() | tuple() | set() | frozenset():
            for one in value:
                yield from _within(one)
        case _:
            yield value
