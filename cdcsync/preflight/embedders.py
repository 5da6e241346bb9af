"""The embedders: that each can be made, and for `cdcsync check`, that its model loads and does what it says."""

from __future__ import annotations

from collections.abc import Mapping

import anyio

from cdcsync.config import Config
from cdcsync.embedders import Embedder, make_embedder, validate
from cdcsync.errors import CdcsyncError, EmbedderSetupError
from cdcsync.preflight.findings import Finding

PROBE = "cdcsync"
"""The text that a model has to embed: any word does."""


def build_embedders(config: Config, findings: list[Finding]) -> dict[str, Embedder]:
    """Make the configured embedders without loading a model; what stops one is noted, and the others go on."""
    embedders = {}
    for name, settings in config.embedders.items():
        try:
            embedders[name] = make_embedder(name, settings)
        except EmbedderSetupError as error:
            findings.append(Finding.of(error, f"embedders.{name}"))
    return embedders


async def examine_embedders(embedders: Mapping[str, Embedder]) -> list[Finding]:
    """Load each model, embed a word with it and look at the vector. Takes as long as that takes, some 10 s a model."""
    return [await _examine(name, embedder) for name, embedder in embedders.items()]


async def _examine(name: str, embedder: Embedder) -> Finding:
    where = f"embedders.{name}"
    try:
        await embedder.open()
        validate(await embedder.embed([PROBE]), 1, embedder.dimensions)
    except CdcsyncError as error:
        return Finding.of(error, where)
    finally:
        with anyio.CancelScope(shield=True):
            await embedder.aclose()
    return Finding.ok(where, f"{embedder.identity} works, and makes {embedder.dimensions} dimensions")
