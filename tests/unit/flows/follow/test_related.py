"""Which documents the changes of related rows concern: how much is asked of the source for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest

from cdcsync.config import QualifiedName
from cdcsync.documents.related import Step
from cdcsync.flows.follow import related, sight
from cdcsync.flows.follow.related import KEYS_AT_ONCE, MOST_OF_A_BATCH, MOST_OF_ONE, VALUES_AT_FIRST, RelatedChanges
from cdcsync.flows.follow.sight import Sight
from cdcsync.model.batch import IndexChanges
from cdcsync.model.changeset import Rebuild
from cdcsync.model.links import Link, Touch, Values
from cdcsync.model.rows import Delete, Key
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.postgres.locking import LockedOut
from cdcsync.source.related import MOST_FILTERED
from tests.support.indexes import make_spec

pytestmark = pytest.mark.anyio

SPEC = make_spec(carried={})
LINK = Link(SPEC.shape, "customer", 0, (Step(QualifiedName("public", "customers"), (("id", "customer_id"),)),))

OF_THE_KEY = msgspec.structs.replace(LINK, place=1, key=(0,))


class Source:
    """Has so many documents of each customer."""

    def __init__(self, each: int) -> None:
        self.each = each
        self.answers: list[int] = []

    async def connection(self) -> None:
        return None

    async def keys(
        self, _: Any, link: Link, values: Sequence[Values], most: int
    ) -> tuple[Snapshot, dict[Values, list[Key]]]:
        found = min(self.each, most)
        self.answers.append(len(values) * found)
        return NOW, {value: [(f"{value[0]}.{at}",) for at in range(found)] for value in values}

    async def condition(self, _: Any, link: Link, values: Sequence[Values]) -> str | None:
        return f"{len(values)} customers" if len(values) <= MOST_FILTERED else None


def changed(rows: int, link: Link = LINK) -> IndexChanges:
    changes = IndexChanges(SPEC.shape)
    for row in range(rows):
        changes.add(Touch(SPEC.shape, link.place, ((str(row),),), 5, 10))
    return changes


NOW = Snapshot(10, 20, frozenset())


async def now(_: Any) -> Snapshot:
    return NOW


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(source: Source) -> RelatedChanges:
        monkeypatch.setattr(related, "LookUps", lambda *_: source)
        monkeypatch.setattr(sight, "current_snapshot", now)
        seen = Sight(SPEC, cast(Any, source), LockedOut("i", ()))
        made = RelatedChanges(SPEC, cast(Any, source), Deliveries(), seen)
        made._links = (LINK, OF_THE_KEY)
        return made

    return of


async def test_rows_with_few_documents_each_are_asked_for_by_the_hundred(asked: Any) -> None:
    source = Source(each=1)
    found = await asked(source).concerned(changed(4_000))
    assert (len(found.documents), found.rebuilds) == (4_000, [])
    assert len(source.answers) < 12


async def test_an_answer_has_a_bound_and_nothing_is_asked_once_all_documents_are_to_be_rebuilt(asked: Any) -> None:
    source = Source(each=100_000)
    found = await asked(source).concerned(changed(5_000))
    assert (found.documents, found.rebuilds) == ({}, [Rebuild("customer", None)])
    assert max(source.answers[1:]) <= KEYS_AT_ONCE
    assert source.answers[0] <= VALUES_AT_FIRST * (MOST_OF_ONE + 1)
    assert sum(source.answers) <= (MOST_FILTERED + VALUES_AT_FIRST) * (MOST_OF_ONE + 1)


async def test_a_document_of_several_rows_carries_the_position_of_the_last_change(asked: Any) -> None:
    class One(Source):
        async def keys(
            self, _: Any, link: Link, values: Sequence[Values], most: int
        ) -> tuple[Snapshot, dict[Values, list[Key]]]:
            return NOW, {value: [("the one",)] for value in values}

    changes = IndexChanges(SPEC.shape)
    for row, lsn in [("a", 10), ("b", 20), ("a", 40), ("c", 30)]:
        changes.add(Touch(SPEC.shape, 0, ((row,),), 5, lsn))
    found = await asked(One(each=1)).concerned(changes)
    assert {key: touch.lsn for key, touch in found.documents.items()} == {("the one",): 40}


async def test_rows_with_many_documents_each_become_a_request_that_names_them(asked: Any) -> None:
    found = await asked(Source(each=100_000)).concerned(changed(50))
    assert (found.documents, found.rebuilds) == ({}, [Rebuild("customer", "50 customers")])


async def test_rows_that_name_the_key_of_their_document_are_not_asked_for(asked: Any) -> None:
    source = Source(each=1)
    changes = changed(3_000, OF_THE_KEY)
    changes.add(Delete(SPEC.shape, ("7",), 6, 11))
    found = await asked(source).concerned(changes)
    assert (source.answers, found.rebuilds) == ([], [])
    assert found.documents.keys() == {(str(row),) for row in range(3_000) if row != 7}


async def test_more_keys_than_a_batch_takes_become_a_request(asked: Any) -> None:
    found = await asked(Source(each=1)).concerned(changed(MOST_OF_A_BATCH + 30, OF_THE_KEY))
    assert (len(found.documents), found.rebuilds) == (MOST_OF_A_BATCH, [Rebuild("customer", "30 customers")])
