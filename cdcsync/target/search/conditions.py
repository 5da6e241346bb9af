"""Conditions in SQL that the caller of a search writes."""

from __future__ import annotations

from cdcsync.errors import SetupError, UsageError
from cdcsync.postgres.conditions import check_filter


def check_where(where: str | None) -> None:
    """Refuse text that is not a single SQL condition.

    :raises UsageError: it is not.
    """
    if where is None:
        return
    if not where.strip():
        raise UsageError("the condition is empty", where="--where", hint="give one SQL condition, or leave it out")
    try:
        check_filter(where)
    except SetupError as error:
        raise UsageError(error.message, where=f"--where {where}", hint=error.hint) from None
