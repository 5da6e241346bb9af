"""The sections of the configuration file: one Struct each, with the meaning, unit and default of every key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cdcsync.config.embedders import Embedder
from cdcsync.config.names import QualifiedName
from cdcsync.config.related import Related
from cdcsync.config.rerankers import Reranker
from cdcsync.config.serving import Serve
from cdcsync.config.shape import Section
from cdcsync.config.values import (
    MAX_DURATION_S,
    SEARCH_COLUMN,
    SHORTEST_INTERVAL_S,
    Address,
    BatchBytes,
    Dsn,
    EmbedderName,
    Every,
    FunctionPath,
    IndexName,
    MemorySize,
    Milliseconds,
    Name,
    Relation,
    RelationName,
    Rows,
    Searched,
    Seconds,
    SlotName,
    SpoolBytes,
    TablePattern,
    interval,
    parse_address,
)
from cdcsync.errors import UsageError

NO_FRAME = "{chunk}"
"""The `chunk_text` of chunks that stand alone."""


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
    :param spool_bytes: the most bytes of open transactions to keep there; beyond it the source keeps them.
    :param feedback_every_s: at most this many seconds pass between two reports of the checkpoint to the server.
    :param heartbeat_every_s: write a message of a few bytes to the source's WAL this often, in seconds, so that the
        checkpoint moves on an idle server too; 0 for none.
    :param failover: create the slot so that standbys which synchronise slots have it too (PostgreSQL 17 and later);
        older servers cannot.
    :param on_gap: what to do when changes were lost with the slot: "stop" with an error, or "resync" the indexes
        by reading their tables again. Another server than before waits for `cdcsync plan --approve-source` either way.
    """

    dsn: Dsn = ""
    slot: SlotName = "cdcsync"
    publication: Name = "cdcsync"
    streaming: bool = True
    spool_directory: str = ""
    spool_bytes: SpoolBytes = 10 * 1024**3
    feedback_every_s: Annotated[float, Meta(ge=SHORTEST_INTERVAL_S, le=MAX_DURATION_S)] = 10.0
    heartbeat_every_s: Annotated[float, interval(MAX_DURATION_S)] = 0.0
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
        """In our statements a per cent sign begins a placeholder; and no table of ours belongs among the system's."""
        if "%" in self.schema:
            yield "schema", f'must have no "%", got "{self.schema}"'
        elif self.schema.startswith("pg_") or self.schema == "information_schema":
            yield "schema", f'must be a schema that is not the system\'s, such as cdcsync, got "{self.schema}"'


