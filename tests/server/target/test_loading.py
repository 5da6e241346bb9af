"""Loading: what is copied straight into an index is as if it had been applied row by row."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdcsync.documents.templates import hash_text
from cdcsync.model.changeset import BACKFILL, ChangeSet
from cdcsync.target.loading import copy_text, fields, line, vector_rows
from tests.support.indexes import LiveIndex, Waits, changes, document, vector_of, vector_text

pytestmark = [pytest.mark.server, pytest.mark.anyio]


def new(made: ChangeSet, *texts: str) -> ChangeSet:
    """Return changes of documents that the index most likely does not have, some texts with their vectors."""
    return msgspec.structs.replace(made, new=True, vectors={hash_text(text): vector_of(text) for text in texts})


@given(st.lists(st.none() | st.text(st.sampled_from("\\\t\n\rNtnré ")), min_size=1))
@example(["\\N"])
def test_the_values_of_a_line_are_those_it_was_made_of(values: list[str | None]) -> None:
    assert fields(line(tuple(values), "last\n")) == (*values, "last")
    assert fields(copy_text("\\N") + "\n") == ("\\N",)


async def test_what_is_loaded_is_what_would_have_been_applied(index: LiveIndex) -> None:
    awkward = document("7", "a\tb\\c\nd\r", "two", carried=("3",), lsn=0x1_0000_00FF, lane=BACKFILL)
    loaded = changes(awkward, document("8", "one", carried=(None,), lane=BACKFILL))

    applied = await index.apply(new(loaded, "a\tb\\c\nd\r", "one"))

    assert (applied.chunks, applied.inline, applied.reused, applied.queued) == (3, 2, 0, 1)
    columns = "SELECT id, tenant, chunk_no, chunk_total, content, content_hash, document_hash, commit_lsn::text"
    there = await index.rows(columns + " FROM {chunks} ORDER BY 1, 3")
    assert await index.embedded() == {
        "a\tb\\c\nd\r": [vector_text("a\tb\\c\nd\r")],
        "one": [vector_text("one")],
    }
    assert await index.waiting() == [Waits("two", BACKFILL, 0)]
    assert await index.rows("SELECT DISTINCT tier FROM {vectors}") == [("settled",)]
    assert await index.faults() == []
    await index.connection.execute(
        "TRUNCATE cdcsync.articles_chunks, cdcsync.articles_vectors_1, cdcsync.articles_backlog"
    )
    await index.apply(loaded)
    assert await index.rows(columns + " FROM {chunks} ORDER BY 1, 3") == there


async def test_a_vector_of_an_equal_text_is_taken_over_and_not_made_again(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "same"), inline=["same"]))

    applied = await index.apply(new(changes(document("2", "same", "other", lane=BACKFILL))))

    assert (applied.reused, applied.queued) == (1, 1)
    assert await index.waiting() == [Waits("other", BACKFILL, 0)]
    assert await index.faults() == []


async def test_a_document_that_is_there_after_all_is_replaced_as_a_whole(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b", "c"), inline=["a", "b", "c"]))

    applied = await index.apply(new(changes(document("1", "a", lane=BACKFILL), document("2", "d", lane=BACKFILL)), "d"))

    assert applied.deleted == 2
    assert await index.texts() == {("1",): ["a"], ("2",): ["d"]}
    assert await index.faults() == []


@pytest.mark.parametrize("halves", [False, True])
def test_rows_have_the_binary_form_of_the_server(halves: bool) -> None:
    row = vector_rows([258], [b"0123456789abcdef"], np.array([[1.0, -2.0]], dtype=np.float32), halves=halves)
    numbers = b"\x3c\x00\xc0\x00" if halves else b"\x3f\x80\x00\x00\xc0\x00\x00\x00"
    head = b"\0\3" + b"\0\0\0\x08" + bytes(6) + b"\x01\x02" + b"\0\0\0\x10" + b"0123456789abcdef"
    assert row == head + (4 + len(numbers)).to_bytes(4) + b"\0\2\0\0" + numbers
