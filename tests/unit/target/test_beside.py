"""The sections that an index is made by while it has chunks of two generations, or was given other ones up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.config import Chunking, Config, Index
from cdcsync.config.differences import as_stored, contents_of
from cdcsync.config.sections import Hnsw
from cdcsync.target.beside import contents_asked_for, is_met_by, with_beside, without_declined
from cdcsync.target.entries import Entry

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
    made = with_beside(config(NEW), {"t": own}).indexes["t"]
    assert (made.text, made.chunking, made.embedder) == (OLD.text, OLD.chunking, NEW.embedder)
    assert "columns" not in contents_of(as_stored(NEW))


EDITS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "another template is asked for anew": ({"text": "{b}"}, {"text"}),
    "so is one with other related tables": ({"text": "{b}", "chunk_text": "{c}"}, {"text", "chunk_text"}),
    "a condition brings no template back": ({"where": "a > 1"}, {"where"}),
    "nor do other chunks": ({"chunking": Chunking(max_tokens=32)}, {"chunking"}),
    "nor does a column": ({"columns": ("d",)}, {"columns"}),
    "what the index has is asked for by nobody": ({"text": OLD.text, "chunking": OLD.chunking}, set()),
}


@pytest.mark.parametrize(("edit", "followed"), EDITS.values(), ids=EDITS)
def test_only_the_keys_that_changed_since_chunks_were_given_up_are_followed(
    edit: dict[str, Any], followed: set[str]
) -> None:
    own = entry("t", OLD, declined=[contents_asked_for(entry("t~other", NEW))])
    file = msgspec.structs.replace(NEW, **edit)
    made = without_declined(file, own)
    for key in ("text", "chunk_text", "chunking", "where"):
        assert getattr(made, key) == getattr(file if key in followed else OLD, key), key
    assert (made.columns, made.embedder) == (file.columns, file.embedder)


def test_a_key_that_an_earlier_version_did_not_have_does_not_bring_chunks_back() -> None:
    dropped = contents_of(as_stored(NEW))
    del dropped["chunk_text"]
    del dropped["chunking"]["overlap_tokens"]
    own = entry("t", OLD, declined=[dropped])
    assert without_declined(NEW, own).text == OLD.text
    assert without_declined(NEW, own).chunking == OLD.chunking


def test_what_a_build_may_use_is_not_what_is_asked_for() -> None:
    stored = entry("t~other", NEW)
    assert is_met_by(NEW, stored)
    assert is_met_by(msgspec.structs.replace(NEW, hnsw=Hnsw(build_memory="1GB", build_workers=4)), stored)
    assert not is_met_by(msgspec.structs.replace(NEW, hnsw=Hnsw(m=8)), stored)
    assert not is_met_by(OLD, stored)
    assert not is_met_by(NEW, entry("t", None))