class Worker(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the process runs.

    :param listen: host:port of /livez, /readyz, /metrics, /status and the status page; port 0 takes any free one.
    :param hosts: names by which a proxy on this machine may ask while `listen` is loopback, besides localhost; any
        other name is refused, because a web page could lead a browser here by it.
    :param log_level: the least severity that is logged.
    :param log_format: "json", "console" for people, or "auto": console on a terminal and json elsewhere.
    :param batch_rows: the most changed rows in one target transaction.
    :param batch_bytes: the most bytes of changed rows in one target transaction; this is what bounds memory. While the
        worker catches up, one batch is written, one prepared and one filled, each as rows, documents and chunks, which
        takes up to twenty times as much in all.
    :param backfill_page_rows: rows read at a time when a whole table is read, each page under its own snapshot.
    :param backfill_max_rows_per_s: the most rows a second that backfills read from the source; 0 leaves it to apply.
    :param live_wait_ms: milliseconds that a live change may wait for its vector behind older texts that are under way;
        calls of the model are made so large.
    :param audit_max_rows_per_s: the most rows a second that the audit compares with the source while nothing else is to
        do; beside changes it goes far slower. 0 for no audit.
    :param verify_every_s: seconds between two audits of every index, which then go at full speed; 0 leaves it to the
        audit, which rests a few minutes.
    :param evaluate_every_s: seconds between two measurements of every index's recall, shown in status and metrics; 0
        for none.
    :param settle_connections: connections over which vectors move into the HNSW index; 0 pauses that, while searches
        compare every vector that is not in it.
    :param settle_share: the share of its time that each of them works, while searches are within
        `fresh_scan_budget_ms`.
    :param settle_after_s: seconds that a vector must not have changed before it moves, likewise.
    :param stop_timeout_s: seconds that a stopping worker may take to finish the batch that it is writing, and the next
        one if that is being prepared.
    :param ready_max_lag_s: /readyz says no while the index is more than this many seconds behind the source.
    :param ready_max_lag_bytes: /readyz says no while the source has more than this many bytes of WAL that it has not
        sent yet.
    :param start_timeout_s: how long a start waits for a server that is away or starting up, before it fails.
    """

    listen: Address = "127.0.0.1:9477"
    hosts: tuple[str, ...] = ()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"
    batch_rows: Rows = 5_000
    batch_bytes: BatchBytes = 4 * 1024 * 1024
    backfill_page_rows: Rows = 2_000
    backfill_max_rows_per_s: Annotated[int, Meta(ge=0, le=10**9)] = 0
    live_wait_ms: Annotated[float, Meta(ge=10, le=600_000)] = 500.0
    audit_max_rows_per_s: Annotated[int, Meta(ge=0, le=10**9)] = 1_000
    verify_every_s: Every = 0.0
    evaluate_every_s: Every = 0.0
    settle_connections: Annotated[int, Meta(ge=0, le=16)] = 2
    settle_share: Annotated[float, Meta(gt=0, le=1)] = 0.25
    settle_after_s: Annotated[float, Meta(ge=0, le=10**9)] = 30.0
    stop_timeout_s: Seconds = 20.0
    ready_max_lag_s: Seconds = 60.0
    ready_max_lag_bytes: Annotated[int, Meta(ge=1, le=2**63 - 1)] = 1024**3
    start_timeout_s: Annotated[float, Meta(ge=0, le=10**9)] = 60.0

    @property
    def listen_address(self) -> tuple[str, int]:
        """The host to listen on, an IPv6 one without brackets, and the port; port 0 asks for any free one.

        :raises ConfigError: `listen` is not an address; one that was read from a file is.
        """
        return parse_address(self.listen)


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
    :param quantise: "binary" keeps one bit of each dimension in the index, the sign, in place of the number. The index
        is then a small part of the size; searches find more candidates by it, and compare those by their whole vectors.
    """

    m: Annotated[int, Meta(ge=2, le=100)] = 16
    ef_construction: Annotated[int, Meta(ge=4, le=1_000)] = 64
    build_memory: MemorySize = "512MB"
    build_workers: Annotated[int, Meta(ge=0, le=64)] = 0
    quantise: Literal["none", "binary"] = "none"

    def faults(self) -> Iterator[tuple[str, str]]:
        """PostgreSQL refuses to create the index otherwise."""
        if self.ef_construction < 2 * self.m:
            yield "ef_construction", f"must be at least twice m ({2 * self.m}), got {self.ef_construction}"


class Index(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table's index.

    :param table: the source table, as in SQL: `schema.table`, in quotes where SQL needs them; `public` is the default
        schema.
    :param tables: in place of `table`, patterns of many equal tables, such as "tenant_*.articles". The key of a
        row then begins with the name of its table, as `source_table`.
    :param where: which rows the index has: an SQL condition on the columns of a row; empty for all of them.
    :param key: the columns that name a row, of a table without a primary key; left out, those of the replica identity's
        index, or else of the primary key.
    :param text: the template of a document: column names in braces; NULL renders as nothing.
    :param documents: in place of `text`, a function of your own that makes documents of rows, as
        "package.module:function".
    :param document_columns: the columns that this function gets, spelled as the server stores them.
    :param chunk_text: what is stored, embedded and searched for each chunk: a template in which {chunk} is the chunk.
    :param embedder: the name of the [embedders.NAME] section that makes the vectors.
    :param reranker: the name of a [rerankers.NAME] section that orders what searches find; empty for none.
    :param view: the view that users query, as in SQL; left out, `public.NAME_index`.
    :param columns: columns carried into the index as they are, spelled as the server stores them.
    :param indexed: columns of the index that get a b-tree each, for searches that filter on them selectively.
    :param search: the text search configuration of keyword search, or one of `columns` in braces that names the
        language of each row: "{language}"; "cjk" for Chinese, Japanese and Korean; empty for none.
    :param ranking: how keyword search ranks; "auto" takes BM25 of the extension pg_textsearch where the target has it,
        for a `search` of one configuration, "sql" never does.
    :param distance: how nearness is measured; "auto" takes what the model was trained for.
    :param vector_type: pgvector's column type; "halfvec" halves the space and allows twice the dimensions.
    :param inline_budget_ms: milliseconds that a small batch may wait for its vectors, so that both commit together;
        0 always lets vectors follow.
    :param inline_max_chunks: only batches of at most this many chunks wait for their vectors.
    :param fresh_scan_budget_ms: milliseconds that vectors which are not in the HNSW index yet may add to a search;
        beyond that, moving them there takes precedence over everything else.
    :param related: tables whose rows take part in the documents, by the name that templates give them.
    :param confirm_above_texts: a new index, or a change of these keys, that would embed more texts than this waits
        for `cdcsync plan --approve`; empty is 10,000 where the embedder has a price, and any number elsewhere.
    :param chunking: how a document is cut.
    :param hnsw: build parameters of the vector index.
    """

    table: Relation = ""
    tables: tuple[TablePattern, ...] = ()
    where: str | None = None
    key: tuple[Name, ...] = ()
    text: str = ""
    documents: FunctionPath | None = None
    document_columns: tuple[Name, ...] = ()
    chunk_text: str = NO_FRAME
    embedder: str
    reranker: str | None = None
    view: Relation = ""
    columns: tuple[Name, ...] = ()
    indexed: tuple[Name, ...] = ()
    search: Searched | None = "english"
    ranking: Literal["auto", "sql"] = "auto"
    distance: Literal["auto", "cosine", "l2", "inner_product"] = "auto"
    vector_type: Literal["vector", "halfvec"] = "vector"
    inline_budget_ms: Milliseconds = 50.0
    inline_max_chunks: Annotated[int, Meta(ge=0, le=10_000)] = 16
    fresh_scan_budget_ms: Annotated[float, Meta(ge=0.1, le=60_000)] = 25.0
    related: dict[RelationName, Related] = msgspec.field(default_factory=dict)
    confirm_above_texts: Annotated[int, Meta(ge=0, le=10**12)] | None = None
    chunking: Chunking = Chunking()
    hnsw: Hnsw = Hnsw()

    @property
    def search_column(self) -> str | None:
        """The column that names the language of each row's text."""
        match = SEARCH_COLUMN.fullmatch(self.search or "")
        return match[1] if match else None

    @property
    def followed(self) -> tuple[QualifiedName, ...]:
        """The tables that are followed for the index, its own first, each once."""
        related = [table for one in self.related.values() for table in one.tables]
        return tuple(dict.fromkeys((self.table_name, *related)))

    @property
    def expressions(self) -> tuple[str, ...]:
        """The conditions and orders in SQL that the index is made by, those of related tables included."""
        related = tuple(text for one in self.related.values() for text in one.expressions)
        return (*filter(None, (self.where,)), *related)

    @property
    def table_name(self) -> QualifiedName:
        """The source table's name, or the one that stands for all of `tables`.

        :raises ConfigError: `table` is not a name; one that was read from a file is.
        """
        return QualifiedName.of_patterns(self.tables) if self.tables else QualifiedName.parse(self.table)

    @property
    def view_name(self) -> QualifiedName:
        """The view's name.

        :raises ConfigError: `view` is not a name; reading a file fills in an omitted one.
        """
        return QualifiedName.parse(self.view)

    def faults(self) -> Iterator[tuple[str, str]]:
        """A document is made in one way; a column named twice would be created twice."""
        if not self.table and not self.tables:
            yield "table", "is required, unless tables names many; it is the source table, as in SQL"
        for key, given in (("table", self.table), ("key", self.key), ("related", self.related)):
            if self.tables and given:
                yield key, "must be left out where tables names many tables"
        if self.documents is None and not self.text.strip():
            yield "text", "is required, unless documents names a function; it is the template of a document"
        if self.documents is not None and self.text:
            yield "text", "must be left out where documents names a function"
        if (self.documents is None) != (not self.document_columns):
            yield "document_columns", "names the columns of the function in documents: give both or neither"
        lists = (
            ("tables", self.tables),
            ("key", self.key),
            ("columns", self.columns),
            ("indexed", self.indexed),
            ("document_columns", self.document_columns),
        )
        for key, names in lists:
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield key, f"{name!r} is there more than once"


class Config(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole configuration file, as `load_config` returns it.

    :param source: where changes come from.
    :param target: where the index lives; left out, it is the source's database.
    :param worker: how the process runs.
    :param embedders: what makes vectors, by name.
    :param rerankers: what orders the best hits of searches, by name.
    :param indexes: what is kept in step, by name; the names of an index's tables begin with it.
    :param serve: the tool server, for applications and agents.
    """

    source: Source = Source()
    target: Target = Target()
    worker: Worker = Worker()
    embedders: Annotated[dict[EmbedderName, Embedder], Meta(min_length=1)]
    rerankers: dict[EmbedderName, Reranker] = msgspec.field(default_factory=dict)
    indexes: Annotated[dict[IndexName, Index], Meta(min_length=1)]
    serve: Serve = Serve()

    def index_named(self, name: str) -> Index:
        """Return the section of an index that a command was asked for.

        :raises UsageError: there is none of this name.
        """
        if name not in self.indexes:
            close = difflib.get_close_matches(name, self.indexes, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(self.indexes))}"
            raise UsageError(f"the configuration has no index {name}", where="INDEX", hint=hint)
        return self.indexes[name]
