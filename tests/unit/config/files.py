"""Configuration files to start from, and how these tests read and refuse them."""

from __future__ import annotations

from typing import Any

import pytest

from cdcsync.config import Config, Index, parse
from cdcsync.errors import ConfigError

SECTIONS = """
[embedders.test]
type = "hash"

[indexes.articles]
table = "articles"
text = "{title}"
embedder = "test"
"""
"""The least that a file holds. Text put before it is at top level; text after it is in the index."""


def read(text: str, **environ: str) -> Config:
    return parse(text, environ, where="cdcsync.toml")


def articles(more: str) -> Index:
    """Return the one index of the least file with more keys or tables after it."""
    return read(SECTIONS + more).indexes["articles"]


def refusal(text: str, **environ: str) -> ConfigError:
    """Return the error that the text gives; it names the file and holds the fix, always."""
    with pytest.raises(ConfigError) as refused:
        read(text, **environ)
    error = refused.value
    assert error.where == "cdcsync.toml"
    assert error.hint
    return error


def problems(text: str, **environ: Any) -> list[str]:
    """Return the lines that say what is wrong with the text."""
    error = refusal(text, **environ)
    first, *lines = error.message.split("\n")
    if not lines:
        return [first]
    assert first == f"{len(lines)} problems"
    return [line.strip() for line in lines]
