"""Every metric, with its name, unit, labels and meaning. docs/metrics.md is made of them.

Label values come from closed sets: index and embedder names, and the words below. What a server said never becomes one.

Source: Prometheus, "Metric and label naming"; "Writing client libraries", process metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from cdcsync import __version__
from cdcsync.metrics.windows import Window

FRESHNESS_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""From an inline embedding by a small model to an outage of half an hour."""

BATCH_BUCKETS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)
"""Rows: one change to a large batch."""

STATES = ("building", "live", "paused")
WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")
"""The states that pg_replication_slots has for the WAL that a slot needs, from well to gone."""

PROBLEMS = (
    *("missing", "stale", "orphaned", "carried", "repeated", "damaged"),
    *("vector_missing", "vector_stale", "vector_dimensions", "vector_not_finite", "vector_twice", "vectors_orphaned"),
)
"""What the audit calls a difference."""

COUNTED = {
    "side": ("source", "target"),
    "operation": ("upsert", "delete", "truncate"),
    "way": ("reused", "inline", "backlog", "migration"),
    "reason": ("current", "shared", "remembered", "under_way", "superseded"),
    "kind": ("EmbedderUnavailable", "TextRejected", "EmbedderSetupError", "EmbedError"),
    "problem": PROBLEMS,
}
"""The values of the labels by which counters count, besides names of the configuration."""


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


LABELS = {
    "index": "the indexes of the configuration",
    "embedder": "the embedders of the configuration",
    "side": _listed(COUNTED["side"]),
    "operation": _listed(COUNTED["operation"]),
    "relation": "the names of the configured `[indexes.NAME.related.…]` sections, joined by dots",
    "state": _listed(STATES),
    "status": _listed(WAL_STATUSES) + ", as in `pg_replication_slots.wal_status`",
    "lane": "`live` for changes, `backfill` for rows read from tables; live chunks are embedded first",
    "way": "`reused` from an equal text, `inline` together with its chunk, `backlog` afterwards, `migration` for a"
    " generation beside the live one",
    "generation": "the number of a generation of vectors, as in `NAME_vectors_GENERATION`",
    "reason": _listed(COUNTED["reason"]),
    "kind": "the class of the error: " + _listed(COUNTED["kind"]),
    "problem": "kinds of differences, as `cdcsync verify` calls them: " + _listed(PROBLEMS),
    "version": "the version that runs",
}
"""The values of each label."""


class Described(msgspec.Struct, frozen=True):
    """A metric as docs/metrics.md lists it. `part` is the section of the page."""

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    meaning: str
    part: str


class Metrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._described: list[Described] = []
        self._counters: list[tuple[Counter, tuple[str, ...]]] = []
        self._gauges: list[tuple[Gauge, tuple[str, ...]]] = []
        # Memory, CPU time, open files and start time of the process, under the names that all exporters use.
        ProcessCollector(registry=self.registry)

        index, embedder = ("index",), ("embedder",)

        self._part = "worker"
        version = "The version that runs; always 1."
        Info("cdcsync_build", version, registry=self.registry).info({"version": __version__})
        self._note("build_info", "gauge", "1", ("version",), version)
        self.ready = self._gauge("ready", "0 or 1", "1 while the worker does its work; /readyz says why not.")
        self.standby = self._gauge("standby", "0 or 1", "1 while the target says that another worker holds the lock.")
        self.connected = self._gauge(
            "connected",
            "0 or 1",
            "Source: 1 while the stream flows. Target: 1 if it answered when it was last asked.",
            ("side",),
        )
        self.reconnects = self._counter(
            "reconnects_total", "connections", "How often the worker waited to connect again.", ("side",)
        )

        self._part = "lag"
        self.lag_seconds = self._gauge(
            "lag_seconds",
            "seconds",
            "Age of the oldest commit that was received and is not in the index; 0 when caught up. NaN while it is"
            " unknown: the source is not connected, or has said nothing for half of its wal_sender_timeout.",
        )
        self.lag_bytes = self._gauge(
            "lag_bytes",
            "bytes",
            "WAL between the checkpoint and the end of the source's WAL, including that of other databases; it is"
            " seldom exactly 0.",
        )
        self.checkpoint_lsn = self._gauge(
            "checkpoint_lsn_bytes",
            "bytes",
            "The checkpoint as a number. Its rate is how fast the worker moves through the WAL.",
        )
        self.slot_retained_bytes = self._gauge(
            "slot_retained_bytes", "bytes", "WAL that the source keeps because of the slot."
        )
        self.slot_safe_bytes = self._gauge(
            "slot_safe_bytes",
            "bytes",
            "WAL that may still be written before the slot is in danger; +Inf without max_slot_wal_keep_size, 0 once"
            " the slot is lost.",
        )
        self.slot_retained_share = self._gauge(
            "slot_retained_ratio",
            "1",
            "Share of max_slot_wal_keep_size that the slot holds; 0 without a limit. The worker logs 0.5 and 0.8, and"
            " at 1 there is a gap. It is read while the target is away, too.",
        )
        self.slot_wal_status = self._gauge(
            "slot_wal_status", "0 or 1", "1 for the state that the slot's WAL is in.", ("status",)
        )

        self._part = "stream"
        self.received_bytes = self._counter(
            "received_bytes_total",
            "bytes",
            "Replication messages received, including those for other tables of the publication.",
        )
        self.transactions = self._counter("transactions_total", "transactions", "Source transactions applied.")
        self.changes = self._counter(
            "changes_total",
            "changes",
            "Row changes applied. A row that changes twice in one batch counts once.",
            (*index, "operation"),
        )
        self.related_changes = self._counter(
            "related_changes_total",
            "changes",
            "Changes of rows of related tables. Those that concern the same documents count once a batch.",
            (*index, "relation"),
        )
        self.batch_rows = self._histogram(
            "batch_rows",
            "rows",
            "Rows of each applied batch: 1 when the source is quiet, up to worker.batch_rows when behind.",
            BATCH_BUCKETS,
        )
        self.apply_seconds = self._histogram(
            "apply_seconds",
            "seconds",
            "Time to prepare and commit a batch: chunking, waiting for inline vectors, and the target's work.",
            FRESHNESS_BUCKETS_S,
        )
        self.text_freshness = self._histogram(
            "text_freshness_seconds",
            "seconds",
            "From a commit on the source to the commit of its chunks in the target, by the clocks of both machines:"
            " that of the oldest change in each batch.",
            FRESHNESS_BUCKETS_S,
        )
        self.vector_freshness = self._histogram(
            "vector_freshness_seconds",
            "seconds",
            "From a commit on the source to the commit of a vector of its text in the target, for each vector that a"
            " change brought: inline, reused or from the backlog, but not from a load or replay. A batch counts from"
            " its first commit; one that also holds rows of a load is left out. Texts that waited since before the"
            " worker started count from when they were applied.",
            FRESHNESS_BUCKETS_S,
        )
        self.document_failures = self._counter(
            "document_failures_total",
            "documents",
            "Times that no document could be made of a row, or no chunks of a document.",
            index,
        )
        self.failed_documents = self._gauge(
            "failed_documents",
            "rows",
            "Rows that are left out of the index now because no document could be made of them. At most 10,000 are"
            " listed and counted; any beyond these count as one. NaN while the list cannot be read.",
            index,
        )
        self.documents_unchanged = self._counter(
            "documents_unchanged_total", "documents", "Documents that were not chunked again: same text.", index
        )
        self.rereads = self._counter(
            "rereads_total",
            "rows",
            "Rows read again from the source: a large value came as unchanged, which REPLICA IDENTITY FULL avoids; only"
            " the source can decide on `where`; or rows of related tables take part.",
            index,
        )
        self.chunks = self._counter("chunks_total", "chunks", "Chunks written.", index)
        self.chunks_deleted = self._counter("chunks_deleted_total", "chunks", "Chunks deleted.", index)

        self._part = "vectors"
        self.vectors = self._counter("vectors_total", "vectors", "Vectors stored.", (*index, "way"))
        self.fresh = self._gauge(
            "fresh_vectors",
            "vectors",
            "Vectors that every search compares one by one because they are not in the HNSW index yet.",
            index,
        )
        self.fresh_scan = self._gauge(
            "fresh_scan_seconds",
            "seconds",
            "What comparing them adds to a search, as the server last measured it. Above fresh_scan_budget_ms, moving"
            " them takes precedence.",
            index,
        )
        self.settled = self._counter(
            "vectors_settled_total", "vectors", "Vectors moved into the HNSW index; the rate is the settle rate.", index
        )
        self.backlog = self._gauge(
            "backlog_chunks",
            "chunks",
            "Chunks that wait for a vector; an estimate if there are very many.",
            (*index, "lane"),
        )
        self.failed = self._gauge(
            "failed_chunks", "chunks", "Chunks that could not be embedded and wait for an operator.", index
        )
        self.discarded = self._gauge(
            "discarded_chunks", "chunks", "Chunks whose text failed and was discarded: none tries it again.", index
        )
        self.embed_texts = self._counter(
            "embed_texts_total", "texts", "Texts embedded. Equal texts of a batch count once.", embedder
        )
        self.embed_tokens = self._counter(
            "embed_tokens_total",
            "tokens",
            "Tokens of these texts, by the model's tokenizer; four characters a token if the model shows none.",
            embedder,
        )
        self.embed_avoided = self._counter(
            "embed_avoided_texts_total",
            "texts",
            "Texts that needed no call: current, because the chunk still has a vector of it; shared with another chunk"
            " that waits; remembered from a recent call; under_way in another call; superseded while waiting. Unchanged"
            " documents and reused vectors have counters of their own.",
            (*embedder, "reason"),
        )
        self.embed_seconds = self._histogram(
            "embed_seconds", "seconds", "Time of one call that succeeded.", FRESHNESS_BUCKETS_S, embedder
        )
        self.embed_errors = self._counter("embed_errors_total", "calls", "Calls that failed.", (*embedder, "kind"))
        self.embedder_drift = self._gauge(
            "embedder_drift",
            "cosine distance",
            "Between the vectors of a fixed text, now and when it was first embedded. Above 0.01 the provider serves"
            " another model under the same name. Measured once a day, of providers over HTTP.",
            embedder,
        )
        self.embedder_problem = self._gauge(
            "embedder_problem",
            "0 or 1",
            "1 while the embedder makes no vectors; the status says why, and when it is asked again.",
            embedder,
        )

        self._part = "indexes"
        self.index_state = self._gauge(
            "index_state", "0 or 1", "1 for the state that the index is in.", (*index, "state")
        )
        self.index_chunks = self._gauge(
            "index_chunks", "chunks", "Chunks in the index; the planner's estimate if it is large.", index
        )
        self.index_vectors = self._gauge(
            "index_vectors",
            "vectors",
            "Chunks that have a vector, current or stale; the planner's estimate if there are many.",
            index,
        )
        self.generation_vectors = self._gauge(
            "generation_vectors",
            "vectors",
            "Vectors of a generation beside the live one, which a migration fills or has left. Compare it with"
            " cdcsync_index_chunks. Without a migration there is none.",
            (*index, "generation"),
        )
        self.backfill_rows = self._counter("backfill_rows_total", "rows", "Rows read by backfills.", index)
        self.backfill_overtaken = self._counter(
            "backfill_overtaken_rows_total",
            "rows",
            "Rows among these that were dropped: the stream had newer ones.",
            index,
        )
        self.backfill_done = self._gauge(
            "backfill_done_rows", "rows", "Rows that the open backfill has read; 0 if none is open.", index
        )
        self.backfill_expected = self._gauge(
            "backfill_expected_rows",
            "rows",
            "Rows that the open backfill will read, by the planner's estimate; 0 if none is open.",
            index,
        )

        self._part = "recall"
        self.recall = self._gauge(
            "recall",
            "1",
            "Mean share of the ten nearest vectors that searches find.",
            index,
        )
        self.recall_finished = self._gauge(
            "recall_finished_timestamp_seconds", "seconds since 1970", "When the recall was last measured.", index
        )

        self._part = "verification"
        self.proven_equal = self._gauge(
            "proven_equal_timestamp_seconds",
            "seconds since 1970",
            "When the last comparison of the whole index that found no difference ended.",
            index,
        )
        self.undecided = self._gauge(
            "undecided_documents",
            "documents",
            "Documents that this comparison could not judge, as they changed each time it looked at them.",
            index,
        )
        self.audit_differences = self._counter(
            "audit_differences_total",
            "documents and vectors",
            "Documents and vectors that the audit found to differ, and had read again.",
            (*index, "problem"),
        )
        self.verify_differences = self._gauge(
            "verify_differences",
            "documents and vectors",
            "Documents and vectors that differed from the source when last verified; it should be 0. Rows without a"
            " document, and texts that were given up, are not among them: see cdcsync_failed_documents and"
            " cdcsync_failed_chunks.",
            index,
        )
        self.verify_finished = self._gauge(
            "verify_finished_timestamp_seconds", "seconds since 1970", "When the index was last verified.", index
        )
        self.verify_seconds = self._gauge("verify_seconds", "seconds", "How long that took.", index)

        self.recent_text: dict[str, Window] = {}
        """Text freshness of the last 15 minutes by index, for the status; it needs no server that scrapes."""
        self.recent_vectors: dict[str, Window] = {}
        """The same for vectors."""
        self.forget()

    @property
    def described(self) -> Sequence[Described]:
        """Every metric, in the order of the page."""
        return self._described

    def begin(self, indexes: Iterable[str], embedders: Iterable[str]) -> None:
        """Have each counter of these begin at 0: the first count of one that appears with it is in no rate."""
        values = COUNTED | {"index": tuple(indexes), "embedder": tuple(embedders)}
        for counter, labels in self._counters:
            if labels and values.keys() >= set(labels):
                for of in product(*(values[label] for label in labels)):
                    counter.labels(*of)

    def forget(self) -> None:
        """Have the gauges of the pipeline show nothing until they are read: it is not known yet, or another's now.

        Those that are asked when they are scraped need no reading.
        """
        for gauge, labels in self._gauges:
            if gauge in (self.lag_seconds, self.embedder_problem):
                continue
            if labels:
                gauge.clear()
            else:
                gauge.set(math.nan)

    def note_slot(self, wal_status: str | None, retained_bytes: float, safe_bytes: float, share: float) -> None:
        """Note what the slot holds; NaN for what is not known."""
        self.slot_retained_bytes.set(retained_bytes)
        self.slot_safe_bytes.set(safe_bytes)
        self.slot_retained_share.set(share)
        for one in WAL_STATUSES:
            self.slot_wal_status.labels(one).set(math.nan if wal_status is None else wal_status == one)

    def note_text_freshness(self, indexes: Iterable[str], seconds: float) -> None:
        """Note that texts of these indexes can be found, so long after their commit."""
        self.text_freshness.observe(seconds)
        for index in indexes:
            self.recent_text.setdefault(index, Window()).add(seconds)

    def note_vector_freshness(self, index: str, seconds: float, times: int = 1) -> None:
        """Note that so many vectors of an index can be found, so long after the commit of their texts."""
        for _ in range(times):
            self.vector_freshness.observe(seconds)
        if times:
            self.recent_vectors.setdefault(index, Window()).add(seconds, times)

    def _counter(self, name: str, unit: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
        full = self._note(name, "counter", unit, labels, meaning)
        counter = Counter(full, meaning, labels, registry=self.registry)
        self._counters.append((counter, labels))
        return counter

    def _gauge(self, name: str, unit: str, meaning: str, labels: tuple[str, ...] = ()) -> Gauge:
        full = self._note(name, "gauge", unit, labels, meaning)
        gauge = Gauge(full, meaning, labels, registry=self.registry)
        if self._part != "worker":
            self._gauges.append((gauge, labels))
        return gauge

    def _histogram(
        self, name: str, unit: str, meaning: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        full = self._note(name, "histogram", unit, labels, meaning)
        return Histogram(full, meaning, labels, buckets=buckets, registry=self.registry)

    def _note(self, name: str, kind: str, unit: str, labels: tuple[str, ...], meaning: str) -> str:
        self._described.append(Described(f"cdcsync_{name}", kind, unit, labels, meaning, self._part))
        return f"cdcsync_{name}"
