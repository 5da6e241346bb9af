"""Texts of others on a terminal: names, messages and documents may hold characters that it acts on."""

from __future__ import annotations


def harmless(text: str, *, lines: bool = False) -> str:
    """Return a text with a dot for each character that a terminal acts on, or that shows nothing.

    :param lines: whether line breaks stay; else they become blanks.
    """
    if text.isprintable():
        return text
    text = text if lines else " ".join(text.splitlines())
    return "".join(one if one.isprintable() or one == "\n" else "·" for one in text)
