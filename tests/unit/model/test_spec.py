"""What follows from an index's configuration and the facts of its table."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cdcsync.config import QualifiedName
from cdcsync.model.conditions import Where
from tests.support.indexes import make_spec


@pytest.mark.parametrize(
    ("row_filter", "where", "both"),
    [
        (None, None, None),
        ("a > 1", None, "(a > 1)"),
        (None, "b", "(b)"),
        ("a > 1 OR c", "b OR d", "(a > 1 OR c) AND (b OR d)"),
    ],
)
def test_rows_fulfil_both_the_publications_condition_and_the_indexes(
    row_filter: str | None, where: str | None, both: str | None
) -> None:
    spec = msgspec.structs.replace(make_spec(row_filter=row_filter), where=None if where is None else Where(where))
    assert spec.condition == both


def test_an_index_over_many_tables_is_one_of_each_in_the_order_of_their_names() -> None:
    spec = make_spec(key={"source_table": "text", "id": "bigint"})
    b, a = QualifiedName("tenant_b", "articles"), QualifiedName("tenant_a", "articles")
    many = msgspec.structs.replace(
        spec, shape=msgspec.structs.replace(spec.shape, many=True), members={b: "visible", a: None}
    )

    first, second = many.each

    assert (first.shape.table, first.shape.source, first.row_filter) == (a, "tenant_a.articles", None)
    assert (second.shape.table, second.shape.source, second.row_filter) == (b, "tenant_b.articles", "visible")
    assert spec.each == (spec,)


def test_vectors_that_no_search_would_find_are_left_out() -> None:
    spec = make_spec(distance="cosine")
    vectors = {
        b"good": np.ones(3, np.float32),
        b"zero": np.zeros(3, np.float32),
        b"nan": np.full(3, np.nan, np.float32),
    }

    assert list(spec.usable(vectors)) == [b"good"]
    assert set(spec.unusable(vectors)) == {b"zero", b"nan"}


def test_chunks_are_cut_by_the_embedder_that_they_were_cut_by_first() -> None:
    spec = make_spec()
    assert spec.cut_by == "hash"
    assert msgspec.structs.replace(spec, cutter="former").cut_by == "former"
    assert spec.vector_type == "vector(3)"
