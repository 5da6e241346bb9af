"""The configuration file: one TOML document, typed, with a default for everything a careful operator would choose.

    imports       functions and classes that are named as `package.module:Name`
    names         names of PostgreSQL objects as the file writes them
    redaction     what may be shown of a connection string
    values        the types of single values, with their ranges
    shape         the base of the sections: a Struct whose docstring describes its keys
    embedders     the sections of embedders
    related       related tables of an index
    rerankers     the sections of rerankers
    serving       the section of the tool server
    sections      `Config` and its other sections
    problems      collects the problems of a file
    checking      plain data into sections, reporting all problems in plain words
    environment   ${NAME} in texts
    reading       `load` and `parse`
    rendering     `render` and `schema`
    differences   how two configurations differ

Code outside this package imports from here. A file in it imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.config.embedders import (
    Embedder,
    HashEmbedder,
    OneEmbedder,
    OnnxEmbedder,
    OpenAIEmbedder,
    PythonEmbedder,
    RayEmbedder,
    RemoteEmbedder,
    SentenceTransformersEmbedder,
    TeiEmbedder,
    model_name,
    price_per_million_tokens,
    tokens_per_day,
)
from cdcsync.config.names import QualifiedName
from cdcsync.config.reading import load, parse
from cdcsync.config.redaction import redact_dsn
from cdcsync.config.related import Related, Via
from cdcsync.config.rendering import render, schema
from cdcsync.config.rerankers import Reranker, SentenceTransformersReranker, TeiReranker
from cdcsync.config.sections import Chunking, Config, Hnsw, Index, Source, Target, Worker
from cdcsync.config.serving import Serve, Tenant

__all__ = [
    "Chunking",
    "Config",
    "Embedder",
    "HashEmbedder",
    "Hnsw",
    "Index",
    "OneEmbedder",
    "OnnxEmbedder",
    "OpenAIEmbedder",
    "PythonEmbedder",
    "QualifiedName",
    "RayEmbedder",
    "Related",
    "RemoteEmbedder",
    "Reranker",
    "SentenceTransformersEmbedder",
    "SentenceTransformersReranker",
    "Serve",
    "Source",
    "Target",
    "TeiEmbedder",
    "TeiReranker",
    "Tenant",
    "Via",
    "Worker",
    "load",
    "model_name",
    "parse",
    "price_per_million_tokens",
    "redact_dsn",
    "render",
    "schema",
    "tokens_per_day",
]
