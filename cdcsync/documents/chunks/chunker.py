"""The strategies by which documents are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from typing import Protocol, assert_never

import msgspec
from semantic_text_splitter import MarkdownSplitter, TextSplitter

from cdcsync.config import Chunking
from cdcsync.documents.chunks.framing import PORTION_CHARACTERS, PORTION_CHUNKS, Cutter, cut_framed
from cdcsync.documents.chunks.outline import CODE_RULES, CodeSplitter
from cdcsync.documents.chunks.sizes import WHITE_SPACE, Sizes
from cdcsync.documents.functions import ChunkFunction
from cdcsync.documents.templates import Rendering, hash_text
from cdcsync.errors import ConfigError, DocumentError

Failed = Callable[[int, DocumentError], None]
"""Called for a document that cannot be cut, with its place among those given and the reason."""


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A piece of a document: its number (from 0), its text, and `hash_text` of the text."""

    number: int
    text: str
    hash: bytes


class Chunker:
    """Cuts documents as an index's configuration says. Make it with `make_chunker`; safe to use from several threads.

    :ivar capacity: the most tokens in a chunk; `None` for the strategy `none`.
    :ivar fingerprint: says all that decides where documents are cut; under another fingerprint chunks may differ.
    :ivar by_code: whether a function of the user's cuts, which may take long.
    :ivar fallible: whether a document may come out as one that cannot be cut.
    """

    def __init__(
        self,
        chunking: Chunking,
        *,
        fingerprint: str,
        capacity: int | None,
        cutter: Callable[[int], Cutter],
        function: ChunkFunction | None,
    ) -> None:
        self.fingerprint = fingerprint
        self.capacity = capacity
        self.by_code = function is not None
        self.fallible = self.by_code or (chunking.max_chunks is not None and chunking.on_too_many == "error")
        self._chunking = chunking
        self._cutter = cutter
        self._function = function

    def split(self, document: Rendering | str) -> list[Chunk]:
        """Cut one document; a document of white space alone has no chunks.

        :raises DocumentError: it cannot be cut, or has too many chunks.
        """
        return self.split_all((document,))[0]

    def split_all(self, documents: Sequence[Rendering | str], failed: Failed | None = None) -> list[list[Chunk]]:
        """Cut many documents; the answer is in their order.

        The splitter uses all processors and releases the GIL: an event loop runs on while a worker thread is in here.

        :param failed: told of each document that cannot be cut, which then has no chunks.
        :raises DocumentError: one cannot be cut, and `failed` is not given.
        """
        rendered = [Rendering(one) if isinstance(one, str) else one for one in documents]
        pieces: list[list[str]] = []
        for place, document in enumerate(rendered):
            text = document.text.strip(WHITE_SPACE)
            try:
                pieces.append(self._pieces(text) if text else [])
            except DocumentError as error:
                _tell(failed, place, error)
                pieces.append([])
        most = self._chunking.max_chunks
        # One more tells that there are too many.
        texts = self._within(rendered, pieces, None if most is None else most + 1)
        for place, parts in enumerate(texts):
            if most is None or len(parts) <= most:
                continue
            if self._chunking.on_too_many == "error":
                _tell(failed, place, DocumentError(f"the document makes too many chunks, max_chunks is {most}"))
            texts[place] = parts[:most] if self._chunking.on_too_many == "truncate" else []
        return [[Chunk(number, text, hash_text(text)) for number, text in enumerate(parts)] for parts in texts]

    def _pieces(self, text: str) -> list[str]:
        if self._function is None:
            return [text]
        cut = [piece.strip(WHITE_SPACE) for piece in self._function.cut(text)]
        return [piece for piece in cut if piece]

    def _within(self, documents: Sequence[Rendering], pieces: Sequence[list[str]], most: int | None) -> list[list[str]]:
        """Return each document's chunks, none longer than the capacity, with what stands around each of them.

        :param most: how many chunks of a document are wanted; there may be more.
        """
        flat = [(place, piece) for place, parts in enumerate(pieces) for piece in parts[:most]]
        framed = any(document.before is not None for document in documents)
        if self.capacity is None:
            cut = [[documents[place].around(piece).strip(WHITE_SPACE)] for place, piece in flat]
        elif framed:
            cut = cut_framed([(documents[place], piece) for place, piece in flat], self.capacity, self._cutter, most)
        else:
            cut = self._cutter(self.capacity).cut([piece for _, piece in flat], most)
        texts: list[list[str]] = [[] for _ in documents]
        for (place, _), parts in zip(flat, cut, strict=True):
            texts[place] += parts
        return texts


