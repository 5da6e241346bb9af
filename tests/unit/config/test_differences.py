"""How two configurations differ, key by key."""

from __future__ import annotations

from cdcsync.config import Chunking, Index
from cdcsync.config.differences import KeyChange, as_stored, differences, index_changes

INDEX = Index(table="public.t", text="{a}", embedder="e", chunking=Chunking(max_tokens=100))


def test_keys_of_tables_are_named_as_in_the_file() -> None:
    other = Index(table="public.t", text="{b}", embedder="e", columns=("c",), chunking=Chunking(max_tokens=200))
    assert index_changes(as_stored(INDEX), other) == [
        KeyChange("text", "{a}", "{b}"),
        KeyChange("columns", [], ["c"]),
        KeyChange("chunking.max_tokens", 100, 200),
    ]
    assert index_changes(as_stored(INDEX), INDEX) == []


def test_a_key_that_an_earlier_version_did_not_have_had_its_default() -> None:
    stored = as_stored(INDEX)
    del stored["confirm_above_texts"], stored["chunking"]["overlap_tokens"]
    assert index_changes(stored, INDEX) == []
    other = Index(table="public.t", text="{a}", embedder="e", chunking=Chunking(max_tokens=100, overlap_tokens=9))
    assert index_changes(stored, other) == [KeyChange("chunking.overlap_tokens", 32, 9)]


def test_a_long_value_is_cut_when_it_is_shown() -> None:
    assert str(KeyChange("text", None, "x" * 100)) == f'text: nothing → "{"x" * 58}…'
    assert [str(one) for one in differences({"a": {"b": 1}}, {"a": {"b": [2, "c"]}})] == ['a.b: 1 → [2,"c"]']
