"""The sections of embedders: one Struct for each type, with the meaning, unit and default of every key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from cdcsync.config.shape import Section
from cdcsync.config.values import (
    ApiKey,
    ClassPath,
    ClusterAddress,
    Header,
    HeaderName,
    Milliseconds,
    Option,
    Seconds,
    Share,
    Text,
    Url,
)

MAX_DIMENSIONS = 16_000
"""pgvector's limit for a column of type vector."""

Dimensions = Annotated[int, Meta(ge=1, le=MAX_DIMENSIONS)]


class HashEmbedder(Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="hash"):
    """Deterministic feature hashing: no weights, for tests and benchmarks.

    :param dimensions: length of the vectors.
    :param latency_ms: milliseconds that each call pretends to take, to see what a slow model does.
    """

    dimensions: Dimensions = 256
    latency_ms: Milliseconds = 0.0


class SentenceTransformersEmbedder(
    Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="sentence-transformers"
):
    """A local model run by sentence-transformers.

    :param model: the model's name on its hub, or the path of a directory that holds it.
    :param revision: the hub's commit, branch or tag; without one, the newest that is there.
    :param device: "auto" picks an accelerator when there is one; else a torch device such as "cpu", "cuda:1" or "mps".
    :param dtype: the numbers that the model computes with; "auto" takes those of its files.
    :param backend: what runs the model: "torch", or "onnx" or "openvino", each of which needs an extra of
        sentence-transformers.
    :param dimensions: cut vectors to this length, for models that were trained for it (Matryoshka); empty keeps all.
    :param normalize: have vectors of length one also where the model's own steps do not make them so.
    :param document_prompt: put before each chunk when it is embedded; empty takes the model's own.
    :param query_prompt: put before each query when it is embedded; empty takes the model's own.
    :param trust_remote_code: run Python code that comes with the model. It can do what the worker can.
    :param pickled_weights: load weights that are not in the format safetensors, too. Such files can run code, which can
        do what the worker can.
    :param batch_size: the most texts in one forward pass; larger is faster on an accelerator until its memory is full.
    """

    model: Text
    revision: Text | None = None
    device: Text = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    backend: Literal["torch", "onnx", "openvino"] = "torch"
    dimensions: Dimensions | None = None
    normalize: bool = False
    document_prompt: str | None = None
    query_prompt: str | None = None
    trust_remote_code: bool = False
    pickled_weights: bool = False
    batch_size: Annotated[int, Meta(ge=1, le=10_000)] = 32

    def faults(self) -> Iterator[tuple[str, str]]:
        """The other backends decide on their numbers when they load an exported model."""
        if self.backend != "torch" and self.dtype != "auto":
            yield "dtype", f'must be "auto" with backend = "{self.backend}", got "{self.dtype}"'


class OnnxEmbedder(Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="onnx"):
    """A local model run by ONNX Runtime on processors, without torch.

    :param model: the model's name on its hub, or the path of a directory that holds it.
    :param revision: the hub's commit, branch or tag; without one, the newest that is there.
    :param file: the ONNX file in the model's directory; empty takes onnx/model.onnx, else model.onnx.
    :param dimensions: cut vectors to this length, for models that were trained for it (Matryoshka); empty keeps all.
    :param normalize: have vectors of length one also where the model's own steps do not make them so.
    :param document_prompt: put before each chunk when it is embedded; empty takes the model's own.
    :param query_prompt: put before each query when it is embedded; empty takes the model's own.
    :param batch_size: the most texts in one forward pass; passes are bounded by their tokens, too.
    """

    model: Text
    revision: Text | None = None
    file: Text | None = None
    dimensions: Dimensions | None = None
    normalize: bool = False
    document_prompt: str | None = None
    query_prompt: str | None = None
    batch_size: Annotated[int, Meta(ge=1, le=10_000)] = 32


PerDay = Annotated[int, Meta(ge=1, le=10**15)]
PerMinute = Annotated[int, Meta(ge=1, le=10**12)]
InputTokens = Annotated[int, Meta(ge=8, le=1_000_000)]


