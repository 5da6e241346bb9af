"""The stored outcome of evaluations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.target import evaluations
from cdcsync.target.evaluations import Evaluation, Measured
from tests.support import relations
from tests.support.indexes import SCHEMA
from tests.support.relations import rows

pytestmark = [pytest.mark.server, pytest.mark.anyio]

NOW = datetime.now(UTC)


def measured(*ef_search: int, k: int = 10, queries: int = 9, recall: float = 1.0, minute: int = 0) -> Evaluation:
    """Return an evaluation of the first generation; sessions have an ef_search of 40."""
    each = [Measured(one, recall, usual=one == 40, by_hnsw=False, mean_ms=1.0, p95_ms=2.0) for one in ef_search]
    return Evaluation("articles", 1, k, queries, 1.0, 2.0, each, NOW + timedelta(minutes=minute))


@pytest.fixture
async def registered(connection: Connection) -> Connection:
    """A session on a target that has one index."""
    return await relations.registered(connection)


async def stored(connection: Connection) -> list[tuple[object, ...]]:
    return await rows(
        connection, "SELECT generation, k, ef_search, usual, queries, recall FROM cdcsync.evaluations ORDER BY 1, 2, 3"
    )


async def test_the_last_outcome_of_each_kind_is_kept_and_the_usual_one_shown(registered: Connection) -> None:
    for found in (
        measured(20, 40),
        measured(40, queries=8, recall=0.9, minute=1),
        measured(40, k=3, queries=7, minute=2),
    ):
        assert await evaluations.store(registered, SCHEMA, found) is None
    assert await stored(registered) == [(1, 3, 40, True, 7, 1.0), (1, 10, 20, False, 9, 1.0), (1, 10, 40, True, 8, 0.9)]

    (shown,) = (await evaluations.latest(registered, SCHEMA, {"articles": 1, "notes": 1})).values()
    assert (shown.recall, shown.k, shown.ef_search, shown.queries, shown.by_hnsw) == (0.9, 10, 40, 8, False)
    assert shown.evaluated_at == NOW + timedelta(minutes=1)

    # Of another generation's vectors it says nothing.
    assert await evaluations.latest(registered, SCHEMA, {"articles": 2}) == {}
    await registered.execute("DELETE FROM cdcsync.indexes")
    assert await stored(registered) == []


async def test_what_was_measured_of_a_generation_is_forgotten_with_it(registered: Connection) -> None:
    await evaluations.store(registered, SCHEMA, measured(20, 40))
    await evaluations.forget(registered, SCHEMA, "articles", 2)
    assert len(await stored(registered)) == 2
    await evaluations.forget(registered, SCHEMA, "articles", 1)
    assert await stored(registered) == []
