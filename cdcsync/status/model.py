"""The structure of a status. docs/status.md tells each field's meaning; a test holds the two together.

The same structs are the JSON of `cdcsync status --json` and `/status`: times in RFC 3339, LSNs as PostgreSQL prints
them, None as null where a figure is not known.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from cdcsync.model.requests import Kind, Phase
from cdcsync.status.generations import GenerationStatus
from cdcsync.target.evaluations import Recall
from cdcsync.target.judged_runs import Outcome

VERSION = 1
"""Raised when a field goes or changes its meaning. New fields come without."""

IndexState = Literal["building", "live", "paused", "absent"]
BackfillState = Literal["running", "requested", "paused"]
Work = Literal["rows", "vectors", "hnsw"]

Tone = Literal["good", "busy", "warn", "bad"]
"""Nothing to do; going on by itself; late; needs someone."""


class SlotStatus(msgspec.Struct, frozen=True):
    """The replication slot, as the source sees it. `safe_bytes` is None where nothing limits it, or it is lost."""

    name: str
    active: bool
    wal_status: str | None
    retained_bytes: int | None
    safe_bytes: int | None
    confirmed_flush: str | None


class WorkerStatus(msgspec.Struct, frozen=True):
    """The process that keeps the indexes in step: the one that runs, or the last that did.

    `running` is None if that cannot be known: the target is a standby, and the slot cannot be read.
    """

    name: str | None
    running: bool | None
    since: datetime | None
    waits: str | None = None


class BackfillStatus(msgspec.Struct, frozen=True):
    """A backfill that is not finished; `rate` in rows a second over all its time, `eta_s` in seconds."""

    id: int
    kind: Kind
    state: BackfillState
    phase: Phase
    rows_done: int
    rows_total: int | None
    rate: float | None
    eta_s: float | None


class Progress(msgspec.Struct, frozen=True):
    """How far a load is: rows read from the table, vectors made of their texts, or an HNSW index being built.

    `total` is None while it is not known, `eta_s` in seconds while the rate is not. Of vectors, `total` is an estimate
    until all rows are read.
    """

    what: Work
    done: int
    total: int | None
    eta_s: float | None = None


class Headline(msgspec.Struct, frozen=True):
    """How something is, in a few words; `index` is the one that the words are about."""

    words: str
    tone: Tone
    index: str | None = None


class Freshness(msgspec.Struct, frozen=True):
    """How long after their commit changes could be found, over the last 15 minutes.

    `count` is how many were measured; `strip` holds the median and the 99th percentile of each of the 60 slots of
    `slot_s` seconds, the oldest first, None for a slot without changes.
    """

    count: int
    p50_s: float | None
    p99_s: float | None
    slot_s: int
    strip: list[list[float] | None]


class Event(msgspec.Struct, frozen=True):
    """Something that began, and ended unless `until` is None; `index` is the one that it is about.

    What happened at a moment has the same time twice.
    """

    words: str
    tone: Tone
    since: datetime
    until: datetime | None = None
    index: str | None = None


class EmbedderStatus(msgspec.Struct, frozen=True):
    """An embedder as the running worker noted it; nothing is known of one that no worker uses.

    `model` is the model's name in the configuration. `problem` is why it makes no vectors now, `tried_again_at` when it
    is asked next. `loads_wait_until` is set while `tokens_per_day` holds up texts of loads.

    `drift` is the cosine distance between the vectors of a fixed text, as of `probed_at` and when it was first
    embedded: above 0.01, a provider serves another model under the same name.
    """

    problem: str | None = None
    hint: str | None = None
    since: datetime | None = None
    tried_again_at: datetime | None = None
    tokens_today: int = 0
    loads_wait_until: datetime | None = None
    model: str | None = None
    drift: float | None = None
    probed_at: datetime | None = None


class IndexStatus(msgspec.Struct, frozen=True):
    """One index. `backlog_live` is part of `backlog`, `failed` is not; `recall` is of this generation's vectors.

    `discarded` are chunks whose text failed and was discarded: they are part of neither, and need nobody.

    `proven_equal_at` is when the last audit of the whole index ended that found nothing to differ, `differed_at` when
    one last found something, which was read again. `undecided` documents are left out of that proof: they changed
    each time the audit looked at them.

    `fresh` is part of `vectors`: those that searches compare one by one, because they are not in the HNSW index yet.
    That adds `fresh_scan_ms` to a search, and `settle_rate` of them leave in a second, as the worker last saw.

    `judged` are the last runs of `evaluate --judged`, the oldest first.

    `failed_documents` is None while the list of them cannot be read.

    `where` is the condition on its rows. `tables` are the tables of an index over many, whose patterns are `table`.

    `unreadable` is why its tables could not be read and how to fix that: the figures from `documents` to `failed`,
    `discarded`, `fresh` and `generations` are then not known, and have the values that they have without rows.

    `locked` is who has kept everybody from reading one of its source tables, or from writing to its own in the target,
    for a while, if anybody has.

    `problem` is what the worker alone knows to be wrong with it, such as whose transactions a load waits for.

    `since` is when it came into its state. `progress` is empty unless a load is in progress. `text_freshness` and
    `vector_freshness` are known by the worker alone.
    """

    state: IndexState
    reason: str | None
    table: str
    view: str
    model: str | None = None
    dimensions: int | None = None
    generation: int | None = None
    documents: int | None = None
    chunks: int = 0
    vectors: int = 0
    backlog: int = 0
    backlog_live: int = 0
    failed: int = 0
    failed_documents: int | None = 0
    estimated: bool = False
    backfill: BackfillStatus | None = None
    recall: Recall | None = None
    proven_equal_at: datetime | None = None
    undecided: int = 0
    differed_at: datetime | None = None
    fresh: int = 0
    fresh_scan_ms: float | None = None
    settle_rate: float | None = None
    judged: list[Outcome] = []
    generations: list[GenerationStatus] = []
    embedder: str | None = None
    since: datetime | None = None
    headline: Headline | None = None
    progress: list[Progress] = []
    text_freshness: Freshness | None = None
    vector_freshness: Freshness | None = None
    related_tables: list[str] = []
    where: str | None = None
    tables: list[str] = []
    unreadable: str | None = None
    locked: str | None = None
    discarded: int = 0
    problem: str | None = None


class Status(msgspec.Struct, frozen=True):
    """The pipeline of one configuration, and its indexes, at one moment.

    `problems` is what an operator should look at, each with what to do; it is empty when all is well. `headline` is
    that of the index that is worst off, or of the worker when that concerns all. `events` are the latest first, as far
    as the running worker remembers; `page` is where it shows all this.

    `standby` is whether the target is a standby, which shows none of its primary's locks and builds, and the rest as it
    was a moment ago.
    """

    version: int
    read_at: datetime
    pipeline: str
    publication: str
    checkpoint: str | None
    lag_bytes: int | None
    lag_seconds: float | None
    caught_up: bool | None
    slot: SlotStatus | None
    worker: WorkerStatus
    indexes: dict[str, IndexStatus]
    problems: list[str]
    embedders: dict[str, EmbedderStatus] = {}
    headline: Headline | None = None
    events: list[Event] = []
    page: str | None = None
    standby: bool = False
