"""The dry run of a replay: says what it would do by doing all of it but the writing.

    pages of rows ─► documents ─► those that differ ─► chunks ─► those without a vector ─► time and price

Of the embedding a single batch is done, to see how long that takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import anyio
import anyio.to_thread
import msgspec

from cdcsync.config import Config
from cdcsync.documents.chunks import Chunk, make_chunker
from cdcsync.documents.chunks.sizes import CHARACTERS_PER_TOKEN
from cdcsync.documents.templates import Rendering
from cdcsync.embedders import make_embedder
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import DocumentError, EmbedError
from cdcsync.flows.replay import Replay
from cdcsync.model.rows import Key, Row
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, speaking_of
from cdcsync.source.tables import SourceTable
from cdcsync.target.keys import stored_documents, texts_with_vector

PAGE_ROWS = 1_000
PAGE_BYTES = 4 * 1024 * 1024
"""Rows of a dry run in one query, and their size together."""

SAMPLE_TEXTS = 32
"""Texts embedded to see how long that takes: one batch."""


class Estimate(msgspec.Struct, frozen=True):
    """What a replay would do; tokens are estimated from characters, None means unknown.

    :ivar gone: keys that the source has no row of: they would leave the index.
    :ivar changed: documents whose text is another than the index's, or that the index lacks.
    :ivar embeddings: chunks whose vector would have to be made.
    :ivar price: of these embeddings, in the currency of the embedder's `price_per_million_tokens`.
    """

    index: str
    rows: int
    gone: int
    changed: int
    chunks: int
    tokens: int
    embeddings: int
    embedding_tokens: int
    seconds: float | None
    price: float | None = None


async def estimate(source: Connection, target: Connection, config: Config, spec: IndexSpec, replay: Replay) -> Estimate:
    """Say what a replay would do, by doing all of it but the writing; of the embedding, one batch."""
    embedder = make_embedder(spec.config.embedder, config.embedders[spec.config.embedder])
    chunker = make_chunker(spec.config.chunking, embedder.tokenizer_json, embedder.max_input_tokens)
    started = anyio.current_time()
    rows = gone = changed = chunks = characters = embeddings = to_embed = 0
    sample: dict[bytes, str] = {}
    try:
        async for keys, page in _pages(source, spec, replay):
            with speaking_of("target", where=f"index {spec.name}"):
                stored = await stored_documents(target, config.target.schema, spec, keys)
            present = {spec.shape.key_of(row): row for row in page}
            rows += len(page)
            gone += sum(1 for key in keys if key not in present and key in stored)
            documents = await anyio.to_thread.run_sync(_render_all, spec, page)
            hashes = [stored[key][1] if key in stored else None for key in present]
            differs = [made.hash != known for made, known in zip(documents, hashes, strict=True)]
            changed += sum(differs)
            cut = await anyio.to_thread.run_sync(chunker.split_all, documents, _leave_out)
            chunks += sum(map(len, cut))
            characters += sum(len(chunk.text) for document in cut for chunk in document)
            candidates = [
                chunk
                for document, differing in zip(cut, differs, strict=True)
                if differing or replay.rewrite or replay.force_embed
                for chunk in document
            ]
            new = candidates if replay.force_embed else await _without_vector(target, config, spec, candidates)
            embeddings += len(new)
            to_embed += sum(len(chunk.text) for chunk in new)
            for chunk in new[: SAMPLE_TEXTS - len(sample)]:
                sample[chunk.hash] = chunk.text
        reading_s = anyio.current_time() - started
        each_s = await _seconds_for_each(embedder, list(sample.values())) if sample else 0.0
    finally:
        with anyio.CancelScope(shield=True):
            await embedder.aclose()
    embedding_tokens = -(-to_embed // CHARACTERS_PER_TOKEN)
    each = getattr(config.embedders[spec.config.embedder], "price_per_million_tokens", None)
    return Estimate(
        index=spec.name,
        rows=rows,
        gone=gone,
        changed=changed,
        chunks=chunks,
        tokens=-(-characters // CHARACTERS_PER_TOKEN),
        embeddings=embeddings,
        embedding_tokens=embedding_tokens,
        seconds=None if each_s is None else round(_at_pace(reading_s, rows, replay) + each_s * embeddings, 3),
        price=None if each is None else embedding_tokens * each / 1_000_000,
    )


def _render_all(spec: IndexSpec, rows: Sequence[Row]) -> list[Rendering]:
    """Return what rows come to; one that a function fails for comes to nothing, as when it is applied."""
    made = []
    for row in rows:
        try:
            made.append(spec.render(row))
        except DocumentError:
            made.append(Rendering(""))
    return made


def _leave_out(place: int, error: DocumentError) -> None:
    """Count no chunks of a document that cannot be cut."""


def _at_pace(reading_s: float, rows: int, replay: Replay) -> float:
    return max(reading_s, rows / replay.max_rows_per_s) if replay.max_rows_per_s else reading_s


async def _pages(source: Connection, spec: IndexSpec, replay: Replay) -> AsyncIterator[tuple[Sequence[Key], list[Row]]]:
    """Yield the keys and rows of page after page."""
    table = SourceTable.of(spec)
    if replay.keys is not None:
        left = replay.keys
        while left:
            with speaking_of("source", where=str(spec.shape.table)):
                fitting = await table.fitting_keys(source, left[:PAGE_ROWS], PAGE_BYTES)
                page = await table.by_keys(source, left[:fitting])
            yield left[:fitting], page.rows
            left = left[fitting:]
        return
    after: Key | None = None
    while True:
        with speaking_of("source", where=str(spec.shape.table)):
            limit = await table.fitting(source, after, PAGE_ROWS, PAGE_BYTES, replay.where)
            page = await table.page(source, after, limit, replay.where)
        listed = [spec.shape.key_of(row) for row in page.rows]
        yield listed, page.rows
        if len(page.rows) < limit:
            return
        after = listed[-1]


async def _without_vector(target: Connection, config: Config, spec: IndexSpec, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks whose text has no vector yet, each text once."""
    distinct = {chunk.hash: chunk for chunk in chunks}
    with speaking_of("target", where=f"index {spec.name}"):
        known = await texts_with_vector(target, config.target.schema, spec, list(distinct))
    return [chunk for hash_, chunk in distinct.items() if hash_ not in known]


async def _seconds_for_each(embedder: Embedder, texts: list[str]) -> float | None:
    """Return how long the embedding of one text takes; None when the model does not answer."""
    try:
        await embedder.open()
        await embedder.embed(texts[:1])  # the first call alone pays for loading
        started = anyio.current_time()
        await embedder.embed(texts)
        return (anyio.current_time() - started) / len(texts)
    except EmbedError:
        return None