class RemoteEmbedder(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys that all providers over HTTP have in common."""

    model: Text
    dimensions: Dimensions
    max_input_tokens: InputTokens | None = None
    document_prefix: str = ""
    query_prefix: str = ""
    distance: Literal["cosine", "l2", "inner_product"] = "cosine"
    api_key: ApiKey = ""
    api_key_file: str = ""
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 4
    batch_texts: Annotated[int, Meta(ge=1, le=10_000)] = 128
    batch_tokens: Annotated[int, Meta(ge=1, le=100_000_000)] = 100_000
    timeout_s: Seconds = 60.0
    tokens_per_day: PerDay | None = None
    price_per_million_tokens: Annotated[float, Meta(ge=0, le=10**9)] | None = None
    headers: dict[HeaderName, Header] = msgspec.field(default_factory=dict)
    query: dict[Text, Text] = msgspec.field(default_factory=dict)
    document_body: dict[Text, Option] = msgspec.field(default_factory=dict)
    query_body: dict[Text, Option] = msgspec.field(default_factory=dict)

    own_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys of a request's body that have a setting of their own."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Report keys that contradict each other."""
        if self.api_key and self.api_key_file:
            yield "api_key_file", "cannot be used together with api_key"
        if (self.api_key or self.api_key_file) and "authorization" in {name.lower() for name in self.headers}:
            yield "headers", "cannot hold authorization together with a key"
        for name, body in (("document_body", self.document_body), ("query_body", self.query_body)):
            if twice := sorted(self.own_keys & body.keys()):
                yield name, f"cannot hold {', '.join(twice)}, which cdcsync sets itself"


class OpenAIEmbedder(
    RemoteEmbedder, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="openai"
):
    """A provider that answers as OpenAI's `/v1/embeddings` does: OpenAI, vLLM, Ollama, llama.cpp and many others.

    :param model: the model's name, as the provider knows it.
    :param dimensions: length of the model's vectors; every answer is checked for it.
    :param max_input_tokens: how many tokens of a text the model reads; larger chunks are cut. Empty is any number.
    :param document_prefix: put before each chunk, where the model asks for it.
    :param query_prefix: put before each query, where the model asks for it.
    :param distance: the distance that the model was made for.
    :param api_key: the key, sent as bearer token; empty sends none. Keep it out of the file: "${OPENAI_API_KEY}".
    :param api_key_file: a file that holds the key, read again for each request, so that it can be exchanged.
    :param concurrency: requests at the same time, each on a connection that is kept.
    :param batch_texts: the most texts in one request.
    :param batch_tokens: the most tokens in one request, by estimate.
    :param timeout_s: seconds that one request may take.
    :param tokens_per_day: the most tokens in a day (UTC), by estimate; loads stop at four fifths. Empty means no limit.
    :param price_per_million_tokens: what the provider asks, in any currency, for estimates; empty is unknown.
    :param headers: more headers for each request, such as a gateway asks for. They are treated as secrets.
    :param query: parameters after the address, such as api-version.
    :param document_body: more keys of the request for documents, such as input_type. Part of the model's identity.
    :param query_body: the same for queries.
    :param base_url: what comes before `/embeddings`.
    :param request_dimensions: ask the provider for vectors of `dimensions`, which only models trained for it can cut.
    :param encoding: how vectors travel; "base64" is a third as long, "float" is known to every server.
    :param requests_per_minute: the most requests in any minute; empty leaves it to the provider's answers.
    :param tokens_per_minute: the most tokens in any minute; empty leaves it to the provider's answers.
    """

    own_keys: ClassVar[frozenset[str]] = frozenset({"model", "input", "dimensions", "encoding_format"})

    base_url: Url = "https://api.openai.com/v1"
    request_dimensions: bool = False
    encoding: Literal["float", "base64"] = "float"
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None


class TeiEmbedder(RemoteEmbedder, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="tei"):
    """A server of Hugging Face's text-embeddings-inference; its `/info` must name the configured model.

    :param model: the model's name or path, as the server's `/info` says it.
    :param dimensions: length of the model's vectors; every answer is checked for it.
    :param max_input_tokens: how many tokens of a text the model reads; larger chunks are cut. Empty is any number.
    :param document_prefix: put before each chunk, where the model asks for it.
    :param query_prefix: put before each query, where the model asks for it.
    :param distance: the distance that the model was made for.
    :param api_key: the key, sent as bearer token; empty sends none. Keep it out of the file: "${TEI_API_KEY}".
    :param api_key_file: a file that holds the key, read again for each request, so that it can be exchanged.
    :param concurrency: requests at the same time, each on a connection that is kept.
    :param batch_texts: the most texts in one request; the server's own limit goes before it.
    :param batch_tokens: the most tokens in one request, by estimate.
    :param timeout_s: seconds that one request may take.
    :param tokens_per_day: the most tokens in a day (UTC), by estimate; loads stop at four fifths. Empty means no limit.
    :param price_per_million_tokens: what the provider asks, in any currency, for estimates; empty is unknown.
    :param headers: more headers for each request, such as a gateway asks for. They are treated as secrets.
    :param query: parameters after the address, such as api-version.
    :param document_body: more keys of the request for documents, such as input_type. Part of the model's identity.
    :param query_body: the same for queries.
    :param base_url: where the server is, without `/embed`.
    :param revision: the model's commit, as `/info` says it; empty takes any.
    :param normalize: have vectors of length one, as cosine distance and inner product want them.
    :param truncate: leave out what the model does not read of a text; false lists such a text as failed.
    """

    own_keys: ClassVar[frozenset[str]] = frozenset({"inputs", "normalize", "truncate"})

    base_url: Url
    revision: Text | None = None
    normalize: bool = True
    truncate: bool = False


class PythonEmbedder(Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="python"):
    """A class of your own, run in the worker's process with all that the worker may do: docs/embedders.md.

    :param class_: the class, as "package.module:Name"; Python must be able to import it where cdcsync runs.
    :param options: keyword arguments for the class: texts, numbers, true or false.
    """

    class_: ClassPath = msgspec.field(name="class")
    options: dict[str, Option] = msgspec.field(default_factory=dict)


OneEmbedder = HashEmbedder | SentenceTransformersEmbedder | OnnxEmbedder | OpenAIEmbedder | TeiEmbedder | PythonEmbedder
"""An embedder that one process runs."""


class RayEmbedder(Section, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="ray"):
    """Any other embedder, run by actors on the machines of a Ray cluster.

    :param embedder: what each actor runs: a section as any other embedder's.
    :param address: the cluster's head as host:port; "auto" is the cluster that this machine is a node of.
    :param actors_min: actors that are kept while there is nothing to do.
    :param actors_max: the most actors; there are as many as the queue keeps busy.
    :param tasks_in_flight: calls that each actor has at a time, so that the next is there when one is done.
    :param idle_s: an actor that had nothing to do for this many seconds is given back.
    :param timeout_s: seconds that one call may take; an actor that takes longer is replaced.
    :param cpus: processors that Ray sets aside for each actor; 0 takes none into account.
    :param gpus: GPUs that Ray sets aside for each actor; a fraction shares one.
    :param resources: other resources of Ray that each actor needs, by name: { a100 = 1 }. Empty is none.
    """

    embedder: OneEmbedder
    address: ClusterAddress = "auto"
    actors_min: Annotated[int, Meta(ge=1, le=1_000)] = 1
    actors_max: Annotated[int, Meta(ge=1, le=1_000)] = 4
    tasks_in_flight: Annotated[int, Meta(ge=2, le=100)] = 2
    idle_s: Seconds = 60.0
    timeout_s: Seconds = 300.0
    cpus: Share = 1.0
    gpus: Share = 0.0
    resources: Annotated[dict[Text, Share], Meta(min_length=1)] | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        """Fewer actors than are kept could not be."""
        if self.actors_max < self.actors_min:
            yield "actors_max", f"must be at least actors_min ({self.actors_min}), got {self.actors_max}"


Embedder = OneEmbedder | RayEmbedder


def tokens_per_day(settings: Embedder) -> int | None:
    """Return the most tokens that an embedder may have in a day; None means no limit."""
    if isinstance(settings, RayEmbedder):
        return tokens_per_day(settings.embedder)
    return settings.tokens_per_day if isinstance(settings, RemoteEmbedder) else None


def model_name(settings: Embedder) -> str:
    """Return the name that people know an embedder's model by."""
    match settings:
        case RayEmbedder():
            return model_name(settings.embedder)
        case HashEmbedder():
            return f"feature hashing, {settings.dimensions} dimensions"
        case PythonEmbedder():
            return settings.class_
        case _:
            # Of a directory the last two names: packages keep a model in one that is called "model".
            return "/".join(settings.model.split("/")[-2:]) if settings.model.startswith("/") else settings.model


def price_per_million_tokens(settings: Embedder) -> float | None:
    """Return what a million tokens of an embedder cost; None where nobody said."""
    if isinstance(settings, RayEmbedder):
        return price_per_million_tokens(settings.embedder)
    return settings.price_per_million_tokens if isinstance(settings, RemoteEmbedder) else None
