"""Vectors that a search can find: what is checked is what PostgreSQL will hold.

Source: pgvector, src/vector.c and src/halfvec.c: distances add up in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cdcsync.config.values import Distance

FloatVector = npt.NDArray[np.float32]
"""`float32[dimensions]`, or `float32[n, dimensions]` of several."""

LEAST_SQUARES = 1e-30
"""The least sum of squares of a vector that cosine distance can tell from zero: pgvector adds them up in float32."""
MOST_SQUARES = 1e38
"""Above it, sums of squares overflow in float32 and every distance to the vector is NaN."""
MOST_HALF = 65_504.0
"""The largest number of a halfvec."""


def unusable(vector: FloatVector, stored: str = "vector", distance: Distance = "l2") -> str | None:
    """Return why no search would find a vector once it is stored, or None if it can be found.

    What is checked is what PostgreSQL will hold: a halfvec has fewer bits, and a smaller range.

    :param vector: `float32[dimensions]`.
    :param stored: the column's type, `vector` or `halfvec`.
    """
    if not np.isfinite(vector).all():
        return "has components that are infinite or not numbers"
    if stored == "halfvec":
        if (np.abs(vector) > MOST_HALF).any():
            return f"has components beyond {MOST_HALF:g}, the largest number of a halfvec"
        vector = vector.astype(np.float16).astype(np.float32)
    squares = float(np.square(vector, dtype=np.float64).sum())
    if squares == 0:
        return "is all zeros" + (" once it is stored as halfvec" if stored == "halfvec" else "")
    if squares > MOST_SQUARES:
        return "is so long that every distance to it overflows"
    if distance == "cosine" and squares < LEAST_SQUARES:
        return "is so short that its cosine distances are those of a vector of zeros"
    return None


def unusable_rows(vectors: FloatVector) -> dict[int, str]:
    """Return which of these vectors no search would find, and why; quick where there are none."""
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    suspects = np.flatnonzero(~((squares >= LEAST_SQUARES) & (squares <= MOST_SQUARES)))
    return {at: fault for at in suspects.tolist() if (fault := unusable(vectors[at]))}
