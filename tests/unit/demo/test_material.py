"""The demo's rows and configuration."""

from __future__ import annotations

from itertools import pairwise

from cdcsync.config import parse
from cdcsync.demo.material import CHANGES, CONFIG, MAX_CHARACTERS, read_entries, text_of


def test_the_rows_are_the_same_each_time_and_none_is_too_long() -> None:
    entries = read_entries(50)
    assert len(entries) == 50
    assert read_entries(20) == entries[:20]
    assert all(len(text_of(entry)) <= MAX_CHARACTERS for entry in entries)
    assert len({(entry.module, entry.name) for entry in entries}) == 50


def test_the_configuration_makes_the_document_that_the_demo_shows() -> None:
    (entry,) = read_entries(1)
    config = parse(CONFIG.format(dsn="postgresql://localhost/demo", directory="/tmp", model="m"), {}, where="the demo")
    row = {"name": entry.name, "signature": entry.signature, "doc": entry.doc}
    assert config.indexes["docs"].text.format(**row) == text_of(entry)


def test_each_change_begins_where_the_one_before_has_ended() -> None:
    assert CHANGES[0].before is None
    assert CHANGES[-1].after is None
    assert all(one.after is next_.before for one, next_ in pairwise(CHANGES))
