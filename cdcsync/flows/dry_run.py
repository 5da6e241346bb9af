"""The dry run of a replay: does everything but write, and counts.

    pages of rows ─► documents ─► those that differ ─► chunks ─► those without a vector ─► time and price

Of the embedding a single batch is done, to see how long that takes.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from itertools import islice

import anyio
import anyio.to_thread
import msgspec

from cdcsync.config import Config, price_per_million_tokens
from cdcsync.documents.chunks import make_chunker
from cdcsync.documents.chunks.sizes import CHARACTERS_PER_TOKEN
from cdcsync.documents.templates import Rendering
from cdcsync.embedders import embedder_of as require_embedder
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import DocumentError, EmbedError
from cdcsync.flows.replay import Replay
from cdcsync.model.rows import Key, Row
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight import build_embedders
from cdcsync.preflight.generations import cuts, embedder_of
from cdcsync.source.many import source_table
from cdcsync.target.ddl.names import Names
from cdcsync.target.generations import Generation
from cdcsync.target.keys import stored_documents
from cdcsync.target.look_ups import texts_with_vector

PAGE_ROWS = 1_000
PAGE_BYTES = 4 * 1024 * 1024
"""Rows of a dry run in one query, and their size together."""

REMEMBERED_TEXTS = 1_000_000
"""Texts that are counted once although several documents have them: some 100 MB of hashes."""

SAMPLE_TEXTS = 32
"""Texts embedded to see how long that takes: one batch."""


class Estimate(msgspec.Struct, frozen=True):
    """The effects of a replay; tokens are estimated from characters, None means unknown.

    :ivar gone: keys that the source has no row of: they would leave the index.
    :ivar changed: documents whose text is another than the index's, or that the index lacks.
    :ivar embeddings: vectors that would have to be made, of all generations together.
    :ivar price: of these embeddings, in the currency of the embedders' `price_per_million_tokens`.
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


class Bounds(msgspec.Struct, frozen=True):
    """Where counting may stop: once so many texts would be embedded, or after so many seconds."""

    texts: int | None = None
    seconds: float | None = None


UNBOUNDED = Bounds()


class Count(msgspec.Struct):
    """The counts of a reading of a table.

    :ivar documents: those with a text that would be embedded.
    :ivar texts: distinct texts without a vector, of `text_characters` together; `sample` are the first of them.
    :ivar whole: whether all of the table was read.
    """

    rows: int = 0
    gone: int = 0
    changed: int = 0
    documents: int = 0
    chunks: int = 0
    characters: int = 0
    texts: int = 0
    text_characters: int = 0
    sample: dict[bytes, str] = {}
    seconds: float = 0.0
    whole: bool = True


async def estimate(source: Connection, target: Connection, config: Config, spec: IndexSpec, replay: Replay) -> Estimate:
    """Say what a replay would do, by doing all of it but the writing; of the embedding, one batch by each model."""
    embedders = build_embedders(config, [])
    live = embedder_of(Generation.of(spec, "ready"), embedders, spec.config.embedder)
    if live is None:
        require_embedder(config.embedders, spec.model, spec.config.embedder)
    assert live is not None
    spec = msgspec.structs.replace(spec, config=msgspec.structs.replace(spec.config, embedder=live))
    of_tokens = cuts(spec.documents.fingerprint, spec.config.chunking, embedders, live)
    cutter = embedders[next((name for name, own in of_tokens if own == spec.fingerprint), live)]
    counts: list[Count] = []
    tokens, price, longest_s = 0, None, 0.0
    try:
        for one, embedder in await embedded_generations(target, config.target.schema, spec, embedders):
            found = await count(source, target, config, one, replay, cutter)
            counts.append(found)
            each_s = await seconds_for_each(embedder, list(found.sample.values())) if found.sample else 0.0
            # The models work side by side.
            longest_s = math.inf if each_s is None else max(longest_s, each_s * found.texts)
            own_tokens, each = (
                tokens_of(found.text_characters),
                price_per_million_tokens(config.embedders[embedder.name]),
            )
            tokens += own_tokens
            price = price if each is None else (price or 0.0) + own_tokens * each / 1_000_000
    finally:
        with anyio.CancelScope(shield=True):
            for embedder in embedders.values():
                await embedder.aclose()
    first = counts[0]
    return Estimate(
        index=spec.name,
        rows=first.rows,
        gone=first.gone,
        changed=first.changed,
        chunks=first.chunks,
        tokens=tokens_of(first.characters),
        embeddings=sum(found.texts for found in counts),
        embedding_tokens=tokens,
        seconds=round(_at_pace(first, replay) + longest_s, 3) if math.isfinite(longest_s) else None,
        price=price,
    )


