"""Embedding models and providers, each kind in a file of its own.

    protocol                the interface of embedders, and the checks of their answers
    foreign                 decodes what a provider sends, and what of foreign words may be repeated
    hashing                 feature hashing, without a model
    model_files             where a local model's files are
    pooling                 one vector from the vectors of a text's tokens
    description             what those files say about a model
    processors              how many processors this process may use
    passes                  how local models share them
    sentence_transformers   local models
    onnx                    local models without torch
    sizes                   how large a call may be, learnt from calls that failed
    pacing                  budgets and rate limits of a provider
    provider                requests over HTTP
    remote                  shared by the embedders over HTTP
    openai                  providers with OpenAI's interface
    tei                     Hugging Face's text-embeddings-inference
    python                  a class of the user's
    ray                     any other embedder on a Ray cluster: the worker's end
    ray_pool                the process that is connected to Ray
    export                  an ONNX file of a model (a command)
    reranking               rerankers, local and by text-embeddings-inference
    queries                 models as searches use them: soon, or not at all

Making an embedder is cheap and never imports torch; `open` loads what is heavy.

A file imports only from lines above its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.embedders.onnx import OnnxEmbedder
from cdcsync.embedders.openai import OpenAIEmbedder
from cdcsync.embedders.protocol import Distance, Embedder, Kind, Vectors, require_model, validate
from cdcsync.embedders.python import PythonEmbedder
from cdcsync.embedders.ray import RayEmbedder
from cdcsync.embedders.sentence_transformers import SentenceTransformersEmbedder
from cdcsync.embedders.tei import TeiEmbedder
from cdcsync.errors import EmbedderSetupError

__all__ = ["Distance", "Embedder", "Kind", "Vectors", "embedder_of", "make_embedder", "require_model", "validate"]


def embedder_of(sections: Mapping[str, config.Embedder], model: str, named: str) -> Embedder:
    """Return the configured embedder that makes vectors of a model, under any name.

    :param model: the identity of the model.
    :param named: the section that is looked at first.
    :raises EmbedderSetupError: none makes them, or that section cannot be used.
    """
    first: EmbedderSetupError | None = None
    for name in dict.fromkeys([named, *sections]):
        if name not in sections:
            continue
        try:
            embedder = make_embedder(name, sections[name])
            require_model(embedder, model)
        except EmbedderSetupError as error:
            first = first or error
        else:
            return embedder
    assert first is not None, "a configuration has an embedder"
    raise first


def make_embedder(name: str, settings: config.Embedder) -> Embedder:
    """Build the embedder that a section of the configuration describes.

    Blocks for as long as it takes to read a model's small files; they are downloaded if the model is not on this
    machine.

    :param name: the section's name: `minilm` for `[embedders.minilm]`.
    :raises EmbedderSetupError: the model is not to be found or not supported, or a package is missing.
    """
    match settings:
        case config.HashEmbedder():
            return HashEmbedder(name, settings)
        case config.SentenceTransformersEmbedder():
            return SentenceTransformersEmbedder(name, settings)
        case config.OnnxEmbedder():
            return OnnxEmbedder(name, settings)
        case config.OpenAIEmbedder():
            return OpenAIEmbedder(name, settings)
        case config.TeiEmbedder():
            return TeiEmbedder(name, settings)
        case config.PythonEmbedder():
            return PythonEmbedder(name, settings)
        case config.RayEmbedder():
            return RayEmbedder(name, settings, make_embedder(name, settings.embedder))
        case unreachable:
            assert_never(unreachable)
