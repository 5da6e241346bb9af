"""An index of a few texts that applications search, and its model, which may be away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

import anyio
import msgspec

import cdcsync
import cdcsync.sync
from cdcsync.config import Config, HashEmbedder, PythonEmbedder, Source, Target
from cdcsync.documents.templates import hash_text
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from cdcsync.target.pipelines import Pipelines
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec, register
from tests.support.servers import Database

TEXTS = {
    "1": ("the cat sleeps on the warm sofa", "a cat dreams"),
    "2": ("the dog guards the house",),
    "3": ("the night train to the coast",),
}


HASHING = Hashing("hash", HashEmbedder(dimensions=32))


class Model:
    """Embeds by hashing, unless it is told to be away, to refuse its callers or to be slow."""

    identity = "model:1"
    dimensions = 32
    away: ClassVar[bool] = False
    refuses: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    opened: ClassVar[int] = 0
    asked: ClassVar[list[str]] = []

    async def open(self) -> None:
        if Model.away:
            raise EmbedderUnavailable("nobody is at home")
        Model.opened += 1

    async def aclose(self) -> None:
        Model.opened -= 1

    async def embed(self, texts: Sequence[str], *, kind: str) -> object:
        assert kind == "query"
        if Model.away:
            raise EmbedderUnavailable("nobody is at home")
        if Model.refuses:
            raise EmbedderSetupError("401 the key has expired", hint="check that the key is right and may do this")
        if Model.slow:
            await anyio.sleep_forever()
        Model.asked.extend(texts)
        return HASHING.vectors(texts)


@asynccontextmanager
async def indexed(
    database: Database, *, filled: bool = True, **settings: object
) -> AsyncIterator[tuple[LiveIndex, Config]]:
    """Make an index of the texts, a document each, as a worker leaves it.

    :param filled: whether it has any.
    """
    spec = make_spec(dimensions=32, **settings)  # type: ignore[arg-type]
    spec = msgspec.structs.replace(spec, model="python:model:1")
    async with live_index(database, spec) as index:
        await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
        await register(index.connection, spec, slot="s")
        texts = [text for chunks in TEXTS.values() for text in chunks]
        vectors = {hash_text(text): vector for text, vector in zip(texts, HASHING.vectors(texts), strict=True)}
        documents = [document(key, *chunks, carried=(key,)) for key, chunks in TEXTS.items()]
        if filled:
            await index.apply(msgspec.structs.replace(changes(*documents), vectors=vectors))
        config = Config(
            source=Source(dsn=database.dsn),
            target=Target(dsn=database.dsn),
            embedders={"model": PythonEmbedder(class_=f"{__name__}:Model")},
            indexes={"articles": msgspec.structs.replace(spec.config, embedder="model")},
        )
        yield index, config


def keys(hits: Sequence[cdcsync.Hit]) -> list[object]:
    return [hit.key["id"] for hit in hits]
