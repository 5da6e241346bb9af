"""What became of the table of an index that exists."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cdcsync.config import QualifiedName
from cdcsync.preflight.following import missing_findings

TABLE = QualifiedName("public", "articles")
PLAN: Any = SimpleNamespace(name="articles", index=SimpleNamespace(table_name=TABLE))


def catalog(now: str | None = None) -> Any:
    """Return a catalog in which the table of OID 7 is called `now`, if it is there."""
    return SimpleNamespace(called={} if now is None else {7: QualifiedName.parse(now)})


def stored(table: str = "public.articles", oid: int | None = 7) -> Any:
    return SimpleNamespace(source_table=table, table_oid=oid)


def test_a_table_that_was_dropped_is_told_from_one_that_was_renamed() -> None:
    (dropped,) = missing_findings(PLAN, catalog(), stored())
    assert (dropped.level, dropped.where) == ("error", "indexes.articles.table")
    assert dropped.message == "the table public.articles was dropped"
    assert "take [indexes.articles] out" in (dropped.hint or "")

    (renamed,) = missing_findings(PLAN, catalog(now="public.posts"), stored())
    assert renamed.message == "the table public.articles is called public.posts now"
    assert "RENAME TO articles" in (renamed.hint or "")


@pytest.mark.parametrize(
    ("now", "statements"),
    [
        ("attic.articles", "ALTER TABLE attic.articles SET SCHEMA public"),
        ("attic.posts", "ALTER TABLE attic.posts RENAME TO articles; ALTER TABLE attic.articles SET SCHEMA public"),
    ],
)
def test_a_table_that_moved_is_told_the_statements_that_bring_it_back(now: str, statements: str) -> None:
    (moved,) = missing_findings(PLAN, catalog(now=now), stored())
    assert (moved.hint or "").startswith(f"{statements}, or ")


@pytest.mark.parametrize("entry", [None, stored(oid=None), stored(table="public.other")])
def test_nothing_is_said_of_a_table_that_the_index_never_had(entry: Any) -> None:
    assert missing_findings(PLAN, catalog(), entry) == []
