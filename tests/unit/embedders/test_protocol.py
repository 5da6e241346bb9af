"""What an embedder's answers are checked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cdcsync import config
from cdcsync.embedders import make_embedder, validate
from cdcsync.errors import EmbedError, TextRejected


def vectors(n: int = 3, dimensions: int = 4) -> Any:
    return np.ones((n, dimensions), np.float32)


def test_one_finite_vector_a_text_is_valid() -> None:
    validate(vectors(), 3, 4)
    validate(vectors(0), 0, 4)


@pytest.mark.parametrize(("n", "dimensions"), [(2, 4), (3, 5), (4, 3)])
def test_another_number_of_vectors_or_dimensions_is_refused(n: int, dimensions: int) -> None:
    with pytest.raises(EmbedError, match=rf"shape \(3, 4\) for {n} texts of {dimensions} dimensions"):
        validate(vectors(), n, dimensions)


def test_another_element_type_is_refused() -> None:
    with pytest.raises(EmbedError, match="vectors of float64, not float32"):
        validate(vectors().astype(np.float64), 3, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_reject_their_texts(value: float) -> None:
    faulty = vectors()
    faulty[1, 3] = value

    with pytest.raises(TextRejected, match="the vector of text 2 of 3 has components that are infinite or not numbers"):
        validate(faulty, 3, 4)


def test_vectors_of_zeros_reject_their_texts() -> None:
    faulty = vectors()
    faulty[1:] = 0

    with pytest.raises(TextRejected, match="the vector of text 2 of 3 is all zeros"):
        validate(faulty, 3, 4)


async def test_an_embedder_passes_its_own_check() -> None:
    made = make_embedder("h", config.HashEmbedder(dimensions=16))
    await made.open()

    validate(await made.embed(["one", "two"]), 2, 16)
    await made.aclose()
