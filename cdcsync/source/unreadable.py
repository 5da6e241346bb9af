"""Rows that the server fails to read, told apart from those beside them.

One row can make a statement over many fail: a condition divides by zero or casts a text that is not a number, a
function raises, a value is damaged on disk or has no counterpart in UTF-8. No other row is affected: the row is found
by reading ever fewer keys at once, and the caller gets it with the reason in place of its values.

Source: PostgreSQL, "PostgreSQL Error Codes".
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import psycopg

from cdcsync.model.rows import Key, Unread
from cdcsync.postgres.errors import chosen, locked_out, of_a_statement, passing, without_values

T = TypeVar("T")

_OTHERS = re.compile("0.|10|2[4-8BD]|3[4BDF]|4[024]|5[3578]|72|F0|HV|XX")
"""Classes of errors that are not about a row. Left are cardinality (a subquery gives two rows), data, constraints (of a
domain), limits, functions of all languages (of PL/pgSQL: 20 if no branch of a CASE fits, 2F if no RETURN is reached),
and codes of an application's own."""

_SERVERS_WORDS = ("21", "22", "23", "54")
"""The message of a function's failure is its author's own, and may hold values."""

_DAMAGED = "XX001"

_SYNTAX = "42601"
"""Of a text that is read as a tsquery or an ltree, which the message quotes. A condition's own syntax was examined."""

_TOO_LARGE = "53400"
"""Of a document whose related rows take more than `temp_file_limit` to sort, say."""


def of_a_row(error: psycopg.Error) -> bool:
    """Say whether an error may be due to a single row that a statement reads, so that others can be read without it."""
    code = error.sqlstate
    if code is None:
        return False
    return _OTHERS.match(code) is None or code in (_DAMAGED, _SYNTAX, _TOO_LARGE) or chosen(error)


def of_no_trial(error: psycopg.Error) -> bool:
    """Say whether an error says nothing of what was tried: somebody holds a table locked, or the source fails."""
    held = locked_out(error) and not of_a_row(error)
    return held or (passing(error) and not of_a_statement(error, "source"))


async def read_apart(
    keys: Sequence[Key], read: Callable[[Sequence[Key]], Awaitable[T]]
) -> tuple[list[T], dict[Key, Unread]]:
    """Read keys in ever smaller parts; returns what was read, and which keys have rows that cannot be."""
    found: list[T] = []
    unread: dict[Key, Unread] = {}
    parts = [keys]
    while parts:
        part = parts.pop()
        try:
            found.append(await read(part))
        except psycopg.Error as error:
            if not of_a_row(error) or not part:
                raise
            if len(part) == 1:
                unread[part[0]] = Unread(_reason(error))
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
    return found, unread


def _reason(error: psycopg.Error) -> str:
    code = error.sqlstate or ""
    servers = (code[:2] in _SERVERS_WORDS or code in (_DAMAGED, _TOO_LARGE)) and not chosen(error)
    said = f": {without_values(error)}" if servers else ""
    return f"the source fails to read the row: {type(error).__name__} ({code}){said}"
