"""What a row of the table of indexes says of its index."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.target.entries import Entry

WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def entry(**facts: Any) -> Entry:
    made = Entry(
        *("t", "slot", "public.t", "public.v", ("id",), (), "", 1, "m", 8, "vector", "cosine", "live"), created_at=WHEN
    )
    return msgspec.structs.replace(made, **facts)


def test_an_index_that_was_exchanged_keeps_its_relations_under_their_stem() -> None:
    assert (entry().relations, entry().hidden) == ("t", False)
    assert (entry(stem="t~2").relations, entry(name="t~other").hidden) == ("t~2", True)


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, None),
        ({"state": "building", "reason": "waits for the lock"}, None),
        ({"state": "paused"}, ("no reason is stored", None)),
        ({"state": "paused", "reason": "the key is gone; add it", "remedy": "add it"}, ("the key is gone", "add it")),
    ],
)
def test_only_a_paused_index_says_why_and_its_remedy_once(facts: dict[str, Any], told: tuple[str, str] | None) -> None:
    pause = entry(**facts, paused_at=WHEN).pause
    assert (None if pause is None else (pause.reason, pause.remedy)) == told


def test_what_was_never_looked_at_has_one_table_and_no_oids() -> None:
    assert (entry().tables, entry().oids, entry().leaves, entry().members) == (("public.t",), {}, frozenset(), ())
    assert entry(table_oid=7).oids == {"public.t": 7}


def test_its_own_table_comes_first_and_each_has_its_oid() -> None:
    made_of = {"tables": {"public.a": {"oid": 3}, "public.t": {"oid": 5, "leaves": {"8": []}, "where": "x > 1"}}}
    found = entry(made_of=made_of, table_oid=7, sent_by={"tables": {"b": {}, "a": {}}})
    assert found.tables == ("public.t", "public.a")
    assert found.oids == {"public.a": 3, "public.t": 7}  # the row's own OID is the newer one
    assert (found.leaves, found.where, found.members) == (frozenset({"8"}), "x > 1", ("a", "b"))


def test_conditions_are_those_of_related_rows_at_any_depth_too() -> None:
    section = {"where": "a", "related": {"r": {"where": "b", "related": {"s": {"where": "c"}, "u": {}}}}}
    assert entry(configuration=section).conditions == {"a", "b", "c"}
    assert entry().conditions == frozenset()
