"""Requests and answers, as callers send and read them: the types that /openapi.json describes."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from cdcsync.target.search import Mode

Vector = Annotated[list[float], msgspec.Meta(min_length=1, max_length=16_000)]


class SearchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search. The query is words, which are alternatives; "quoted phrases" must occur, -words must not.

    `generation` is the generation of vectors that `vector` was made for, as `/v1/embed` says it.
    """

    query: str
    k: int = 10
    mode: Mode = "hybrid"
    filter: dict[str, Any] = {}
    vector: Vector | None = None
    per_document: bool = True
    skip: int = 0
    after_lsn: str | None = None
    headline: bool = False
    generation: int | None = None


class Found(msgspec.Struct, frozen=True):
    """A hit; `vector_rank` and `text_rank` are its places among what each leg found."""

    key: dict[str, Any]
    columns: dict[str, Any]
    content: str
    score: float
    chunk_no: int
    distance: float | None = None
    vector_rank: int | None = None
    text_rank: int | None = None
    stale: bool = False
    headline: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The result of a search.

    :ivar as_of_lsn: the index holds everything that the source had committed up to here; null if that is not known.
    :ivar lag_seconds: how long ago the index was last known to hold everything; null if that is not known.
    :ivar warning: what the search had to do without, and why `as_of_lsn` is not known.
    :ivar left_out: hits that were found and cut to keep the answer short.
    :ivar generation: the generation of vectors that was searched.
    """

    index: str
    hits: list[Found]
    as_of_lsn: str | None
    lag_seconds: float | None
    warning: str | None = None
    left_out: int = 0
    generation: int | None = None


class Document(msgspec.Struct, frozen=True):
    """A document: its chunks in order."""

    index: str
    key: dict[str, Any]
    columns: dict[str, Any]
    chunks: list[str]
    etag: str
    left_out: int = 0


class ColumnInfo(msgspec.Struct, frozen=True):
    """A column that a filter can name."""

    name: str
    type: str
    examples: list[Any] = []


class IndexInfo(msgspec.Struct, frozen=True):
    """An index that can be searched.

    :ivar warning: why `as_of_lsn` and `lag_seconds` are not known: it is paused, being built or no longer followed.
    """

    name: str
    table: str
    key: list[ColumnInfo]
    columns: list[ColumnInfo]
    keywords: bool
    state: str
    as_of_lsn: str | None
    lag_seconds: float | None
    warning: str | None = None


class EmbedRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts to embed as queries."""

    index: str
    texts: list[str]


class Vectors(msgspec.Struct, frozen=True):
    """The vector of each text, in order, and the generation of the index's vectors that they can be compared with."""

    vectors: list[list[float]]
    generation: int


class Indexes(msgspec.Struct, frozen=True):
    """The indexes that can be searched."""

    indexes: list[IndexInfo]
