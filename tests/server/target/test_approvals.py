"""Approvals of changes that embed many texts: for one change of one index, and once."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.config import QualifiedName
from cdcsync.model.conditions import Where
from cdcsync.postgres.sessions import Connection
from cdcsync.target.approvals import Approvals, change_of
from tests.support.indexes import SCHEMA, make_spec
from tests.support.relations import create

pytestmark = [pytest.mark.server, pytest.mark.anyio]

APPROVALS = Approvals(SCHEMA)
SPEC = make_spec(search=None)


async def test_before_the_first_start_nothing_is_approved(connection: Connection) -> None:
    assert not await APPROVALS.present(connection)
    assert not await APPROVALS.given(connection, "articles", change_of(SPEC))
    await APPROVALS.remove(connection, "articles")


async def test_an_approval_holds_for_one_change_until_it_is_spent(connection: Connection) -> None:
    await create(connection, SPEC)
    change = change_of(SPEC)
    for _ in range(2):
        await APPROVALS.give(connection, "articles", change, 12_000)
    assert await APPROVALS.given(connection, "articles", change)
    assert not await APPROVALS.given(connection, "notes", change)
    assert not await APPROVALS.given(connection, "articles", "another")
    await APPROVALS.spend(connection, "articles", "another")
    assert await APPROVALS.given(connection, "articles", change)
    await APPROVALS.spend(connection, "articles", change)
    assert not await APPROVALS.given(connection, "articles", change)


async def test_the_approvals_of_an_index_go_with_it(connection: Connection) -> None:
    await create(connection, SPEC)
    for index in ("articles", "notes"):
        await APPROVALS.give(connection, index, "a change", 12_000)
    await APPROVALS.remove(connection, "articles")
    assert not await APPROVALS.given(connection, "articles", "a change")
    assert await APPROVALS.given(connection, "notes", "a change")


def test_another_change_is_what_makes_other_documents_chunks_or_vectors() -> None:
    shape = msgspec.structs.replace(SPEC.shape, table=QualifiedName("public", "other"))
    others = [
        msgspec.structs.replace(SPEC, shape=shape),
        msgspec.structs.replace(SPEC, fingerprint="another"),
        msgspec.structs.replace(SPEC, model="another"),
        msgspec.structs.replace(SPEC, where=Where("NOT draft")),
    ]
    assert len({change_of(one) for one in (SPEC, *others)}) == 5
    assert change_of(msgspec.structs.replace(SPEC, generation=2)) == change_of(SPEC)
