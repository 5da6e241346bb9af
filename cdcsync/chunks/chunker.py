"""The strategies by which documents are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Protocol, assert_never

import msgspec
from semantic_text_splitter import MarkdownSplitter, TextSplitter

from cdcsync.chunks.outline import CODE_RULES, CodeSplitter
from cdcsync.chunks.sizes import WHITE_SPACE, Sizes
from cdcsync.config import Chunking
from cdcsync.documents import hash_text
from cdcsync.errors import ConfigError


class Chunk(msgspec.Struct, frozen=True):
    """A piece of a document: its number (from 0), its text, and `hash_text` of the text."""

    number: int
    text: str
    hash: bytes


class Chunker:
    """Cuts documents by one strategy. Make it with `make_chunker`; safe to use from several threads.

    :ivar capacity: the most tokens in a chunk; `None` for the strategy `none`.
    :ivar fingerprint: says all that decides where documents are cut; under another fingerprint chunks may differ.
    """

    def __init__(
        self,
        *,
        fingerprint: str,
        capacity: int | None,
        fits: Callable[[str], bool],
        cut: Callable[[list[str]], list[list[str]]],
    ) -> None:
        self.fingerprint = fingerprint
        self.capacity = capacity
        self._fits = fits
        self._cut = cut

    def split(self, document: str) -> list[Chunk]:
        """Cut one document; a document of white space alone has no chunks."""
        return self.split_all((document,))[0]

    def split_all(self, documents: Sequence[str]) -> list[list[Chunk]]:
        """Cut many documents; the answer is in their order.

        The splitter uses all processors and releases the GIL: an event loop runs on while a worker thread is in here.
        """
        texts = [document.strip(WHITE_SPACE) for document in documents]
        pieces = [[text] if text else [] for text in texts]
        long = [place for place, text in enumerate(texts) if not self._fits(text)]
        if long:
            for place, parts in zip(long, self._cut([texts[place] for place in long]), strict=True):
                pieces[place] = parts
        return [[Chunk(number, text, hash_text(text)) for number, text in enumerate(parts)] for parts in pieces]


def make_chunker(
    chunking: Chunking, tokenizer_json: str | None, max_input_tokens: int | None, *, where: str = "chunking"
) -> Chunker:
    """Build the chunker of an index.

    :param tokenizer_json: the model's `tokenizer.json`; `None` where it has none.
    :param max_input_tokens: how many tokens of a text the model reads, special tokens not counted; `None`: any number.
    :param where: the config section, for errors.
    :raises ConfigError: the overlap is not smaller than the capacity, or the tokenizer cannot be read.
    """
    if chunking.strategy == "none":
        return Chunker(fingerprint="none", capacity=None, fits=lambda _: True, cut=lambda texts: [[t] for t in texts])
    capacity, overlap = chunking.max_tokens, chunking.overlap_tokens
    if max_input_tokens is not None:
        capacity = min(capacity, max_input_tokens)
    sizes = tokens = Sizes(tokenizer_json, where)
    if not 0 <= overlap < capacity - tokens.unseen:
        reason = f": the model reads {max_input_tokens} tokens" if capacity < chunking.max_tokens else ""
        raise ConfigError(
            f"chunks of at most {capacity} tokens cannot overlap by {overlap}",
            where=f"{where}.overlap_tokens",
            hint=f"set overlap_tokens below {capacity - tokens.unseen}{reason}",
        )
    limit: int | None = capacity
    splitter: _Splitter
    match chunking.strategy:
        case "tokens":
            splitter = sizes.splitter(TextSplitter, capacity, overlap)
        case "characters":
            sizes, limit = Sizes(None, where), max_input_tokens if tokenizer_json is not None else None
            splitter = sizes.splitter(TextSplitter, capacity, overlap)
        case "markdown":
            splitter = sizes.splitter(MarkdownSplitter, capacity, overlap)
        case "code":
            splitter = CodeSplitter(
                plain=sizes.splitter(TextSplitter, capacity, 0),
                ranked=sizes.splitter(TextSplitter, capacity, overlap),
            )
        case unreachable:
            assert_never(unreachable)
    if limit is not None and chunking.strategy != "tokens":
        splitter = _CappedSplitter(splitter, tokens, limit)
    rules = f"/{CODE_RULES}" if chunking.strategy == "code" else ""
    release = ".".join(metadata.version("semantic-text-splitter").split(".")[:2])
    return Chunker(
        fingerprint=f"{chunking.strategy}{rules} {capacity}-{overlap} limit {limit} "
        f"{tokens.fingerprint} semantic-text-splitter {release}",
        capacity=capacity,
        fits=lambda text: sizes.surely_fits(text, capacity) and (limit is None or tokens.surely_fits(text, limit)),
        cut=splitter.chunk_all,
    )


class _Splitter(Protocol):
    """What cuts trimmed texts."""

    def chunk_all(self, texts: list[str], /) -> list[list[str]]: ...


class _CappedSplitter:
    """Cuts as another splitter does, then trims, and cuts again whatever the model would not read whole.

    The other one measures something else than the pieces it ends in: characters, or text before it was trimmed.
    """

    def __init__(self, splitter: _Splitter, tokens: Sizes, limit: int) -> None:
        self._splitter = splitter
        self._tokens = tokens
        self._limit = limit
        self._again = tokens.splitter(TextSplitter, limit, 0)

    def chunk_all(self, texts: list[str], /) -> list[list[str]]:
        return [list(self._capped(parts)) for parts in self._splitter.chunk_all(texts)]

    def _capped(self, parts: list[str]) -> Iterator[str]:
        for part in parts:
            text = part.strip(WHITE_SPACE)
            if self._tokens.surely_fits(text, self._limit):
                yield text
            else:
                yield from self._again.chunks(text)