def _tell(failed: Failed | None, place: int, error: DocumentError) -> None:
    if failed is None:
        raise error
    failed(place, error)


def make_chunker(
    chunking: Chunking, tokenizer_json: str | None, max_input_tokens: int | None, *, where: str = "chunking"
) -> Chunker:
    """Build the chunker of an index.

    :param tokenizer_json: the model's `tokenizer.json`; `None` where it has none.
    :param max_input_tokens: how many tokens of a text the model reads, special tokens not counted; `None`: any number.
    :param where: the config section, for errors.
    :raises ConfigError: the overlap is not smaller than the capacity, the tokenizer cannot be read, or there is no such
        function.
    """
    function = None if chunking.chunks is None else ChunkFunction(chunking.chunks, f"{where}.chunks")
    extras = "" if function is None else f" pieces of {function.fingerprint}"
    if chunking.max_chunks is not None:
        extras += f" at most {chunking.max_chunks} chunks, else {chunking.on_too_many}"
    if chunking.strategy == "none":
        return Chunker(chunking, fingerprint=f"none{extras}", capacity=None, cutter=_no_cutter, function=function)
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
    if chunking.strategy == "characters":
        sizes, limit = Sizes(None, where), max_input_tokens if tokenizer_json is not None else None

    @cache
    def cutter(room: int) -> Cutter:
        """Return what cuts within `room` tokens: the capacity, or what is left of it beside what stands around."""
        room = max(room, 1 + tokens.unseen)  # a splitter needs room for a token that it sees
        left = None if limit is None else limit - (capacity - room)
        repeated = overlap if room == capacity else min(overlap, (room - tokens.unseen) // 2)
        splitter = _splitter(chunking, sizes, room, repeated)
        if left is not None and chunking.strategy != "tokens":
            splitter = _CappedSplitter(splitter, tokens, left)
        return Cutter(
            lambda text: sizes.surely_fits(text, room) and (left is None or tokens.surely_fits(text, left)),
            splitter.chunk_all,
            room,
        )

    cutter(capacity)  # an unreadable tokenizer is found now
    rules = f"/{CODE_RULES}" if chunking.strategy == "code" else ""
    release = ".".join(metadata.version("semantic-text-splitter").split(".")[:2])
    return Chunker(
        chunking,
        fingerprint=f"{chunking.strategy}{rules} {capacity}-{overlap} limit {limit} "
        f"{tokens.fingerprint} semantic-text-splitter {release} portions {PORTION_CHARACTERS}-{PORTION_CHUNKS}{extras}",
        capacity=capacity,
        cutter=cutter,
        function=function,
    )


def _no_cutter(room: int) -> Cutter:
    raise AssertionError("the strategy none cuts nothing")


def _splitter(chunking: Chunking, sizes: Sizes, capacity: int, overlap: int) -> _Splitter:
    match chunking.strategy:
        case "tokens" | "characters":
            return sizes.splitter(TextSplitter, capacity, overlap)
        case "markdown":
            return sizes.splitter(MarkdownSplitter, capacity, overlap)
        case "code":
            return CodeSplitter(
                plain=sizes.splitter(TextSplitter, capacity, 0),
                ranked=sizes.splitter(TextSplitter, capacity, overlap),
            )
        case "none":
            raise AssertionError("the strategy none cuts nothing")
        case unreachable:
            assert_never(unreachable)


class _Splitter(Protocol):
    """Cuts trimmed texts."""

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
