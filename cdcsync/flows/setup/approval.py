"""The cost of a change of the configuration, and which changes wait until somebody approves them.

    what the index needs ─► rows read, chunks made, those without a vector counted ─► more than confirm_above_texts?
                                                          yes, and not approved: the index is paused and says why

Counting stops as soon as the answer is known. An index that is new is created and its load asked for, but nothing of it
is read until the approval; one that exists keeps what it has, and is searched as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import structlog

from cdcsync.config import Config, price_per_million_tokens
from cdcsync.embedders.protocol import Embedder
from cdcsync.errors import IndexFault, SetupError, Unavailable
from cdcsync.flows.dry_run import Bounds, count, embedded_generations, tokens_of
from cdcsync.flows.replay import Replay
from cdcsync.flows.setup.differences import difference_of, present_fingerprint
from cdcsync.flows.setup.needs import AWAITS_APPROVAL, Need, need_of
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import locked_out, speaking_of
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.preflight.identity import connect_followed
from cdcsync.source.catalog import Catalog
from cdcsync.source.fingerprints import Difference
from cdcsync.target.approvals import Approvals, change_of
from cdcsync.target.ddl.missing import Missing, missing_relations
from cdcsync.target.entries import Entry
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History

log = structlog.get_logger()

CONFIRM_ABOVE_TEXTS = 10_000
"""The limit where texts have a price and the configuration names none."""

COUNTED_S = 60.0
"""How long a start counts texts before it concludes from what it has read to the rest of the table."""


class Reading(msgspec.Struct, frozen=True):
    """An index as it is stored, beside what the configuration would make of it.

    :ivar need: the load that it needs; None if it needs none.
    :ivar found: how its table differs from what it was.
    """

    entry: Entry | None
    need: Need | None
    found: Difference = Difference()
    missing: Missing = Missing()

    @property
    def stored(self) -> bool:
        """Whether the index has tables that rows can be compared with."""
        return self.entry is not None and not self.missing.tables


class Cost(msgspec.Struct, frozen=True):
    """The texts that a load embeds, for all generations of the index together; tokens are estimated from characters.

    :ivar texts: distinct texts that no vector is stored of, in each generation; the documents with one are `documents`.
    :ivar price: in the currency of the embedders' `price_per_million_tokens`; None if none has any.
    :ivar texts_by: those texts by the embedder that makes their vectors.
    :ivar estimated: whether only a part of the table was read, and the rest concluded from it.
    """

    rows: int
    documents: int
    texts: int
    tokens: int
    price: float | None
    estimated: bool
    texts_by: Mapping[str, int]
    sample: tuple[str, ...] = ()


class Held(msgspec.Struct, frozen=True):
    """An index that waits for an approval: of which change, and with which reason."""

    spec: IndexSpec
    change: str
    pause: Pause
    new: bool


async def read_need(target: Connection, config: Config, spec: IndexSpec, catalog: Catalog) -> Reading:
    """Return what an index needs. Nothing is written."""
    schema = config.target.schema
    with speaking_of("target", where=f"index {spec.name}"):
        entry = await Registry(schema).find(target, spec.name)
        if entry is None:
            return Reading(None, need_of(spec, None, Difference()))
        missing = await missing_relations(target, schema, spec, view=entry.view)
        begun = bool(missing.tables) or not await History(schema).still_to_begin(target, spec)
    now = present_fingerprint(catalog, spec)
    found = Difference() if now is None else difference_of(catalog, spec, entry, now)
    return Reading(entry, need_of(spec, entry, found, missing=missing, begun=begun), found, missing)


async def cost_of(
    source: Connection,
    target: Connection,
    config: Config,
    spec: IndexSpec,
    reading: Reading,
    embedders: Mapping[str, Embedder],
    catalog: Catalog,
    bounds: Bounds,
) -> Cost:
    """Return what the load that an index needs would embed, by reading its table once for each generation."""
    assert reading.need is not None
    replay, table = Replay(rewrite=reading.need.rewrite), catalog.tables.get(spec.shape.table)
    embedded = await embedded_generations(target, config.target.schema, spec, embedders)
    seconds = None if bounds.seconds is None else bounds.seconds / len(embedded)
    rows = documents = tokens = 0
    texts_by: dict[str, int] = {}
    prices: list[float] = []
    sample: tuple[str, ...] = ()
    whole = True
    for one, embedder in embedded:
        left = None if bounds.texts is None else max(0, bounds.texts - sum(texts_by.values()))
        cutter, within = embedders[spec.cut_by], Bounds(left, seconds)
        found = await count(source, target, config, one, replay, cutter, stored=reading.stored, bounds=within)
        read = found.rows if found.whole or table is None else max(found.rows, table.estimated_rows)
        share = read / found.rows if found.rows else 1.0
        its_tokens, name = round(tokens_of(found.text_characters) * share), embedder.name
        rows, documents, tokens = max(rows, read), max(documents, round(found.documents * share)), tokens + its_tokens
        texts_by[name] = texts_by.get(name, 0) + round(found.texts * share)
        each = price_per_million_tokens(config.embedders[name])
        prices += [] if each is None else [its_tokens * each / 1_000_000]
        sample, whole = sample or tuple(found.sample.values()), whole and found.whole
    return Cost(
        rows=rows,
        documents=documents,
        texts=sum(texts_by.values()),
        tokens=tokens,
        price=sum(prices) if prices else None,
        estimated=not whole,
        texts_by=texts_by,
        sample=sample,
    )


def confirm_above(config: Config, spec: IndexSpec) -> int | None:
    """Return how many texts a change of an index may embed without an approval; None for any number."""
    if spec.config.confirm_above_texts is not None:
        return spec.config.confirm_above_texts
    sections = [config.embedders.get(one.config.embedder) for one in spec.generations]
    priced = any(price_per_million_tokens(section) is not None for section in sections if section is not None)
    return CONFIRM_ABOVE_TEXTS if priced else None


async def hold_unapproved(
    config: Config, specs: Sequence[IndexSpec], catalog: Catalog | None, embedders: Mapping[str, Embedder]
) -> dict[str, Held]:
    """Return which indexes would embed more than they may, and wait for an approval.

    An index whose rows cannot be read is not held: its load will fail in the same way, and say so.

    :raises SourceUnavailable, TargetUnavailable: a server does not answer now.
    :raises IndexFault: somebody holds a table of an index locked, or its tables could lose or hide rows.
    """
    # What stands beside an index was confirmed when its migration began.
    guarded = [
        (spec, limit) for spec in specs if not spec.hidden and (limit := confirm_above(config, spec)) is not None
    ]
    held: dict[str, Held] = {}
    if not guarded or catalog is None:
        return held
    async with (
        await connect(config.target.dsn, "target", application_name="cdcsync plan", works=True) as target,
        await connect_followed(config, target, application_name="cdcsync plan") as source,
    ):
        for spec, limit in guarded:
            try:
                one = await _hold(source, target, config, spec, limit, catalog, embedders)
            except SetupError as error:
                log.warning("texts_not_counted", index=spec.name, error=str(error), fix=error.hint)
                continue
            except Unavailable as error:
                if not locked_out(error):
                    raise
                raise IndexFault(
                    f"what it would embed cannot be counted, because a table is locked: {error.message}",
                    index=spec.name,
                    where=error.where,
                    hint=error.hint,
                ) from error
            if one is not None:
                held[spec.name] = one
                log.warning("approval_awaited", index=spec.name, because=one.pause.reason, fix=one.pause.remedy)
    return held


async def _hold(
    source: Connection,
    target: Connection,
    config: Config,
    spec: IndexSpec,
    limit: int,
    catalog: Catalog,
    embedders: Mapping[str, Embedder],
) -> Held | None:
    reading, change = await read_need(target, config, spec, catalog), change_of(spec)
    if reading.need is None or not reading.need.embeds:
        return None
    try:
        reading.missing.refuse_unsafe(config.target.schema)
    except SetupError as error:
        # What it would embed cannot be counted, so it must not go on if that is mended just now.
        raise IndexFault(error.message, index=spec.name, where=error.where, hint=error.hint) from error
    with speaking_of("target", where=f"index {spec.name}"):
        if await Approvals(config.target.schema).given(target, spec.name, change):
            return None
    bounds = Bounds(texts=limit, seconds=COUNTED_S)
    cost = await cost_of(source, target, config, spec, reading, embedders, catalog, bounds)
    if cost.texts <= limit:
        return None
    return Held(spec, change, pause_for(spec, reading.need, limit), reading.entry is None)


def pause_for(spec: IndexSpec, need: Need, limit: int) -> Pause:
    """Return the pause of an index that waits for an approval."""
    return Pause(
        f"{AWAITS_APPROVAL} {limit:,} texts, which is not approved ({'; '.join(need.because)})",
        f"see what it costs with cdcsync plan, then approve it: cdcsync plan --approve {spec.name}",
    )
