"""The vectors that recall is measured with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from cdcsync.documents.templates import hash_text
from cdcsync.flows.evaluate.recall import evaluate
from cdcsync.flows.evaluate.sampling import sample_vectors
from cdcsync.target.ddl.names import Names
from tests.support.indexes import SCHEMA, changes, document
from tests.support.recalls import crowd, indexed

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_a_part_of_the_queries_are_vectors_that_changed_last(database: Database) -> None:
    async with indexed(database, crowd()) as (index, spec):
        names = Names(SCHEMA, spec.name)

        async def sampled() -> set[int]:
            return {id_ for id_, _ in await sample_vectors(index.connection, names, "public", spec, 20)}

        ((last,),) = await index.rows("SELECT max(chunk_id) FROM cdcsync.articles_vectors_1")
        await index.connection.execute(
            "UPDATE cdcsync.articles_vectors_1_settled SET stored_at = now() WHERE chunk_id <= 3"
        )
        assert {1, 2, 3} <= await sampled()
        texts = [f"fresh {at}" for at in range(2)]
        documents = [document(str(10_000 + at), text, carried=("1",)) for at, text in enumerate(texts)]
        made = {hash_text(text): np.ones(16, np.float32) for text in texts}
        await index.apply(msgspec.structs.replace(changes(*documents), vectors=made))
        chosen = await sampled()
    assert {1, 2, 3, last + 1, last + 2} <= chosen
    assert len(chosen) == 20


async def test_the_sample_is_as_large_as_asked_for_though_ids_have_gaps(database: Database) -> None:
    async with indexed(database, crowd(500)) as (index, spec):
        await index.connection.execute("DELETE FROM cdcsync.articles_vectors_1 WHERE chunk_id % 7 <> 0")
        found = await evaluate(index.connection, SCHEMA, spec, queries=30)
        every = await evaluate(index.connection, SCHEMA, spec, queries=400)
    assert found.queries == 30
    assert every.queries == 500 // 7