async def embedded_generations(
    target: Connection, schema: str, spec: IndexSpec, embedders: Mapping[str, Embedder]
) -> list[tuple[IndexSpec, Embedder]]:
    """Return the index with each generation that new texts get vectors in, and what makes them; the live one first.

    They get none where the configuration lacks the embedder. One without tables is yet to be filled, which whoever
    began the migration has confirmed; there is nothing to find in it either.
    """
    made: list[IndexSpec] = []
    for one in spec.searchable[1:]:
        with speaking_of("target", where=f"index {spec.name}"):
            table = Names(schema, one.relations).vectors(one.generation).as_string(target)
            if await fetch_value(target, "SELECT to_regclass(%s) IS NOT NULL", [table]):
                made.append(one)
    others = tuple(one for one in spec.others if one in made)
    spec = msgspec.structs.replace(spec, others=others, beside=spec.beside if spec.beside in made else None)
    embedded = [(spec, embedders[spec.config.embedder])]
    for one in others:
        name = embedder_of(Generation.of(one, "ready"), embedders, one.config.embedder)
        if name is not None:
            embedded.append((one, embedders[name]))
    return embedded


def tokens_of(characters: int) -> int:
    """Return about how many tokens texts of so many characters are."""
    return -(-characters // CHARACTERS_PER_TOKEN)


async def count(
    source: Connection,
    target: Connection,
    config: Config,
    spec: IndexSpec,
    replay: Replay,
    embedder: Embedder,
    *,
    stored: bool = True,
    bounds: Bounds = UNBOUNDED,
) -> Count:
    """Read rows and make chunks of them as a replay would, and count what would be embedded.

    :param embedder: the one whose tokens chunks are measured in; it need not be open.
    :param stored: whether the index has tables that rows can be compared with.
    """
    chunker = make_chunker(spec.config.chunking, embedder.tokenizer_json, embedder.max_input_tokens)
    started = anyio.current_time()
    found = Count()
    seen: set[bytes] = set()
    async for keys, page in _pages(source, spec, replay):
        hashes = await _stored_hashes(target, config, spec, keys) if stored else {}
        present = {spec.shape.key_of(row): row for row in page}
        found.rows += len(page)
        found.gone += sum(1 for key in keys if key not in present and key in hashes)
        documents = await anyio.to_thread.run_sync(_render_all, spec, page)
        differs = [made.hash != hashes.get(key) for key, made in zip(present, documents, strict=True)]
        found.changed += sum(differs)
        cut = await anyio.to_thread.run_sync(chunker.split_all, documents, _leave_out)
        found.chunks += sum(map(len, cut))
        found.characters += sum(len(chunk.text) for document in cut for chunk in document)
        candidates = [
            document
            for document, differing in zip(cut, differs, strict=True)
            if differing or replay.rewrite or replay.force_embed
        ]
        texts = {chunk.hash: chunk.text for document in candidates for chunk in document}
        known: set[bytes] = set()
        if stored and not replay.force_embed:
            known |= await _with_vector(target, config, spec, texts.keys() - seen)
        texts = {one: text for one, text in texts.items() if one not in known and one not in seen}
        found.documents += sum(any(chunk.hash in texts for chunk in document) for document in candidates)
        found.texts += len(texts)
        found.text_characters += sum(map(len, texts.values()))
        for one, text in islice(texts.items(), SAMPLE_TEXTS - len(found.sample)):
            found.sample[one] = text
        if len(seen) < REMEMBERED_TEXTS:
            seen.update(texts)
        found.seconds = anyio.current_time() - started
        if _enough(found, bounds):
            found.whole = False
            break
    return found


def _enough(found: Count, bounds: Bounds) -> bool:
    enough = bounds.texts is not None and found.texts > bounds.texts
    return enough or (bounds.seconds is not None and found.seconds > bounds.seconds)


async def _stored_hashes(target: Connection, config: Config, spec: IndexSpec, keys: Sequence[Key]) -> dict[Key, bytes]:
    """Return the hashes of the documents that the index has under these keys."""
    # Columns that are carried from now on are not there yet.
    bare = msgspec.structs.replace(spec, shape=msgspec.structs.replace(spec.shape, carried=()), carried_types=())
    with speaking_of("target", where=f"index {spec.name}"):
        stored = await stored_documents(target, config.target.schema, bare, keys)
    return {key: hash_ for key, (_, hash_) in stored.items()}


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


def _at_pace(found: Count, replay: Replay) -> float:
    return max(found.seconds, found.rows / replay.max_rows_per_s) if replay.max_rows_per_s else found.seconds


async def _pages(source: Connection, spec: IndexSpec, replay: Replay) -> AsyncIterator[tuple[Sequence[Key], list[Row]]]:
    """Yield the keys and rows of page after page."""
    table = source_table(spec)
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
        if len(page.rows) < limit and not page.more:
            return
        after = page.last or listed[-1]


async def _with_vector(target: Connection, config: Config, spec: IndexSpec, hashes: Collection[bytes]) -> set[bytes]:
    """Return those of the texts, by their hashes, that have a vector."""
    with speaking_of("target", where=f"index {spec.name}"):
        return await texts_with_vector(target, config.target.schema, spec, list(hashes))


async def seconds_for_each(embedder: Embedder, texts: list[str]) -> float | None:
    """Return how long the embedding of one text takes; None when the model does not answer."""
    try:
        await embedder.open()
        await embedder.embed(texts[:1])  # the first call alone pays for loading
        started = anyio.current_time()
        await embedder.embed(texts)
        return (anyio.current_time() - started) / len(texts)
    except EmbedError:
        return None
