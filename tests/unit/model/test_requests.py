"""What a request says of itself: whether it has ended, has read everything, and brings new texts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cdcsync.model.requests import OPEN, Request

DONE = Request(1, "articles", "initial", False, None, "done", "rows", None, 3, 3, None)


def changed(**fields: Any) -> Request:
    return msgspec.structs.replace(DONE, **fields)


@pytest.mark.parametrize(
    ("fields", "read_all"),
    [
        ({}, True),
        ({"kind": "resync", "phase": "orphans"}, True),
        ({"kind": "replay", "phase": "orphans"}, False),
        ({"keyed": True}, False),
        ({"filter": "tenant = 7"}, False),
        ({"up_to": ("9",)}, False),
        ({"state": "running"}, False),
        ({"state": "cancelled"}, False),
    ],
)
def test_a_request_has_read_all_if_it_is_done_and_was_about_the_whole_table(
    fields: dict[str, Any], read_all: bool
) -> None:
    assert changed(**fields).read_all is read_all


@pytest.mark.parametrize("state", [*OPEN, "done", "failed", "cancelled"])
def test_a_request_has_ended_once_it_is_not_open(state: str) -> None:
    assert changed(state=state).ended is (state not in OPEN)


def test_a_first_load_brings_new_rows_unless_it_chunks_those_that_are_there_again() -> None:
    assert (DONE.new, DONE.changes_texts) == (True, True)
    again, related, replay = changed(rewrite=True), changed(kind="related"), changed(kind="replay")
    assert (again.new, again.changes_texts) == (False, True)
    assert (related.new, related.changes_texts) == (False, True)
    assert (replay.new, replay.changes_texts) == (False, False)
