"""Conditions in SQL that a user writes."""

from __future__ import annotations

from cdcsync.errors import SetupError


def check_filter(where: str) -> None:
    """Refuse a filter that could not be one expression.

    :raises SetupError: it holds a statement separator or a comment.
    """
    if ";" in where or "--" in where or "/*" in where:
        raise SetupError("the filter holds more than one expression", where=where, hint="give one SQL condition")
