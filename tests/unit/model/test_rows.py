"""Projections: from a relation's tuples to the rows, keys and moves that one index needs."""

from __future__ import annotations

import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import IndexFault
from cdcsync.model.rows import Delete, Projection, Row, Shape, Upsert, complete, fill
from cdcsync.pgoutput.messages import UNCHANGED, Column, OldKind, Relation, ReplicaIdentity, Tuple

TABLE = QualifiedName("public", "articles")
SHAPE = Shape(
    index="articles", table=TABLE, key=("tenant", "id"), carried=("author",), text=("title", "body", "author")
)
XID, LSN = 7, 70


def relation(*columns: str, key: str = "tenant id", identity: ReplicaIdentity = "d") -> Relation:
    return Relation(
        xid=None,
        oid=1,
        namespace=TABLE.schema,
        name=TABLE.name,
        replica_identity=identity,
        columns=tuple(Column(name in key.split(), name, 25, -1) for name in columns),
    )


# The relation's order is not the shape's, and it has a column that no index needs.
RELATION = relation("body", "id", "extra", "title", "tenant", "author")


def sent(
    *,
    tenant: str | None = "t",
    id: str | None = "1",
    author: str | None = "A",
    title: str | None = "T",
    body: str | None = "B",
    toast: str = "",
) -> Tuple:
    """A tuple in the relation's order; the columns named in `toast` are unchanged."""
    values = {"body": body, "id": id, "extra": "X", "title": title, "tenant": tenant, "author": author}
    return tuple(UNCHANGED if name in toast.split() else value for name, value in values.items())


def key_only(tenant: str | None = "t", id: str | None = "1") -> Tuple:
    """An old tuple as the default identity sends it: NULL outside the key."""
    return (None, id, None, None, tenant, None)


@pytest.fixture
def projection() -> Projection:
    return Projection(SHAPE, RELATION)


def test_a_shape_divides_a_row_by_role() -> None:
    row: Row = ("t", "1", "A", "T", "B", "A")

    assert SHAPE.columns == ("tenant", "id", "author", "title", "body", "author")
    assert SHAPE.key_of(row) == ("t", "1")
    assert SHAPE.carried_of(row) == ("A",)
    assert SHAPE.text_of(row) == ("T", "B", "A")


def test_an_insert_gives_the_row_in_the_order_of_the_shape(projection: Projection) -> None:
    change = projection.inserted(sent(), XID, LSN)

    assert change == Upsert(SHAPE, ("t", "1"), ("t", "1", "A", "T", "B", "A"), XID, LSN)


def test_a_shape_of_one_column_gives_rows_and_keys_of_one_value() -> None:
    shape = Shape(index="bare", table=TABLE, key=("id",), carried=(), text=())
    projection = Projection(shape, relation("body", "id", key="id"))

    assert projection.inserted(("B", "1"), XID, LSN) == Upsert(shape, ("1",), ("1",), XID, LSN)
    assert projection.deleted((None, "1"), XID, LSN) == Delete(shape, ("1",), XID, LSN)


@pytest.mark.parametrize(
    ("old_kind", "old", "new", "row", "moved_from"),
    [
        pytest.param(
            None, None, sent(title="U"), ("t", "1", "A", "U", "B", "A"), None, id="without an old tuple the key stays"
        ),
        pytest.param(
            None,
            None,
            sent(toast="body author"),
            ("t", "1", UNCHANGED, "T", UNCHANGED, UNCHANGED),
            None,
            id="unchanged values stay open",
        ),
        pytest.param(
            "K", key_only(id="0"), sent(), ("t", "1", "A", "T", "B", "A"), ("t", "0"), id="an old key that differs"
        ),
        pytest.param(
            "K",
            key_only(id="0"),
            sent(toast="body"),
            ("t", "1", "A", "T", UNCHANGED, "A"),
            ("t", "0"),
            id="an old key says nothing of other columns",
        ),
        pytest.param(
            "K",
            key_only(),
            sent(toast="tenant body"),
            ("t", "1", "A", "T", UNCHANGED, "A"),
            None,
            id="a large key that did not change is in the old tuple only",
        ),
        pytest.param(
            "K",
            key_only(id="0"),
            sent(toast="tenant"),
            ("t", "1", "A", "T", "B", "A"),
            ("t", "0"),
            id="half of a key can change",
        ),
        pytest.param(
            "O",
            sent(title="S", body="old"),
            sent(toast="body"),
            ("t", "1", "A", "T", "old", "A"),
            None,
            id="a full old tuple tells unchanged values",
        ),
        pytest.param(
            "O",
            sent(tenant="s", author=None),
            sent(toast="body author"),
            ("t", "1", None, "T", "B", None),
            ("s", "1"),
            id="a full old tuple tells the old key and NULLs",
        ),
        pytest.param("O", sent(), sent(), ("t", "1", "A", "T", "B", "A"), None, id="a full old tuple of the same key"),
    ],
)
def test_an_update_takes_from_the_old_tuple_what_that_knows(
    projection: Projection,
    old_kind: OldKind | None,
    old: Tuple | None,
    new: Tuple,
    row: Row,
    moved_from: tuple[str, ...] | None,
) -> None:
    change = projection.updated(old_kind, old, new, XID, LSN)

    assert change == Upsert(SHAPE, ("t", "1"), row, XID, LSN, moved_from)


