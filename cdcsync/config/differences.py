"""How two configurations differ, key by key, as the keys are written in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from cdcsync.config.sections import Index

CONTENTS = ("text", "documents", "document_columns", "chunk_text", "chunking", "related", "where", "columns")
"""The keys of an index's section, and its tables, that decide what its chunks are."""

OF_A_GENERATION = (
    *("text", "documents", "document_columns", "chunk_text", "chunking", "related", "where"),
    *("embedder", "vector_type", "distance", "hnsw"),
)
"""The keys in which an index that stands beside another one may be unlike it."""

BOUND_TOGETHER = (("text", "documents", "document_columns", "chunk_text", "related"), ("chunking",), ("where",))
"""Those that a migration to other chunks changes, in groups of keys that make sense only together."""

SHOWN_CHARACTERS = 60
"""How much of a value a message shows."""


class KeyChange(msgspec.Struct, frozen=True):
    """A key whose value is another one; None is a value that was not there."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}"


def differences(one: Mapping[str, Any], other: Mapping[str, Any], *, path: str = "") -> Iterator[KeyChange]:
    """Yield the keys whose values differ, tables key by key."""
    for key in dict.fromkeys([*one, *other]):
        old, new = one.get(key), other.get(key)
        here = f"{path}.{key}" if path else key
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, path=here)
        elif old != new:
            yield KeyChange(here, old, new)


def as_stored(index: Index) -> dict[str, Any]:
    """Return an index's section as JSON holds it."""
    stored: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(index))
    return stored


def contents_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a section, as JSON holds it, that a migration to other chunks changes."""
    return {key: section[key] for key in CONTENTS if key != "columns" and key in section}


def made_as(index: Index, stored: Mapping[str, Any], keys: Sequence[str] = OF_A_GENERATION) -> Index:
    """Return an index's section with some keys as they are stored.

    :param stored: from `as_stored`, perhaps of an earlier version, which did not have all keys.
    """
    return msgspec.convert(as_stored(index) | {key: stored[key] for key in keys if key in stored}, Index)


def index_changes(stored: Mapping[str, Any], index: Index) -> list[KeyChange]:
    """Return where an index's section is not what it was.

    :param stored: from `as_stored`, perhaps of an earlier version, which did not have all keys.
    """
    usual = as_stored(Index(table=index.table, text=index.text, embedder=index.embedder))
    return list(differences(_filled(stored, usual), as_stored(index)))


def _filled(stored: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored values, with the defaults of keys that are not among them."""
    filled = dict(usual) | dict(stored)
    for key, value in usual.items():
        if isinstance(value, Mapping) and isinstance(stored.get(key), Mapping):
            filled[key] = dict(value) | dict(stored[key])
    return filled


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
