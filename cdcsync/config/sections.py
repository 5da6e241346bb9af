"""The sections of the configuration file: one Struct each, with the meaning, unit and default of every key.

What several values must be together is said in a section's `faults`; what one must be, in its type.
Constructing a section in code checks neither; `cdcsync.config.parse` does. The `:param` lines are also the
descriptions that `cdcsync config schema` shows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cdcsync.config.names import QualifiedName
from cdcsync.config.values import (
    Address,
    ApiKey,
    BatchBytes,
    ClusterAddress,
    Dsn,
    EmbedderName,
    FunctionPath,
    IndexName,
    MemorySize,
    Milliseconds,
    Name,
    Relation,
    Rows,
    Seconds,
    Share,
    SlotName,
    SpoolBytes,
    Text,
    Url,
    parse_address,
)

NO_FRAME = "{chunk}"
"""The `chunk_text` of chunks that stand alone."""

MAX_DIMENSIONS = 16_000
"""pgvector's limit for a column of type vector."""

_PARAM = re.compile(r"^:param (\w+):(.*?)(?=^:|\Z)", re.DOTALL | re.MULTILINE)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the file whose keys are known."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yield (key, what is wrong) for values that are right alone and wrong together."""
        return iter(())


class Source(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where changes come from.

    :param dsn: connection string of the source database, URI or key=value; empty means libpq's own environment
        (PGHOST, PGSERVICE and so on).
    :param slot: the logical replication slot; created when missing. One slot serves one pipeline.
    :param publication: the publication that says which tables are sent; created when missing.
    :param streaming: receive large transactions while they are still open, where the server can (PostgreSQL 14
        and later), so that it need not spill them to its disk.
    :param spool_directory: where large open transactions are kept until they commit; empty means the system's
        directory for temporary files.
    :param spool_bytes: the most bytes of open transactions to keep there; beyond it the worker stops with an error.
    :param feedback_every_s: at most this many seconds pass between two reports of the checkpoint to the server.
    :param heartbeat_every_s: write a message of a few bytes to the source's WAL this often, in seconds, so that the
        checkpoint moves on an idle server too; 0 for none.
    :param failover: create the slot so that standbys which synchronise slots have it too (PostgreSQL 17 and later);
        older servers cannot.
    :param on_gap: what to do when changes were lost with the slot: "stop" with an error, or "resync" the indexes
        by reading their tables again.
    """

    dsn: Dsn = ""
    slot: SlotName = "cdcsync"
    publication: Name = "cdcsync"
    streaming: bool = True
    spool_directory: str = ""
    spool_bytes: SpoolBytes = 10 * 1024**3
    feedback_every_s: Seconds = 10.0
    heartbeat_every_s: Annotated[float, Meta(ge=0, le=10**9)] = 0.0
    failover: bool = True
    on_gap: Literal["stop", "resync"] = "stop"


class Target(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where the index lives.

    :param dsn: connection string of the target database. Left out, it is the source's; empty, it means libpq's own
        environment.
    :param schema: the schema of cdcsync's own tables, spelled as the server stores it; created when missing.
    """

    dsn: Dsn = ""
    schema: Name = "cdcsync"

    def faults(self) -> Iterator[tuple[str, str]]:
        """In our statements a per cent sign begins a placeholder."""
        if "%" in self.schema:
            yield "schema", f'must have no "%", got "{self.schema}"'


class Worker(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the process runs.

    :param listen: host:port of /livez, /readyz, /metrics, /status and the status page; port 0 takes any free one.
    :param log_level: the least severity that is logged.
    :param log_format: "json", "console" for people, or "auto": console on a terminal and json elsewhere.
    :param batch_rows: the most changed rows in one target transaction.
    :param batch_bytes: the most bytes of changed rows in one target transaction; this is what bounds memory.
    :param backfill_page_rows: rows read at a time when a whole table is read, each page under its own snapshot.
    :param backfill_max_rows_per_s: the most rows a second that backfills read from the source; 0 leaves it to apply.
    :param live_wait_ms: milliseconds that a live change may wait for its vector behind older texts that are under way;
        calls of the model are made so large.
    :param verify_every_s: seconds between two comparisons of every index with its source, shown as metrics; 0 for none.
    :param evaluate_every_s: seconds between two measurements of every index's recall, shown in status and metrics; 0
        for none.
    :param stop_timeout_s: seconds that a stopping worker may take to finish the batch in hand.
    :param ready_max_lag_s: /readyz says no while the index is more than this many seconds behind the source.
    """

    listen: Address = "127.0.0.1:9477"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    batch_rows: Rows = 5_000
    batch_bytes: BatchBytes = 8 * 1024 * 1024
    backfill_page_rows: Rows = 1_000
    backfill_max_rows_per_s: Annotated[int, Meta(ge=0, le=10**9)] = 0
    live_wait_ms: Annotated[float, Meta(ge=10, le=600_000)] = 500.0
    verify_every_s: Annotated[float, Meta(ge=0, le=10**9)] = 0.0
    evaluate_every_s: Annotated[float, Meta(ge=0, le=10**9)] = 0.0
    stop_timeout_s: Seconds = 20.0
    ready_max_lag_s: Seconds = 60.0

    @property
    def listen_address(self) -> tuple[str, int]:
        """The host to listen on, an IPv6 one without brackets, and the port; port 0 asks for any free one.

        :raises ConfigError: `listen` is no address; one that was read from a file is.
        """
        return parse_address(self.listen)


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
    batch_size: Annotated[int, Meta(ge=1, le=10_000)] = 32

    def faults(self) -> Iterator[tuple[str, str]]:
        """The other backends decide on their numbers when they load an exported model."""
        if self.backend != "torch" and self.dtype != "auto":
            yield "dtype", f'must be "auto" with backend = "{self.backend}", got "{self.dtype}"'


PerMinute = Annotated[int, Meta(ge=1, le=10**12)]
InputTokens = Annotated[int, Meta(ge=8, le=1_000_000)]


class RemoteEmbedder(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all providers over HTTP have in common."""

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
    price_per_million_tokens: Annotated[float, Meta(ge=0, le=10**9)] | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        """Two keys would leave open which one is meant."""
        if self.api_key and self.api_key_file:
            yield "api_key_file", "cannot be used together with api_key"


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
    :param price_per_million_tokens: what the provider asks, in any currency, for `replay --dry-run`; empty is unknown.
    :param base_url: what comes before `/embeddings`.
    :param request_dimensions: ask the provider for vectors of `dimensions`, which only models trained for it can cut.
    :param encoding: how vectors travel; "base64" is a third as long, "float" is known to every server.
    :param requests_per_minute: the most requests in any minute; empty leaves it to the provider's answers.
    :param tokens_per_minute: the most tokens in any minute; empty leaves it to the provider's answers.
    """

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
    :param price_per_million_tokens: what the provider asks, in any currency, for `replay --dry-run`; empty is unknown.
    :param base_url: where the server is, without `/embed`.
    :param revision: the model's commit, as `/info` says it; empty takes any.
    :param normalize: have vectors of length one, as cosine distance and inner product want them.
    :param truncate: leave out what the model does not read of a text; false lists such a text as failed.
    """

    base_url: Url
    revision: Text | None = None
    normalize: bool = True
    truncate: bool = False


OneEmbedder = HashEmbedder | SentenceTransformersEmbedder | OpenAIEmbedder | TeiEmbedder
"""What one process runs."""


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


class Chunking(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a document is cut.

    :param strategy: "tokens" and "characters" cut at the largest natural border that fits, "markdown" and "code"
        know the borders of those formats, "none" makes one chunk of a document.
    :param max_tokens: the largest chunk, in the model's tokens; "characters", and a model without a tokenizer, take
        four characters as one.
    :param overlap_tokens: how much of a chunk's end the next one repeats, in the same unit.
    :param max_chunks: the most chunks of a document; empty for any number.
    :param on_too_many: what becomes of a document that has more: "error" leaves it out and says so, "truncate" leaves
        out what does not fit.
    :param chunks: a function of your own that cuts documents, as "package.module:function"; what it makes larger than
        max_tokens is cut again by the strategy.
    """

    strategy: Literal["tokens", "characters", "markdown", "code", "none"] = "tokens"
    max_tokens: Annotated[int, Meta(ge=8, le=1_000_000)] = 256
    overlap_tokens: Annotated[int, Meta(ge=0, le=1_000_000)] = 32
    max_chunks: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    on_too_many: Literal["error", "truncate"] = "error"
    chunks: FunctionPath | None = None

    def faults(self) -> Iterator[tuple[str, str]]:
        """An overlap as long as the chunk would never get to the document's end."""
        if self.overlap_tokens >= self.max_tokens:
            yield "overlap_tokens", f"must be less than max_tokens ({self.max_tokens}), got {self.overlap_tokens}"


class Hnsw(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The vector index's build parameters (pgvector's names).

    :param m: neighbours that each vector keeps per layer; more finds better, and costs space and build time.
    :param ef_construction: candidates looked at when a vector is inserted; more finds better and builds slower.
    :param build_memory: maintenance_work_mem while the index is built; a graph that fits builds many times faster.
    :param build_workers: processes that help to build, of those that the server has (max_parallel_workers); 0 leaves it
        to the server's max_parallel_maintenance_workers, which is 2 by default.
    """

    m: Annotated[int, Meta(ge=2, le=100)] = 16
    ef_construction: Annotated[int, Meta(ge=4, le=1_000)] = 64
    build_memory: MemorySize = "512MB"
    build_workers: Annotated[int, Meta(ge=0, le=64)] = 0

    def faults(self) -> Iterator[tuple[str, str]]:
        """PostgreSQL refuses to create the index otherwise."""
        if self.ef_construction < 2 * self.m:
            yield "ef_construction", f"must be at least twice m ({2 * self.m}), got {self.ef_construction}"


class Index(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table's index.

    :param table: the source table, as in SQL: `schema.table`, in quotes where SQL needs them; `public` is the default
        schema.
    :param text: the template of a document: column names in braces; NULL renders as nothing.
    :param documents: in place of `text`, a function of your own that makes documents of rows, as
        "package.module:function".
    :param document_columns: the columns that this function gets, spelled as the server stores them.
    :param chunk_text: what is stored, embedded and searched for each chunk: a template in which {chunk} is the chunk.
    :param embedder: the name of the [embedders.NAME] section that makes the vectors.
    :param view: the view that users query, as in SQL; left out, `public.NAME_index`.
    :param columns: columns carried into the index as they are, spelled as the server stores them.
    :param indexed: columns of the index that get a b-tree each, for searches that filter on them selectively.
    :param search: the text search configuration of keyword search; empty for none.
    :param distance: how nearness is measured; "auto" takes what the model was trained for.
    :param vector_type: pgvector's column type; "halfvec" halves the space and allows twice the dimensions.
    :param inline_budget_ms: milliseconds that a small batch may wait for its vectors, so that both commit together;
        0 always lets vectors follow.
    :param inline_max_chunks: only batches of at most this many chunks wait for their vectors.
    :param chunking: how a document is cut.
    :param hnsw: build parameters of the vector index.
    """

    table: Relation
    text: str = ""
    documents: FunctionPath | None = None
    document_columns: tuple[Name, ...] = ()
    chunk_text: str = NO_FRAME
    embedder: str
    view: Relation = ""
    columns: tuple[Name, ...] = ()
    indexed: tuple[Name, ...] = ()
    search: Relation | None = "english"
    distance: Literal["auto", "cosine", "l2", "inner_product"] = "auto"
    vector_type: Literal["vector", "halfvec"] = "vector"
    inline_budget_ms: Milliseconds = 50.0
    inline_max_chunks: Annotated[int, Meta(ge=0, le=10_000)] = 16
    chunking: Chunking = Chunking()
    hnsw: Hnsw = Hnsw()

    @property
    def table_name(self) -> QualifiedName:
        """The source table's name.

        :raises ConfigError: `table` is no name; one that was read from a file is.
        """
        return QualifiedName.parse(self.table)

    @property
    def view_name(self) -> QualifiedName:
        """The view's name.

        :raises ConfigError: `view` is no name; reading a file fills in an omitted one.
        """
        return QualifiedName.parse(self.view)

    def faults(self) -> Iterator[tuple[str, str]]:
        """A document is made in one way; a column named twice would be created twice."""
        if self.documents is None and not self.text.strip():
            yield "text", "is required, unless documents names a function; it is the template of a document"
        if self.documents is not None and self.text:
            yield "text", "must be left out where documents names a function"
        if (self.documents is None) != (not self.document_columns):
            yield "document_columns", "names the columns of the function in documents: give both or neither"
        lists = (("columns", self.columns), ("indexed", self.indexed), ("document_columns", self.document_columns))
        for key, names in lists:
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield key, f"{name!r} is there more than once"


class Config(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file.

    :param source: where changes come from.
    :param target: where the index lives; left out, it is the source's database.
    :param worker: how the process runs.
    :param embedders: what makes vectors, by name.
    :param indexes: what is kept in step, by name; the names of an index's tables begin with it.
    """

    source: Source = Source()
    target: Target = Target()
    worker: Worker = Worker()
    embedders: Annotated[dict[EmbedderName, Embedder], Meta(min_length=1)]
    indexes: Annotated[dict[IndexName, Index], Meta(min_length=1)]


def summary(section: type[msgspec.Struct]) -> str:
    """Return the first line of a section's docstring."""
    return inspect.cleandoc(section.__doc__ or "").partition("\n")[0]


def descriptions(section: type[msgspec.Struct]) -> dict[str, str]:
    """Return what each key of a section means, from its docstring, as one line each."""
    documented = _PARAM.findall(inspect.cleandoc(section.__doc__ or ""))
    return {key: " ".join(text.split()) for key, text in documented}