@pytest.mark.parametrize("old", [key_only(), sent(body=None)], ids=["key", "full"])
def test_a_delete_needs_only_the_key(projection: Projection, old: Tuple) -> None:
    assert projection.deleted(old, XID, LSN) == Delete(SHAPE, ("t", "1"), XID, LSN)


def test_an_old_row_without_its_key_is_an_error_that_names_the_identity(projection: Projection) -> None:
    for old_key in (key_only(id=None), key_only(tenant=None)):
        with pytest.raises(IndexFault, match="a DELETE arrived without its key") as deleting:
            projection.deleted(old_key, XID, LSN)
        with pytest.raises(IndexFault, match="an UPDATE arrived without its key") as updating:
            projection.updated("K", old_key, sent(), XID, LSN)
        for caught in (deleting, updating):
            assert caught.value.where == "public.articles"
            assert caught.value.hint is not None
            assert "replica identity that covers (tenant, id)" in caught.value.hint


def test_a_large_key_that_a_server_left_out_is_an_error(projection: Projection) -> None:
    with pytest.raises(IndexFault, match="an UPDATE arrived without its key") as caught:
        projection.updated(None, None, sent(toast="id"), XID, LSN)

    assert caught.value.hint is not None
    assert "minor release" in caught.value.hint


def test_a_relation_that_lacks_columns_is_an_error_that_names_them_once() -> None:
    with pytest.raises(IndexFault, match="column author, body is no longer in") as caught:
        Projection(SHAPE, relation("id", "tenant", "title"))

    assert (caught.value.index, caught.value.where) == ("articles", "public.articles")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("restore the column: the worker then reads the table again")


@pytest.mark.parametrize("identity", ["d", "i", "n", "f"])
@pytest.mark.parametrize("key", ["id", "id title", "id tenant title", ""])
def test_an_identity_other_than_the_indexs_key_is_an_error_unless_it_is_the_whole_row(
    key: str, identity: ReplicaIdentity
) -> None:
    described = relation("tenant", "id", "title", "body", "author", key=key, identity=identity)
    if identity == "f" and key == "id tenant title":
        Projection(SHAPE, described)
        return
    with pytest.raises(IndexFault, match="replica identity") as caught:
        Projection(SHAPE, described)

    assert (caught.value.index, caught.value.where) == ("articles", "public.articles")
    assert caught.value.passing
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("ALTER TABLE public.articles REPLICA IDENTITY DEFAULT")


def test_filling_takes_only_what_is_unchanged() -> None:
    row: Row = ("1", None, UNCHANGED, UNCHANGED, "x")

    filled = fill(row, ("0", "known", "known", UNCHANGED, "known"))

    assert filled == ("1", None, "known", UNCHANGED, "x")
    assert not complete(row)
    assert not complete(filled)


def test_a_complete_row_is_left_as_it_is() -> None:
    row: Row = ("1", None, "x")

    assert complete(row)
    assert fill(row, ("0", "0", "0")) is row


@pytest.mark.parametrize("old", [None, key_only(id="2")])
def test_a_row_with_null_in_its_key_is_an_error_that_passes(projection: Projection, old: Tuple | None) -> None:
    with pytest.raises(IndexFault, match=r"the key \(tenant, id\) contains NULL") as updated:
        projection.updated(None if old is None else "K", old, sent(id=None), XID, LSN)
    with pytest.raises(IndexFault, match="contains NULL") as inserted:
        projection.inserted(sent(tenant=None), XID, LSN)
    assert updated.value.passing
    assert inserted.value.passing
