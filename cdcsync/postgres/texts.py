"""Texts that PostgreSQL can hold: any characters except NUL and lone surrogates.

A JSON document may hold both as escapes, so they reach us in what callers send.

Source: PostgreSQL, "Character Types"; RFC 8259, section 8.2.
"""

from __future__ import annotations

import re

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def is_text(value: str) -> bool:
    """Say whether PostgreSQL can hold a string, in a database whose encoding has its characters."""
    return _NO_TEXT.search(value) is None


def storable(value: str) -> str:
    """Return a text with a question mark for each character that no text of PostgreSQL can hold."""
    return _NO_TEXT.sub("?", value)
