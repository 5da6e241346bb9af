"""The plan: what `run` would do with this configuration, found out by looking and changing nothing.

examination ─► what each index needs ─► what that embeds ─► the plan
what the target holds besides: indexes that nothing follows, generations that nobody uses
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from cdcsync.config import Config
from cdcsync.config.differences import CONTENTS, KeyChange, index_changes
from cdcsync.config.names import beside_name, own_name
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import AnotherServer, GapError, SetupError
from cdcsync.flows.dry_run import Bounds, seconds_for_each
from cdcsync.flows.setup.approval import Cost, Reading, confirm_above, cost_of, pause_for, read_need
from cdcsync.flows.setup.gaps import foreseen_gap
from cdcsync.flows.setup.needs import Need
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.preflight import Report
from cdcsync.preflight.beside import beside_findings
from cdcsync.preflight.dependents import dependents_findings
from cdcsync.preflight.generations import vector_findings
from cdcsync.preflight.identity import connect_followed
from cdcsync.preflight.indexes import Plan
from cdcsync.preflight.layout import search_findings
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import Catalog, read_slot
from cdcsync.target.approvals import Approvals, change_of
from cdcsync.target.beside import is_met_by
from cdcsync.target.ddl.building import hnsw_options
from cdcsync.target.ddl.sizes import stored_generations
from cdcsync.target.embedders import rate_of
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry
from cdcsync.target.version import VERSION, Stored, open_target, read_version

Action = Literal["created", "read again", "compared", "changed", "paused", "unchanged"]
"""The action on an index; "read again" is of all its rows or of those of new partitions."""


class Embedding(msgspec.Struct, frozen=True):
    """The texts that a load embeds.

    :ivar documents: those of which at least one text has no vector yet.
    :ivar texts: distinct texts without a vector, in each generation of the index; equal ones are embedded once.
    :ivar price: in the currency of the embedders' `price_per_million_tokens`; None if none has any.
    :ivar seconds: at the rate that the worker has measured, or that this command has; None if nobody has.
    :ivar estimated: whether only a part of the table was read, and the rest concluded from it.
    """

    documents: int
    texts: int
    tokens: int
    price: float | None
    seconds: float | None
    estimated: bool


class IndexPlan(msgspec.Struct, frozen=True):
    """The effects of `run` on one index.

    :ivar changes: the keys of its section that are others than when it was last loaded.
    :ivar because: why it is read again, compared or paused.
    :ivar rows: how many rows the load reads; None if none is needed.
    :ivar rebuilt: relations that are missing in the target, and are built again.
    :ivar remaining: what differs from the configuration and `run` leaves as it is.
    :ivar approval: whether its load waits for `cdcsync plan --approve`.
    :ivar remedy: what to do if it is paused.
    """

    index: str
    action: Action
    changes: list[KeyChange] = []
    because: list[str] = []
    rows: int | None = None
    embedding: Embedding | None = None
    rebuilt: list[str] = []
    remaining: list[str] = []
    approval: Literal["needed", "given"] | None = None
    remedy: str | None = None


class Spare(msgspec.Struct, frozen=True):
    """Something in the target that nothing uses, and the command that frees it.

    :ivar generation: of its vectors; None if the whole index is meant.
    :ivar since: when the index was last followed; None while it still is.
    """

    index: str
    generation: int | None
    bytes: int
    since: datetime | None
    command: str


class ConfigurationPlan(msgspec.Struct, frozen=True):
    """The effects of `run`.

    :ivar created: what it creates that is of no single index: publication, slot, tables.
    :ivar unfollowed: indexes of this pipeline that the configuration does not have.
    """

    indexes: list[IndexPlan]
    created: list[str]
    unfollowed: list[Spare]
    generations: list[Spare]

    @property
    def empty(self) -> bool:
        """Whether `run` would change nothing but what the stream brings."""
        let_go = any(one.since is None for one in self.unfollowed)
        return not self.created and not let_go and all(one.action == "unchanged" for one in self.indexes)


async def read_plan(
    config: Config,
    report: Report,
    embedders: Mapping[str, Embedder],
    *,
    bounds: Bounds,
    measure: bool,
    gap: GapError | None,
) -> ConfigurationPlan:
    """Return what `run` would do.

    :param report: of an examination that found no error.
    :param gap: for which `run` reads every table again.
    :param bounds: where counting texts stops and the rest is estimated.
    :param measure: embed a batch of texts where the worker has not measured how long that takes.
    :raises SourceUnavailable, TargetUnavailable: a server does not answer now.
    """
    catalog = report.catalog
    assert catalog is not None
    specs = {spec.name: spec for spec in report.specs}
    async with (
        await connect(config.target.dsn, "target", application_name="cdcsync plan") as target,
        await connect_followed(config, target, application_name="cdcsync plan") as source,
    ):
        plans = {one.name: one for one in report.plans}
        planning = _Planning(config, source, target, catalog, embedders, bounds, measure, plans)
        indexes = [
            paused(name, report.broken[name]) if name in report.broken else await planning.index(specs[name])
            for name in config.indexes
            if name in report.broken or name in specs
        ]
        with speaking_of("target"):
            entries = await Registry(config.target.schema).all(target)
            stored = await read_version(target, config.target.schema)
            sizes = await stored_generations(
                target, config.target.schema, {name: one.relations for name, one in entries.items()}
            )
            generations = await Generations(config.target.schema).all(target)
        return ConfigurationPlan(
            indexes,
            await _created(source, config, catalog, report.specs, stored, gap),
            _unfollowed(config, entries, sizes),
            _unused(config, entries, sizes, generations, plans),
        )


def paused(index: str, pause: Pause) -> IndexPlan:
    """Return the plan of an index that cannot be followed."""
    return IndexPlan(index, "paused", because=[pause.reason], remedy=pause.remedy)


class _Planning:
    """The part that the plans of all indexes share."""

    def __init__(
        self,
        config: Config,
        source: Connection,
        target: Connection,
        catalog: Catalog,
        embedders: Mapping[str, Embedder],
        bounds: Bounds,
        measure: bool,
        plans: Mapping[str, Plan],
    ) -> None:
        self._config = config
        self._source = source
        self._target = target
        self._catalog = catalog
        self._embedders = embedders
        self._bounds = bounds
        self._measure = measure
        self._plans = plans
        self._seconds: dict[str, float | None] = {}
        """Of one text, by embedder."""

    async def index(self, spec: IndexSpec) -> IndexPlan:
        reading = await read_need(self._target, self._config, spec, self._catalog)
        need, entry, found = reading.need, reading.entry, reading.found
        try:
            reading.missing.refuse_unsafe(self._config.target.schema)
        except SetupError as error:
            return paused(spec.name, Pause(error.message, error.hint or ""))
        changes = []
        if entry is not None and entry.configuration is not None:
            # The file's section: that of the spec has the vectors that the index keeps.
            changes = index_changes(entry.configuration, self._config.indexes[spec.name])
        rebuilt = list(reading.missing.built) if entry is not None and entry.state == "live" else []
        if need is None:
            because = _partial(reading)
            action: Action = "read again" if found.arrived or found.left else "compared" if found.compare else "changed"
            if not because and not changes and not rebuilt:
                action = "unchanged"
            remaining = await self._remaining(spec, entry) if entry is not None else []
            return IndexPlan(spec.name, action, changes, because, rebuilt=rebuilt, remaining=remaining)
        cost = await cost_of(
            self._source, self._target, self._config, spec, reading, self._embedders, self._catalog, self._bounds
        )
        embedding = Embedding(
            cost.documents, cost.texts, cost.tokens, cost.price, await self._duration(cost), cost.estimated
        )
        limit = confirm_above(self._config, spec)
        awaits = None
        if need.embeds and limit is not None and cost.texts > limit:
            with speaking_of("target", where=f"index {spec.name}"):
                approvals = Approvals(self._config.target.schema)
                awaits = "given" if await approvals.given(self._target, spec.name, change_of(spec)) else "needed"
        return IndexPlan(
            spec.name,
            "created" if entry is None else "read again",
            changes,
            list(need.because),
            rows=cost.rows,
            embedding=embedding,
            rebuilt=rebuilt,
            remaining=await self._remaining(spec, entry) + list(_instead(need, changes, spec))
            if entry is not None
            else [],
            approval="needed" if awaits == "needed" else "given" if awaits else None,
            remedy=pause_for(spec, need, limit).remedy if awaits == "needed" and limit is not None else None,
        )

    async def _remaining(self, spec: IndexSpec, entry: Entry) -> list[str]:
        """Say what stays as it is: what only a migration exchanges, the column of words, and what others use."""
        schema = self._config.target.schema
        with speaking_of("target", where=f"index {spec.name}"):
            kept = await dependents_findings(self._target, schema, spec)
            other = await Registry(schema).find(self._target, beside_name(spec.name))
        kept += beside_findings(spec.name, self._config.indexes[spec.name], entry, other)
        kept += search_findings(self._plans[spec.name], schema, entry.relations)
        said = [one.with_fix for one in kept]
        return said + (await self._vectors_remaining(spec) if other is None else [])

    async def _vectors_remaining(self, spec: IndexSpec) -> list[str]:
        examined = self._plans[spec.name]
        wanted, has = examined.wanted, (spec.model, spec.dimensions, spec.config.vector_type, spec.distance)
        if wanted is not None and wanted.made_by != has:
            told = vector_findings(examined, Generation.of(spec, "ready"))
            return [one.with_fix for one in told]
        with speaking_of("target", where=f"index {spec.name}"):
            built: dict[str, object] = {
                "quantise": spec.config.hnsw.quantise,
                **await hnsw_options(self._target, self._config.target.schema, spec),
            }
        hnsw = self._config.indexes[spec.name].hnsw
        settings = {"m": hnsw.m, "ef_construction": hnsw.ef_construction, "quantise": hnsw.quantise}
        return [
            f"hnsw.{name} is {built[name]} in the index and {value} in the configuration:"
            f" cdcsync migrate {spec.name} start builds it again"
            for name, value in settings.items()
            if name in built and built[name] != value
        ]

    async def _duration(self, cost: Cost) -> float | None:
        """Return how long the embedders take, which work side by side; None if that of one is unknown."""
        longest = 0.0
        for name, texts in cost.texts_by.items():
            each = await self._each(self._embedders[name], cost.sample) if texts else 0.0
            if each is None:
                return None
            longest = max(longest, each * texts)
        return round(longest, 1)

    async def _each(self, embedder: Embedder, sample: Sequence[str]) -> float | None:
        name = embedder.name
        if name not in self._seconds:
            with speaking_of("target"):
                rate = await rate_of(self._target, self._config.target.schema, self._config.source.slot, name)
            if rate is not None:
                self._seconds[name] = 1 / rate
            elif self._measure:
                each = await seconds_for_each(embedder, list(sample))
                self._seconds[name] = None if each is None else each / embedder.concurrency
            else:
                self._seconds[name] = None
        return self._seconds[name]


def _instead(need: Need, changes: Sequence[KeyChange], spec: IndexSpec) -> Iterator[str]:
    """Say how other chunks could be had without documents being cut again in place."""
    if need.rewrite and spec.beside is None and any(one.key.split(".")[0] in CONTENTS for one in changes):
        yield (
            "documents are cut again in place, while searches go on; to fill the new chunks beside those that are"
            f" searched, and switch: cdcsync migrate {spec.name} start, before the worker starts with this file"
        )


def _partial(reading: Reading) -> list[str]:
    """Say what is to be done for an index short of reading its table again."""
    found = reading.found
    because = [] if found.compare is None else [found.compare]
    if found.arrived:
        because.append(f"partitions came: {', '.join(str(one.name) for one in found.arrived)}")
    if found.left:
        because.append("partitions went, and their rows leave the index")
    return because


async def _created(
    source: Connection,
    config: Config,
    catalog: Catalog,
    specs: Sequence[IndexSpec],
    stored: Stored | None,
    gap: GapError | None,
) -> list[str]:
    created = []
    if stored is None:
        created.append(f"the schema {config.target.schema} and its tables in the target")
    elif stored.version < VERSION:
        created.append(f"the tables of schema {config.target.schema}: from version {stored.version} to {VERSION}")
    publication = config.source.publication
    tables = catalog.single({table for spec in specs for table in spec.config.followed})
    if catalog.publication is None:
        created.append(f"publication {publication} for {', '.join(map(str, tables))}")
    elif added := [table for table in tables if table not in catalog.publication.tables]:
        created.append(f"{', '.join(map(str, added))} in publication {publication}")
    if gap is not None:
        created.append(f"slot {config.source.slot} anew, and every table is read again: {gap.message}")
        return created
    with speaking_of("source"):
        if await read_slot(source, config.source.slot) is None:
            created.append(f"slot {config.source.slot}")
    return created


def _unfollowed(config: Config, entries: Mapping[str, Entry], sizes: Mapping[str, Mapping[int, int]]) -> list[Spare]:
    return [
        Spare(name, None, sum(sizes.get(name, {}).values()), entry.unfollowed_at, f"cdcsync drop {name}")
        for name, entry in entries.items()
        if entry.slot == config.source.slot and name not in config.indexes and not entry.hidden
    ]


def _unused(
    config: Config,
    entries: Mapping[str, Entry],
    sizes: Mapping[str, Mapping[int, int]],
    generations: Mapping[str, Sequence[Generation]],
    plans: Mapping[str, Plan],
) -> list[Spare]:
    """Return the generations that are neither live nor what the configuration asks for: leftovers."""

    def wanted(name: str, generation: int) -> bool:
        plan = plans[name]
        if plan.embedder is None:
            return True  # nobody can tell
        of = (one for one in generations.get(name, ()) if one.generation == generation)
        return plan.wanted is not None and any(plan.wanted.is_met_by(one) for one in of)

    beside = [
        Spare(index, one.generation, sum(sizes.get(one.name, {}).values()), None, f"cdcsync migrate {index} drop")
        for one in entries.values()
        if one.hidden and (index := own_name(one.name)) in config.indexes and not is_met_by(config.indexes[index], one)
    ]
    return beside + [
        Spare(name, generation, size, None, f"cdcsync migrate {name} drop")
        for name, entry in entries.items()
        if entry.slot == config.source.slot and name in config.indexes
        for generation, size in sorted(sizes.get(name, {}).items())
        if generation != entry.generation and not wanted(name, generation)
    ]


async def approve_source(config: Config) -> bool:
    """Let the index follow the server that source.dsn leads to, if it is not the one that it has followed.

    :returns: whether there was anything to approve.
    :raises SourceUnavailable, TargetUnavailable: a server does not answer now.
    """
    gap = await foreseen_gap(config)
    if not isinstance(gap, AnotherServer):
        return False
    async with await connect(config.target.dsn, "target", application_name="cdcsync plan") as target:
        with speaking_of("target", where=f"slot {config.source.slot}"):
            await Pipelines(config.target.schema, config.source.slot).approve_source(target, gap.server)
            crash_point("source approved")
    return True


async def approve(config: Config, report: Report, plan: IndexPlan) -> bool:
    """Approve what the load of an index embeds; returns whether there was anything to approve.

    :raises SetupError: the target does not have our tables yet.
    """
    index = plan.index
    spec = next((spec for spec in report.specs if spec.name == index), None)
    if spec is None or plan.embedding is None:
        return False
    schema = config.target.schema
    async with await open_target(config.target, application_name="cdcsync plan") as target:
        with speaking_of("target", where=f"index {index}"):
            if not await Approvals(schema).present(target):
                raise SetupError(
                    "the target has no table to keep the approval in",
                    where=f"schema {schema}",
                    hint="start `cdcsync run` first: it creates its tables, and the index waits for the approval",
                )
            await Approvals(schema).give(target, index, change_of(spec), plan.embedding.texts)
    return True
