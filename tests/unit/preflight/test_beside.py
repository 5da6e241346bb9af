"""What is said of an index with chunks of two generations."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.config import Index
from cdcsync.config.differences import as_stored
from cdcsync.preflight.beside import beside_findings
from cdcsync.target.beside import contents_asked_for
from cdcsync.target.entries import Entry

OLD = Index(table="public.t", text="{a}", embedder="one")
NEW = msgspec.structs.replace(OLD, text="{a} {b}")
THIRD = msgspec.structs.replace(OLD, text="{b}")


def entry(name: str, section: Index, generation: int, **other: Any) -> Entry:
    facts = Entry(
        *(name, "slot", "public.t", "public.t_index", ("id",), (), "", generation, "m", 8, "vector", "cosine", "live"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        configuration=as_stored(section),
    )
    return msgspec.structs.replace(facts, **other)


OWN, OTHER = entry("t", OLD, 1), entry("t~other", NEW, 2)


@pytest.mark.parametrize(
    ("file", "own", "other", "level", "said"),
    [
        (OLD, OWN, None, None, ""),
        (OLD, OWN, OTHER, None, ""),
        (NEW, OWN, OTHER, "warning", "cdcsync migrate t activate"),
        (NEW, OWN, msgspec.structs.replace(OTHER, state="building"), "ok", "is being filled beside the live one"),
        (THIRD, OWN, OTHER, "warning", "(text); both stay as they are"),
        (NEW, entry("t", OLD, 1, declined=[contents_asked_for(OTHER)]), None, "warning", "were dropped (text)"),
        (THIRD, entry("t", OLD, 1, declined=[contents_asked_for(OTHER)]), None, None, ""),
    ],
)
def test_what_the_file_asks_for_and_what_to_do_is_said(
    file: Index, own: Entry, other: Entry | None, level: str | None, said: str
) -> None:
    findings = list(beside_findings("t", file, own, other))
    assert [one.level for one in findings] == ([] if level is None else [level])
    assert all(said in f"{one.message}; {one.hint}" for one in findings)
