"""Which description of a table holds after transactions that were streamed before they committed."""

from __future__ import annotations

from cdcsync.model.descriptions import Descriptions
from cdcsync.pgoutput.messages import Column, Relation


def described(columns: str, oid: int = 1) -> Relation:
    return Relation(
        xid=None,
        oid=oid,
        namespace="public",
        name="articles",
        replica_identity="d",
        columns=tuple(Column(name == "id", name, 25, -1) for name in columns.split()),
    )


BEFORE, AFTER = described("id title"), described("id extra title")


def test_a_description_that_came_before_one_outside_holds_only_for_its_transaction() -> None:
    descriptions = Descriptions()
    streamed = descriptions.arrive()
    descriptions.take(AFTER, descriptions.arrive())
    assert descriptions.overtaken() == []
    descriptions.take(BEFORE, streamed)  # its transaction commits
    assert descriptions.overtaken() == [AFTER]
    assert descriptions.overtaken() == []


def test_a_description_that_came_later_holds_on() -> None:
    descriptions = Descriptions()
    descriptions.take(BEFORE, descriptions.arrive())
    streamed = descriptions.arrive()
    descriptions.take(AFTER, streamed)
    assert descriptions.overtaken() == []
    descriptions.take(BEFORE, descriptions.arrive())
    assert descriptions.overtaken() == []


def test_within_one_transaction_a_newer_description_comes_after_the_older_one() -> None:
    descriptions = Descriptions()
    first = descriptions.arrive()
    descriptions.take(BEFORE, descriptions.arrive())
    second = descriptions.arrive()
    for relation, number in ((BEFORE, first), (AFTER, second)):
        descriptions.take(relation, number)
    assert descriptions.overtaken() == []


def test_of_two_streamed_transactions_the_one_whose_description_came_last_is_right_whichever_commits_first() -> None:
    descriptions = Descriptions()
    first, second = descriptions.arrive(), descriptions.arrive()
    descriptions.take(AFTER, second)
    descriptions.take(BEFORE, first)
    other = described("id", oid=2)
    descriptions.take(other, descriptions.arrive())
    assert descriptions.overtaken() == [AFTER]


def test_a_description_in_a_transaction_that_is_not_committed_does_not_count() -> None:
    descriptions = Descriptions()
    streamed = descriptions.arrive()
    descriptions.arrive()  # its transaction is rolled back
    descriptions.take(BEFORE, streamed)
    assert descriptions.overtaken() == []
