"""What an index will hold once a change set is applied, as far as the next batch has to know it."""

from __future__ import annotations

from cdcsync.model.changeset import ChangeSet
from cdcsync.model.rows import Key
from tests.support.indexes import changes, document, kept


def test_documents_that_are_written_have_their_new_hash_and_the_others_theirs() -> None:
    written = document("1", "new")
    batch = changes(written, document("2"), kept("3", "5"), deleted=["4"], absent=["5"])
    before: dict[Key, bytes] = {(str(key),): b"old" for key in range(1, 7)}
    assert batch.hashes_after(before) == {("1",): written.hash, ("3",): b"old", ("6",): b"old"}


def test_a_truncated_index_holds_only_what_is_written_after_it() -> None:
    written = document("1", "new")
    assert changes(written, truncated=True).hashes_after({("1",): b"old", ("2",): b"old"}) == {("1",): written.hash}


def test_of_a_table_that_was_truncated_among_many_nothing_is_left() -> None:
    batch = ChangeSet(False, [], [], [], {}, cleared=["public.a"])
    stored: dict[Key, bytes] = {("public.a", "1"): b"1", ("public.b", "1"): b"2"}
    assert batch.hashes_after(stored) == {("public.b", "1"): b"2"}
