"""The arguments of a search, checked before anything is spent on it: no model is asked and no session is lent."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cdcsync.errors import UsageError
from cdcsync.target.ddl.nearness import MAX_HITS

LONGEST_S = 1e6
"""More than the server's timers can count."""


def check_arguments(
    *,
    texts: Sequence[str | None],
    k: int,
    skip: int,
    filter: Mapping[str, Any] | None,
    weights: Sequence[float],
    timeout_s: float | None,
    settings: Mapping[str, str],
) -> None:
    """Refuse what no search can use.

    :param texts: the query and the options of headlines.
    :raises UsageError: one of them cannot be used.
    """
    for number in (k, skip):
        try:
            operator.index(number)
        except TypeError:
            raise UsageError(f"{number!r} is not a whole number", where="-k", hint="k and skip are counts") from None
    if not (k >= 1 and skip >= 0 and skip + k <= MAX_HITS):
        after = f" after skipping {skip}" if skip else ""
        raise UsageError(f"cannot return {k} hits{after}", where="-k", hint=f"ask for hits within the first {MAX_HITS}")
    if len(weights) != 2 or not all(math.isfinite(weight) for weight in weights):
        raise UsageError(
            f"the weights are {tuple(weights)!r}", where="weights", hint="give two numbers: of vectors and of words"
        )
    if timeout_s is not None and not 0 < timeout_s <= LONGEST_S:
        raise UsageError(
            f"a search cannot take {timeout_s} seconds", where="timeout_s", hint="give a number of seconds above 0"
        )
    for value in _within([*texts, settings, filter]):
        match value:
            case str() if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
                raise UsageError(
                    "the query or its filter holds a character that no text can hold",
                    where="search",
                    hint="leave out NUL and lone surrogates",
                )
            case float() if not math.isfinite(value):
                raise UsageError(
                    f"the filter compares with {value}", where="filter", hint="compare with a number, or with a text"
                )


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
