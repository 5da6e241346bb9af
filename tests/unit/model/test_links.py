"""How a change of a related row tells the documents that it belonged to, and those that it belongs to now."""

from __future__ import annotations

import pytest

from cdcsync.config import QualifiedName
from cdcsync.documents.related import RelatedRows, Step, TableFacts
from cdcsync.errors import IndexFault
from cdcsync.model.links import Link, LinkProjection, links_of
from cdcsync.model.rows import Shape
from cdcsync.pgoutput.messages import TOO_LARGE, UNCHANGED, Column, Relation

TICKETS = QualifiedName("public", "tickets")
COMMENTS, PEOPLE = QualifiedName("public", "comments"), QualifiedName("public", "people")
SHAPE = Shape("tickets", TICKETS, ("id",), (), ("title",))
REST = (None, (), (), "", 1, "", "")
"""What links do not look at."""
WAY = Step(COMMENTS, (("ticket_id", "id"), ("tenant", "tenant")))


def relation(*columns: str, key: tuple[str, ...]) -> Relation:
    described = tuple(Column(name in key, name, 25, -1) for name in columns)
    return Relation(None, 1, "public", "comments", "f", described)


@pytest.fixture
def projection() -> LinkProjection:
    columns = ("id", "ticket_id", "body", "tenant")
    return LinkProjection(Link(SHAPE, "comments", 3, (WAY,)), relation(*columns, key=columns))


def test_each_table_on_each_way_is_a_link_with_the_types_of_its_columns() -> None:
    author = RelatedRows(("comments", "author"), (Step(PEOPLE, (("id", "author_id"),)),), *REST)
    comments = RelatedRows(("comments",), (WAY,), *REST, (author,))
    facts = {COMMENTS: TableFacts(types={"ticket_id": "bigint"})}

    first, second = links_of(SHAPE, [comments], facts)

    assert (first.relation, first.table, first.place) == ("comments", COMMENTS, 0)
    assert first.types == {"ticket_id": "bigint", "tenant": "text"}
    assert (second.relation, second.table, second.place) == ("comments.author", PEOPLE, 1)
    assert second.steps == (WAY, Step(PEOPLE, (("id", "author_id"),)))


@pytest.mark.parametrize(
    ("on", "key", "of_link", "of_document", "places"),
    [
        ({"ticket_id": "id"}, ("id",), "integer", "bigint", (0,)),
        ({"ticket_id": "id"}, ("id",), "uuid", "uuid", (0,)),
        ({"b": "id", "a": "tenant"}, ("tenant", "id"), "bigint", "bigint", (1, 0)),
        ({"ticket_id": "id"}, ("id", "tenant"), "bigint", "bigint", ()),
        ({"id": "author"}, ("id",), "bigint", "bigint", ()),
        ({"a": "id", "b": "tenant"}, ("id",), "bigint", "bigint", ()),
        ({"a": "id", "b": "id"}, ("id",), "bigint", "bigint", ()),
        ({"ticket_id": "id"}, ("id",), "numeric", "bigint", ()),
        ({"ticket_id": "id"}, ("id",), "text", "text", ()),
    ],
)
def test_the_values_of_a_link_are_the_key_of_a_document_where_they_name_all_of_it_and_are_written_alike(
    on: dict[str, str], key: tuple[str, ...], of_link: str, of_document: str, places: tuple[int, ...]
) -> None:
    shape = Shape("tickets", TICKETS, key, (), ("title",))
    step = Step(COMMENTS, tuple(on.items()))
    facts = {
        COMMENTS: TableFacts(types=dict.fromkeys(on, of_link)),
        TICKETS: TableFacts(types=dict.fromkeys(on.values(), of_document)),
    }
    further = RelatedRows(("comments", "of"), (step,), *REST)
    first, second = links_of(shape, [RelatedRows(("comments",), (step,), *REST, (further,))], facts)
    assert (first.key, second.key) == (places, ())


def test_an_insert_and_a_delete_touch_the_documents_of_the_row(projection: LinkProjection) -> None:
    row = ("9", "1", "text", "a")
    for touch in (projection.inserted(row, 7, 8), projection.deleted(row, 7, 8)):
        assert (touch.place, touch.values, touch.xid, touch.lsn) == (3, (("1", "a"),), 7, 8)


def test_an_update_touches_where_the_row_was_and_where_it_is_each_once(projection: LinkProjection) -> None:
    before, after = ("9", "1", "text", "a"), ("9", "2", "text", "a")
    assert projection.updated("O", before, after, 7, 8).values == (("1", "a"), ("2", "a"))
    assert projection.updated("O", before, ("9", "1", "other", "a"), 7, 8).values == (("1", "a"),)
    assert projection.updated(None, None, after, 7, 8).values == (("2", "a"),)


def test_a_row_with_null_in_a_column_of_the_link_belongs_nowhere(projection: LinkProjection) -> None:
    assert projection.inserted(("9", None, "text", "a"), 7, 8).values == ()
    assert projection.updated("O", ("9", "1", "t", "a"), ("9", None, "t", "a"), 7, 8).values == (("1", "a"),)


def test_a_truncate_touches_every_document(projection: LinkProjection) -> None:
    assert projection.truncated(7, 8).values is None


def test_what_a_new_row_leaves_out_is_as_in_the_old_one(projection: LinkProjection) -> None:
    assert projection.updated("O", ("9", "1", "t", "a"), ("9", UNCHANGED, "t", "a"), 7, 8).values == (("1", "a"),)
    moved = projection.updated("O", ("9", "1", "t", "a"), ("9", UNCHANGED, "t", "b"), 7, 8)
    assert moved.values == (("1", "a"), ("1", "b")), "the place where the row is now is touched too"
    with pytest.raises(IndexFault, match="without the columns"):
        projection.updated(None, None, ("9", UNCHANGED, "t", "a"), 7, 8)


def test_a_value_too_large_to_look_documents_up_by_pauses_the_index_and_another_large_one_does_not(
    projection: LinkProjection,
) -> None:
    assert projection.inserted(("9", "1", TOO_LARGE, "a"), 7, 8).values == (("1", "a"),)
    with pytest.raises(IndexFault, match="larger than a sixteenth of the worker's memory"):
        projection.updated("O", ("9", "1", "t", "a"), ("9", TOO_LARGE, "t", "a"), 7, 8)


@pytest.mark.parametrize(
    ("columns", "key", "message"),
    [
        (("id", "ticket_id", "body", "tenant"), ("id", "ticket_id"), "does not cover"),
        (("id", "ticket_id", "body"), ("id", "ticket_id", "body"), "tenant"),
    ],
)
def test_a_table_that_does_not_tell_the_columns_of_the_link_pauses_the_index(
    columns: tuple[str, ...], key: tuple[str, ...], message: str
) -> None:
    with pytest.raises(IndexFault, match=message) as caught:
        LinkProjection(Link(SHAPE, "comments", 0, (WAY,)), relation(*columns, key=key))
    assert caught.value.index == "tickets"
    assert caught.value.hint
