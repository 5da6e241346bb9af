"""The bars of a first load, from what the status says of an index."""

from __future__ import annotations

import pytest

from cdcsync.cli.loads import Bar, bars
from cdcsync.status.model import BackfillStatus, IndexStatus


def index(state: str, **facts: object) -> IndexStatus:
    return IndexStatus(state, None, "public.a", "public.a_index", **facts)  # type: ignore[arg-type]


def load(done: int, total: int | None) -> BackfillStatus:
    return BackfillStatus(1, "initial", "running", "rows", done, total, None, None)


@pytest.mark.parametrize(
    ("status", "rows", "vectors"),
    [
        (index("absent"), (0, None), (0, None)),
        (index("building", backfill=load(0, None)), (0, None), (0, None)),
        (index("building", backfill=load(5, 20), chunks=9, vectors=4), (5, 20), (4, 9)),
        (index("building", documents=20, chunks=30, vectors=12), (20, 20), (12, 30)),
        (index("live", documents=20, chunks=30, vectors=29), (20, 20), (29, 30)),
        (index("live", documents=0), (0, 0), (0, None)),
    ],
)
def test_rows_follow_the_load_and_vectors_the_chunks(
    status: IndexStatus, rows: tuple[int, int | None], vectors: tuple[int, int | None]
) -> None:
    assert bars("a", status) == [Bar("a: rows", *rows), Bar("a: vectors", *vectors)]


def test_after_the_last_vector_the_build_of_the_hnsw_index_is_named() -> None:
    _, vectors = bars("a", index("building", documents=20, chunks=30, vectors=30))
    assert vectors.note == "the HNSW index is being built"
