"""Look-ups in one index: what it holds of a batch."""

from __future__ import annotations

import pytest

from cdcsync.documents.templates import hash_text
from tests.support.indexes import (
    LiveIndex,
    OpenIndex,
    changes,
    document,
    kept,
)
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_look_ups_by_key_use_the_index_whatever_the_type(target: Database, open_index: OpenIndex) -> None:
    target.execute("CREATE EXTENSION IF NOT EXISTS citext")
    for name, type_ in (("plain", "text"), ("folded", "public.citext")):
        index = await open_index(name=name, key={"id": type_}, search=None)
        await index.apply(changes(*[document(f"Key {number}", "a") for number in range(2_000)]))
        for table in ("chunks", "vectors_1", "backlog"):  # but not the session's own stage: nobody could
            await index.connection.execute(f"ANALYZE cdcsync.{name}_{table}")
        await index.connection.execute("SELECT pg_stat_force_next_flush()")
        (before,) = await index.rows(f"SELECT seq_scan FROM pg_stat_user_tables WHERE relname = '{name}_chunks'")

        await index.writer.stored_hashes([("Key 7",)])
        await index.apply(changes(document("Key 7", "b", existed=True), kept("Key 8", "5"), deleted=["Key 9"]))

        await index.connection.execute("SELECT pg_stat_force_next_flush()")
        (after,) = await index.rows(f"SELECT seq_scan FROM pg_stat_user_tables WHERE relname = '{name}_chunks'")
        assert (name, after) == (name, before)


async def test_hashes_are_those_of_whole_documents_in_the_index(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b"), document("2", "c"), document("3")))
    assert await index.writer.stored_hashes([]) == {}
    assert await index.writer.stored_hashes([("2",), ("1",), ("3",), ("4",)]) == {
        ("1",): hash_text("a\nb"),
        ("2",): hash_text("c"),
    }
