"""What can be said of an index by its section and its model alone."""

from __future__ import annotations

import pytest

from cdcsync.config import HashEmbedder, Index
from cdcsync.config.sections import Hnsw
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.preflight.indexes import model_faults


def faults(dimensions: int = 64, **settings: object) -> list[tuple[str, str | None]]:
    index = Index(**{"table": "articles", "text": "{body}", "embedder": "model"} | settings)  # type: ignore[arg-type]
    model = Hashing("model", HashEmbedder(dimensions=dimensions))
    return [(one.where, one.hint) for one in model_faults("articles", index, model)]


@pytest.mark.parametrize(
    ("dimensions", "vector_type", "hint"),
    [
        (2_000, "vector", None),
        (2_001, "vector", 'set indexes.articles.vector_type = "halfvec"'),
        (4_000, "halfvec", None),
        (4_001, "halfvec", "name an embedder that makes at most 4,000 dimensions"),
        (4_001, "vector", "name an embedder that makes at most 4,000 dimensions"),
    ],
)
def test_vectors_that_are_too_long_for_the_index_are_told_with_the_type_that_holds_them(
    dimensions: int, vector_type: str, hint: str | None
) -> None:
    told = [] if hint is None else [("indexes.articles.vector_type", hint)]
    assert faults(dimensions, vector_type=vector_type) == told


def test_signs_alone_do_not_tell_distances_that_go_by_length() -> None:
    signs = Hnsw(quantise="binary")
    assert faults(hnsw=signs) == faults(hnsw=signs, distance="inner_product") == []
    ((where, hint),) = faults(hnsw=signs, distance="l2")
    assert where == "indexes.articles.hnsw.quantise"
    assert 'distance = "cosine"' in str(hint)
