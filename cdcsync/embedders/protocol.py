"""The interface of embedders, and the checks of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from cdcsync.config.values import Distance as Distance
from cdcsync.errors import EmbedderSetupError, EmbedError, TextRejected
from cdcsync.model.vectors import unusable_rows

Vectors = npt.NDArray[np.float32]
"""`float32[n, dimensions]`, one row a text."""

Kind = Literal["document", "query"]
"""The role of a text: some models embed what is searched differently from what it is searched with."""


class Embedder(Protocol):
    """Turns texts into vectors.

    Everything but `embed` works before `open` and is cheap: a command that only needs to know about a model never
    loads it. The caller opens an embedder once before the first `embed` and closes it at the end.
    """

    @property
    def name(self) -> str:
        """The section's name in the configuration."""

    @property
    def identity(self) -> str:
        """Says all that decides the vectors: kind, model, revision, options. Equal identities give equal vectors."""

    @property
    def origin(self) -> str:
        """Where the model comes from, for people."""

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""

    @property
    def distance(self) -> Distance:
        """The distance that the model was made for."""

    @property
    def tokenizer_json(self) -> str | None:
        """The model's `tokenizer.json`; `None` where it has none or does not show it."""

    @property
    def max_input_tokens(self) -> int | None:
        """How many tokens of a document the model reads, without special tokens and prompt; `None`: any number."""

    @property
    def concurrency(self) -> int:
        """How many calls of `embed` may run at the same time: 1 where the model is on this machine."""

    def fitting(self, texts: Sequence[str]) -> int:
        """Return how many of these texts, from the first on, one call should have at most; at least 1 of any."""

    async def open(self) -> None:
        """Load or connect to what `embed` needs. Calling it again does nothing.

        :raises EmbedderUnavailable: it failed for a reason that passes.
        :raises EmbedderSetupError: the model or provider cannot be used as configured.
        """

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order.

        :raises EmbedderUnavailable: the model or provider fails as a whole, or is not open.
        :raises TextRejected: one of these texts cannot be embedded.
        :raises EmbedderSetupError: the model or provider cannot be used as configured.
        """

    async def aclose(self) -> None:
        """Give back memory and connections. The embedder can be opened again."""


WORD = "word"
"""A text that no model or provider can object to. An embedder that fails at it fails as a whole."""


def harmless(embedder: Embedder) -> str:
    """Return the text that an embedder is tried with: `WORD`, unless a class of the user's names another."""
    text: str = getattr(embedder, "harmless_text", WORD)
    return text


def require_model(embedder: Embedder, identity: str) -> None:
    """Check that an embedder makes vectors that can be compared with an index's.

    :param identity: that of the embedder that made the index's vectors.
    :raises EmbedderSetupError: it is another one.
    """
    if embedder.identity != identity:
        raise EmbedderSetupError(
            f"the index's vectors were made by {identity}, this embedder is {embedder.identity}",
            where=f"embedders.{embedder.name}",
            hint="search with the configuration that the worker runs with, or by words alone",
        )


def validate(vectors: Vectors, n: int, dimensions: int) -> None:
    """Check that an embedder gave one usable vector for each text.

    :param n: the number of texts.
    :raises EmbedError: the shape or element type is not `float32[n, dimensions]`.
    :raises TextRejected: some vectors could not be found by any search.
    """
    check_shape(vectors, n, dimensions)
    for at, fault in unusable_rows(vectors).items():
        raise TextRejected(f"the vector of text {at + 1} of {n} {fault}", hint=UNUSABLE_HINT)


def check_shape(vectors: Vectors, n: int, dimensions: int) -> None:
    """Check that an embedder gave `float32[n, dimensions]`.

    :raises EmbedError: it gave something else.
    """
    if vectors.shape != (n, dimensions):
        raise EmbedError(
            f"the embedder gave vectors of shape {vectors.shape} for {n} texts of {dimensions} dimensions",
            hint="check that the configured model is the one that answers",
        )
    if vectors.dtype != np.float32:
        raise EmbedError(f"the embedder gave vectors of {vectors.dtype}, not float32")


UNUSABLE_HINT = "look at the text; if it is an ordinary one, the model does not work on this device"
