"""Vectors on their way to the target."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cdcsync.documents.templates import hash_text
from cdcsync.model.changeset import ChangeSet
from tests.support.indexes import (
    OpenIndex,
    changes,
    document,
)

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
async def test_vectors_are_stored_to_the_last_bit_of_their_type(open_index: OpenIndex, vector_type: str) -> None:
    index = await open_index(vector_type=vector_type)
    batch = changes(document("1", "a"))
    numbers = "[0.1,-3.4028235e+38,1e-45]" if vector_type == "vector" else "[0.099975586,-65504,5.9604645e-08]"
    vector = np.array(json.loads(numbers), dtype=np.float32)
    await index.apply(ChangeSet(False, [], [], batch.documents, {hash_text("a"): vector}))
    assert await index.embedded() == {"a": [numbers]}
