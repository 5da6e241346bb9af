"""Embedders and rerankers: that each can be made, and for `cdcsync check`, that its model does what it says."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from pathlib import Path

import anyio

from cdcsync.config import (
    Config,
    HashEmbedder,
    OnnxEmbedder,
    RayEmbedder,
    RemoteEmbedder,
    SentenceTransformersEmbedder,
    SentenceTransformersReranker,
)
from cdcsync.embedders import Embedder, make_embedder, validate
from cdcsync.embedders.model_files import INSTALL
from cdcsync.embedders.protocol import harmless
from cdcsync.embedders.reranking import Reranker, make_reranker
from cdcsync.errors import CdcsyncError, EmbedderSetupError
from cdcsync.preflight.findings import Finding


def build_embedders(config: Config, findings: list[Finding]) -> dict[str, Embedder]:
    """Make the configured embedders without loading a model; a failure is noted, and the others are still made."""
    embedders = {}
    for name, settings in config.embedders.items():
        try:
            embedders[name] = make_embedder(name, settings)
        except EmbedderSetupError as error:
            findings.append(Finding.of(error, f"embedders.{name}"))
    return embedders


def local_models(config: Config) -> list[str]:
    """Return the embedders whose model this process, or one of its own, would have to load."""
    light = RemoteEmbedder | HashEmbedder
    return [name for name, settings in config.embedders.items() if not isinstance(settings, light)]


async def examine_embedders(embedders: Mapping[str, Embedder], *, described: Collection[str] = ()) -> list[Finding]:
    """Embed a word with each model, all at the same time, and look at the vectors.

    :param described: embedders whose model is not loaded, which takes some 10 s each: making them has read its
        description.
    """
    findings: dict[str, Finding] = {}

    async def examine(name: str, embedder: Embedder) -> None:
        findings[name] = _describe(name, embedder) if name in described else await _examine(name, embedder)

    async with anyio.create_task_group() as tasks:
        for name, embedder in embedders.items():
            tasks.start_soon(examine, name, embedder)
    return [findings[name] for name in embedders]


async def examine_rerankers(config: Config, *, deep: bool) -> list[Finding]:
    """Score a word with each reranker that an index names, all at the same time.

    :param deep: with those that this process would have to load too, which takes some 10 s each.
    """
    named = {index.reranker for index in config.indexes.values()}
    findings: dict[str, Finding] = {}

    async def examine(name: str, reranker: Reranker) -> None:
        works = f"the reranker works, and orders up to {reranker.candidates} hits"
        findings[name] = await _tried(f"rerankers.{name}", reranker, lambda: reranker.score("word", ["word"]), works)

    async with anyio.create_task_group() as tasks:
        for name, settings in config.rerankers.items():
            if name in named and (deep or not isinstance(settings, SentenceTransformersReranker)):
                tasks.start_soon(examine, name, make_reranker(name, settings))
    return [findings[name] for name in config.rerankers if name in findings]


def unpinned(config: Config, embedders: Mapping[str, Embedder]) -> Iterator[Finding]:
    """Warn of models of the hub whose owner can exchange them, because their revision is not a commit."""
    told = "the revision of {} is not a commit, so its owner can exchange the model"
    for name, embedder in embedders.items():
        settings, key = config.embedders[name], "revision"
        if isinstance(settings, RayEmbedder):
            settings, key = settings.embedder, "embedder.revision"
        commit: str | None = getattr(embedder, "commit", None)
        if (
            isinstance(settings, SentenceTransformersEmbedder | OnnxEmbedder)
            and commit is not None
            and not _COMMIT.fullmatch(settings.revision or "")
        ):
            yield Finding.warning(
                f"embedders.{name}.{key}",
                f"{told.format(settings.model)}: another machine would make other vectors",
                f'revision = "{commit}" is the one that is used now',
            )
    for name, reranker in config.rerankers.items():
        if (
            isinstance(reranker, SentenceTransformersReranker)
            and not Path(reranker.model).expanduser().is_dir()
            and not _COMMIT.fullmatch(reranker.revision or "")
        ):
            yield Finding.warning(
                f"rerankers.{name}.revision", told.format(reranker.model), "name the commit that the hub shows"
            )


_COMMIT = re.compile(r"[0-9a-f]{40}")


def _describe(name: str, embedder: Embedder) -> Finding:
    missing: str | None = getattr(embedder, "missing_package", None)
    if missing is not None:
        return Finding.error(f"embedders.{name}", f"{missing} is not installed", INSTALL)
    return Finding.ok(
        f"embedders.{name}",
        f"{embedder.identity} makes {embedder.dimensions} dimensions; `check --deep` loads it too",
    )


async def _examine(name: str, embedder: Embedder) -> Finding:
    async def embed() -> None:
        validate(await embedder.embed([harmless(embedder)]), 1, embedder.dimensions)

    works = f"{embedder.identity} works, and makes {embedder.dimensions} dimensions"
    return await _tried(f"embedders.{name}", embedder, embed, works)


async def _tried(where: str, model: Embedder | Reranker, call: Callable[[], Awaitable[object]], works: str) -> Finding:
    """Open a model, make a call of it and close it; returns what went wrong, or that it works."""
    try:
        await model.open()
        await call()
    except CdcsyncError as error:
        return Finding.of(error, where)
    finally:
        with anyio.CancelScope(shield=True):
            await model.aclose()
    return Finding.ok(where, works)
