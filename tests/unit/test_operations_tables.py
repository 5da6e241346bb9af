"""Every row of the operations page on what is followed and what pauses is held by a test, which this names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCENARIOS = "tests/server/scenarios/"
FINGERPRINTS = "tests/server/source/test_fingerprints.py"
CHANGES, UNSENT, REFUSED, PARTITIONS = (
    f"{SCENARIOS}test_{name}.py" for name in ("schema_changes", "unsent_changes", "refused_values", "partitions")
)

HELD = {
    "columns that it does not need are added, dropped, renamed, moved": (CHANGES, "a column renamed that no index"),
    "the replica identity becomes FULL, or an index on the same key": (CHANGES, "the identity made an index"),
    "labels are added to an enum type": (FINGERPRINTS, "a label is added"),
    "`TRUNCATE`": (f"{SCENARIOS}test_truncations.py", "with its rows"),
    "a key or carried column gets another type": (CHANGES, "carried columns of other types"),
    "the key gets a type that its values cannot be converted to": (
        REFUSED,
        "test_a_key_that_cannot_be_converted_is_a_new_load",
    ),
    "a text column gets another type, or is dropped": (UNSENT, "a column dropped and added"),
    "a label of an enum is renamed, or a composite": (UNSENT, "an attribute added"),
    "it is dropped and made anew, or renamed away and back": (CHANGES, "the table dropped and made anew"),
    "it is rewritten": (UNSENT, "values by USING"),
    "the publication is edited, or the table leaves it and comes back": (UNSENT, "only inserts for a while"),
    "it leaves the publication": (CHANGES, "the table out of the publication"),
    "a partition is created or attached": (PARTITIONS, "test_rows_come_with_a_partition_that_is_attached"),
    "a partition is detached or dropped": (PARTITIONS, "test_rows_come_with_a_partition_that_is_attached"),
    "a partition is truncated by itself or rewritten": (FINGERPRINTS, "TRUNCATE public.p1"),
    "a column of the template, the key or the carried columns": (CHANGES, "a template column dropped"),
    "it gets another name or schema, or is dropped": (CHANGES, "the table moved"),
    "its replica identity or primary key": (CHANGES, "the primary key widened"),
    "other tables begin to inherit from it": (CHANGES, "a table that inherits"),
    "the publication stops sending a kind of change, or a column": (CHANGES, "test_a_publication_that_stops_sending"),
    "the worker's role may no longer read it": ("tests/server/preflight", "may not read"),
    "the table has no column": (CHANGES, "a carried column dropped"),
    "the table is called": (CHANGES, "the table renamed"),
    "the replica identity is": (CHANGES, "the identity gone"),
    "its key is": (CHANGES, "the primary key widened"),
    "the vectors of index": (f"{SCENARIOS}test_changed_models.py", "test_a_changed_embedder_without_the_one_before"),
    "the table was dropped": (CHANGES, "the table dropped"),
    "other tables inherit from the table now": (CHANGES, "a table that inherits"),
    "the publication does not send": (CHANGES, "test_a_publication_that_stops_sending"),
    "the role may not read": ("tests/server/preflight", "may not read"),
    "the target refuses a value": (REFUSED, "test_an_index_is_paused_by_a_value_that_the_target_refuses"),
    "the target refuses a value that is too long": (f"{SCENARIOS}test_values.py", "too long for the index"),
    "the target says, or the source says": (REFUSED, "the target says"),
    "its load failed": (REFUSED, "_load"),
    "its load was cancelled": (
        "tests/faults/test_schema_changes.py",
        "test_an_initial_load_that_was_cancelled_leaves_no_live_index",
    ),
    "the view has to change a column's type": (
        "tests/server/target/ddl/test_relations.py",
        "DependentObjectsStillExist",
    ),
}
"""By how the row begins: the file, and words of the test or of its case in there."""


def rows() -> list[str]:
    page = (ROOT / "docs/operations.md").read_text()
    section = page[page.index("### What is followed, and what pauses") : page.index("## After a gap")]
    cells = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    return [cell for cell in cells if cell not in ("What happens to the table", "Reason")]


def holder(row: str) -> tuple[str, str] | None:
    begins = [begin for begin in HELD if row.startswith(begin)]
    return HELD[max(begins, key=len)] if begins else None


@pytest.mark.parametrize("row", rows())
def test_every_row_is_held_by_a_test(row: str) -> None:
    found = holder(row)
    assert found is not None, f"no test is named for the row {row!r}"
    path, words = found
    files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("*.py"))
    assert any(words in re.sub(r'"\s*\n\s*"', "", file.read_text()) for file in files if file != Path(__file__)), words


def test_no_row_is_named_that_is_not_there() -> None:
    assert {begin for begin in HELD if not any(row.startswith(begin) for row in rows())} == set()
