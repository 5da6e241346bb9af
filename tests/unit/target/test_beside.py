"""The sections that an index is made by while it has chunks of two generations, or was given other ones up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.config import Chunking, Config, Index
from cdcsync.config.differences import as_stored, contents_of
from cdcsync.config.sections import Hnsw
from cdcsync.target.beside import contents_asked_for, declines, is_met_by, with_beside
from cdcsync.target.registry import Entry

OLD = Index(table="public.t", text="{a}", embedder="one", view="public.t_index")
NEW = msgspec.structs.replace(OLD, text="{a} {b}", embedder="two", chunking=Chunking(max_tokens=64), columns=("c",))


def entry(name: str, section: Index | None, **other: Any) -> Entry:
    facts = Entry(
        *(name, "slot", "public.t", "public.t_index", ("id",), (), "", 1, "m", 8, "vector", "cosine", "live"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        configuration=None if section is None else as_stored(section),
    )
    return msgspec.structs.replace(facts, **other)


def config(section: Index, *embedders: str) -> Config:
    made = {name: {"type": "hash", "dimensions": 8} for name in embedders or ("one", "two")}
    return msgspec.convert({"embedders": made, "indexes": {"t": as_stored(section)}}, Config)


def test_without_other_chunks_the_configuration_is_the_file() -> None:
    stored = {"t": entry("t", OLD), "u": entry("u", OLD)}
    assert with_beside(config(NEW), stored) == config(NEW)
    assert with_beside(config(NEW), {}) == config(NEW)
    assert with_beside(config(NEW), {"t": entry("t", None)}) == config(NEW)


@pytest.mark.parametrize("file", [OLD, NEW, msgspec.structs.replace(OLD, text="{c}", view="public.v")])
def test_both_keep_what_they_are_made_by_whatever_the_file_says(file: Index) -> None:
    made = with_beside(config(file), {"t": entry("t", OLD), "t~other": entry("t~other", NEW)}).indexes
    assert list(made) == ["t", "t~other"]
    for one, section in zip(made.values(), (OLD, NEW), strict=True):
        assert (one.text, one.embedder, one.chunking) == (section.text, section.embedder, section.chunking)
        assert (one.columns, one.view) == (file.columns, file.view)


def test_an_embedder_that_the_file_lacks_is_that_of_the_file() -> None:
    stored = {"t": entry("t", OLD), "t~other": entry("t~other", NEW)}
    made = with_beside(config(NEW, "two"), stored).indexes
    assert [one.embedder for one in made.values()] == ["two", "two"]


def test_chunks_that_were_given_up_are_not_made_in_place() -> None:
    declined = [contents_asked_for(entry("t~other", NEW))]
    own = entry("t", OLD, declined=declined)
    assert declines(NEW, own)
    made = with_beside(config(NEW), {"t": own}).indexes["t"]
    assert (made.text, made.chunking, made.embedder) == (OLD.text, OLD.chunking, NEW.embedder)
    another = msgspec.structs.replace(NEW, text="{b}")
    assert not declines(another, own)
    assert with_beside(config(another), {"t": own}).indexes["t"] == another
    assert "columns" not in contents_of(as_stored(NEW))


def test_what_a_build_may_use_is_not_what_is_asked_for() -> None:
    stored = entry("t~other", NEW)
    assert is_met_by(NEW, stored)
    assert is_met_by(msgspec.structs.replace(NEW, hnsw=Hnsw(build_memory="1GB", build_workers=4)), stored)
    assert not is_met_by(msgspec.structs.replace(NEW, hnsw=Hnsw(m=8)), stored)
    assert not is_met_by(OLD, stored)
    assert not is_met_by(NEW, entry("t", None))
