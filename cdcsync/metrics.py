"""Every metric, with its name, unit and labels. docs/metrics.md tells what each means; a test holds the two together.

Label values come from closed sets: index and embedder names, and the words below. What a server said never becomes one.

Source: Prometheus, "Metric and label naming"; "Writing client libraries", process metrics.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from cdcsync import __version__
from cdcsync.windows import Window

FRESHNESS_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""From an inline embedding by a small model to an outage of half an hour."""

BATCH_BUCKETS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)
"""Rows: one change to a large batch."""

STATES = ("building", "live", "paused")
WAL_STATUSES = ("reserved", "extended", "unreserved", "lost")
"""The states that pg_replication_slots has for the WAL that a slot needs, from well to gone."""


class Metrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Memory, CPU time, open files and start time of the process, under the names that all exporters use.
        ProcessCollector(registry=self.registry)
        Info("cdcsync_build", "The version that runs.", registry=self.registry).info({"version": __version__})
        index = ("index",)
        self.ready = self._gauge("ready", "1 while the worker does its work, as /readyz says.")
        self.standby = self._gauge("standby", "1 while another worker holds the pipeline's lock.")
        self.received_bytes = self._counter("received_bytes_total", "Bytes of replication messages received.")
        self.changes = self._counter(
            "changes_total",
            "Row changes received, by index and operation (upsert, delete, truncate).",
            (*index, "operation"),
        )
        self.related_changes = self._counter(
            "related_changes_total",
            "Changes of rows of related tables, each value once a batch, by index and relation.",
            (*index, "relation"),
        )
        self.transactions = self._counter("transactions_total", "Source transactions applied.")
        self.reconnects = self._counter("reconnects_total", "Connections made anew, by side.", ("side",))
        self.connected = self._gauge("connected", "1 while the connection is up, by side.", ("side",))
        self.checkpoint_lsn = self._gauge("checkpoint_lsn_bytes", "The checkpoint, as a byte position.")
        self.lag_bytes = self._gauge("lag_bytes", "WAL between the checkpoint and the source's end of WAL.")
        self.lag_seconds = self._gauge("lag_seconds", "Age of the oldest commit that is not applied; 0 when caught up.")
        self.slot_retained_bytes = self._gauge("slot_retained_bytes", "WAL that the source keeps for the slot.")
        self.slot_safe_bytes = self._gauge(
            "slot_safe_bytes", "WAL that may be written before the slot is lost; +Inf without a limit."
        )
        self.slot_retained_share = self._gauge(
            "slot_retained_ratio", "Share of max_slot_wal_keep_size that the slot holds; 0 without a limit."
        )
        self.slot_wal_status = self._gauge(
            "slot_wal_status", "1 for the state of the slot's WAL: reserved, extended, unreserved, lost.", ("status",)
        )
        self.recent_text: dict[str, Window] = {}
        """Text freshness of the last 15 minutes by index, for the status; it needs no server that scrapes."""
        self.recent_vectors: dict[str, Window] = {}
        """The same for vectors."""
        self.batch_rows = self._histogram("batch_rows", "Rows of each applied batch.", BATCH_BUCKETS)
        self.apply_seconds = self._histogram(
            "apply_seconds", "Time to prepare and commit a batch.", FRESHNESS_BUCKETS_S
        )
        self.text_freshness = self._histogram(
            "text_freshness_seconds", "Source commit to the chunks' commit in the target.", FRESHNESS_BUCKETS_S
        )
        self.vector_freshness = self._histogram(
            "vector_freshness_seconds",
            "Source commit to the vector's commit in the target, of texts that a change brought.",
            FRESHNESS_BUCKETS_S,
        )
        self.chunks = self._counter("chunks_total", "Chunks written, by index.", index)
        self.chunks_deleted = self._counter("chunks_deleted_total", "Chunks deleted, by index.", index)
        self.documents_unchanged = self._counter(
            "documents_unchanged_total", "Documents that were not chunked again, their text being unchanged.", index
        )
        self.document_failures = self._counter(
            "document_failures_total", "Times that a row could not be made a document, or a document chunks.", index
        )
        self.failed_documents = self._gauge(
            "failed_documents", "Rows that are left out of the index, as no document could be made of them.", index
        )
        self.rereads = self._counter("rereads_total", "Rows read again for an unchanged TOAST value.", index)
        self.vectors = self._counter(
            "vectors_total", "Vectors stored, by how they came: reused, inline, backlog, migration.", (*index, "way")
        )
        self.backlog = self._gauge("backlog_chunks", "Chunks without a current vector, by lane.", (*index, "lane"))
        self.failed = self._gauge("failed_chunks", "Chunks that could not be embedded and wait for an operator.", index)
        self.embed_texts = self._counter("embed_texts_total", "Texts given to the embedder.", ("embedder",))
        self.embed_tokens = self._counter("embed_tokens_total", "Tokens of these texts.", ("embedder",))
        self.embed_seconds = self._histogram(
            "embed_seconds", "Time of one call of the embedder.", FRESHNESS_BUCKETS_S, ("embedder",)
        )
        self.embed_avoided = self._counter(
            "embed_avoided_texts_total",
            "Texts that needed no call: current, as the chunk had its vector; shared with another chunk that waits;"
            " remembered from a recent call, under_way in another, or superseded while waiting. Unchanged documents"
            " and reused vectors have counters of their own.",
            ("embedder", "reason"),
        )
        self.embed_errors = self._counter(
            "embed_errors_total", "Calls of the embedder that failed.", ("embedder", "kind")
        )
        self.embedder_problem = self._gauge(
            "embedder_problem",
            "1 while the embedder makes no vectors; the status says why and until when.",
            ("embedder",),
        )
        self.embedder_drift = self._gauge(
            "embedder_drift",
            "Cosine distance between the vectors of a fixed text, now and when it was first embedded.",
            ("embedder",),
        )
        self.index_state = self._gauge("index_state", "1 for the state the index is in.", (*index, "state"))
        self.index_chunks = self._gauge("index_chunks", "Chunks in the index; an estimate for large ones.", index)
        self.index_vectors = self._gauge("index_vectors", "Vectors in the index; an estimate for large ones.", index)
        self.generation_vectors = self._gauge(
            "generation_vectors", "Vectors of a generation beside the live one.", (*index, "generation")
        )
        self.fresh = self._gauge(
            "fresh_vectors", "Vectors that searches compare one by one: not in the HNSW index yet.", index
        )
        self.fresh_scan = self._gauge(
            "fresh_scan_seconds", "What comparing them adds to a search, as the server was last asked.", index
        )
        self.settled = self._counter("vectors_settled_total", "Vectors moved into the HNSW index.", index)
        self.backfill_rows = self._counter("backfill_rows_total", "Rows read by backfills.", index)
        self.backfill_overtaken = self._counter(
            "backfill_overtaken_rows_total", "Rows of a backfill dropped because the stream had newer ones.", index
        )
        self.backfill_done = self._gauge(
            "backfill_done_rows", "Rows that the open backfill has read; 0 when none is open.", index
        )
        self.backfill_expected = self._gauge(
            "backfill_expected_rows", "Rows that the open backfill will read, by estimate; 0 when none is open.", index
        )

        self.verify_differences = self._gauge(
            "verify_differences", "Documents and vectors that differed in the last scheduled verification.", index
        )
        self.verify_finished = self._gauge(
            "verify_finished_timestamp_seconds", "When the last scheduled verification was done.", index
        )
        self.verify_seconds = self._gauge("verify_seconds", "Time that the last scheduled verification took.", index)
        self.audit_differences = self._counter(
            "audit_differences_total",
            "Documents and vectors that the audit found to differ, and had read again.",
            (*index, "problem"),
        )
        self.proven_equal = self._gauge(
            "proven_equal_timestamp_seconds", "When the index was last proven equal to its source.", index
        )
        self.recall = self._gauge(
            "recall", "Share of the ten nearest vectors that searches find, as last measured.", index
        )
        self.recall_finished = self._gauge(
            "recall_finished_timestamp_seconds", "When the recall was last measured.", index
        )

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

    def _counter(self, name: str, help_: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"cdcsync_{name}", help_, labels, registry=self.registry)

    def _gauge(self, name: str, help_: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"cdcsync_{name}", help_, labels, registry=self.registry)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(f"cdcsync_{name}", help_, labels, buckets=buckets, registry=self.registry)
