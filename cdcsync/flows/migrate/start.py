"""`migrate start`: adds the generation that the configuration asks for, which the worker then fills.

The configuration says what the index should become; the target says what it is. This takes the difference. A second
`start` finds its work done, and may only change the pace.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from psycopg import sql

from cdcsync.config import Config
from cdcsync.config.differences import KeyChange
from cdcsync.config.names import beside_name
from cdcsync.documents.chunks import estimate
from cdcsync.embedders import Embedder
from cdcsync.errors import SetupError, UsageError
from cdcsync.flows.migrate.beside import reading_warnings, start_beside, under_way
from cdcsync.flows.migrate.present import Started, opened
from cdcsync.flows.setup.approval import confirm_above
from cdcsync.flows.setup.needs import content_changes
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.estimates import estimate_rows
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight import build_embedders
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.generations import embedder_of, live_generation
from cdcsync.preflight.indexes import WantedVectors, distance_of, model_faults
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import Names
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Registry
from cdcsync.target.search import stored_spec

COUNT_UP_TO = 1_000_000
"""Chunks that are counted to tell what a migration embeds; of more, an estimate is told."""


async def start(config: Config, index: str, *, max_rows_per_s: int | None = None, confirmed: bool = True) -> Started:
    """Begin a migration to the vectors that the configuration asks for.

    :param confirmed: whether it may embed more texts than `confirm_above_texts`.
    :raises UsageError: it would, and may not; nothing was changed.
    :raises SetupError: it cannot begin; nothing was changed.
    """
    schema, where = config.target.schema, f"index {index}"
    findings: list[Finding] = []
    embedders = build_embedders(config, findings)
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=where):
            generations = await Generations(schema).of(connection, index)
            other = await Registry(schema).find(connection, beside_name(index))
            wanted = _wanted_vectors(config, index, embedders, findings)
            live = live_generation(entry, generations)
            others = [one for one in generations if one.generation != live.generation]
            if other is not None:
                return await under_way(connection, config, entry, other, wanted, max_rows_per_s=max_rows_per_s)
            if changed := _changed_contents(entry, wanted):
                _refuse_third(entry, others)
                _require_startable(entry, live, embedders)
                number = _next_number(entry, generations)
                return await start_beside(
                    *(connection, config, entry, live, wanted, embedders, changed, number),
                    max_rows_per_s=max_rows_per_s,
                    confirmed=confirmed,
                )
            begun = _check_start(config, entry, live, others, wanted, embedders)
            if not begun:
                if others[0].state == "filling" and max_rows_per_s is not None:
                    await Generations(schema).limit(connection, index, others[0].generation, max_rows_per_s)
                    crash_point("limit of a migration set")
                return await _started(connection, config, entry, live, others[0], wanted, begun=False)
            hnsw, number = wanted.index.hnsw, _next_number(entry, generations)
            new = Generation(
                *(index, number, wanted.index.embedder, wanted.embedder.identity, wanted.embedder.dimensions),
                *(wanted.index.vector_type, wanted.distance, "filling", hnsw.m, hnsw.ef_construction),
                quantise=hnsw.quantise,
                max_rows_per_s=max_rows_per_s,
            )
            spec = await stored_spec(connection, schema, index, config.index_named(index))
            started = await _started(connection, config, entry, live, new, wanted, begun=True)
            if not confirmed:
                _refuse_unconfirmed(config, spec, wanted, started)
            async with connection.transaction():
                now = await Registry(schema).find(connection, index, lock=True)
                same = now is not None and now.last_generation == entry.last_generation
                if not same or await Generations(schema).of(connection, index) != generations:
                    raise SetupError(
                        "somebody else began or ended a migration just now",
                        where=where,
                        hint=f"cdcsync migrate {index} status",
                    )
                if not generations:
                    await Generations(schema).add(connection, Generation.of(spec, "ready"))
                await Generations(schema).add(connection, new)
                await Registry(schema).note_generation(connection, index, number)
                crash_point("migration asked for")
            crash_point("migration begun")
            return started


def _next_number(entry: Entry, generations: Sequence[Generation]) -> int:
    """Return a number that no generation of the index has had: an application may still name one that was dropped."""
    return max(entry.generation, entry.last_generation or 0, *(one.generation for one in generations)) + 1


def _refuse_unconfirmed(config: Config, spec: IndexSpec, wanted: WantedVectors, started: Started) -> None:
    """Refuse to embed more texts than the configuration allows without a yes.

    :raises UsageError: it would.
    """
    limit = confirm_above(config, msgspec.structs.replace(spec, config=wanted.index, others=()))
    if limit is None or not started.tokens or started.chunks <= limit:
        return
    price = "" if started.price is None else f" at a price of about {started.price:,.2f}"
    raise UsageError(
        f"this embeds {started.chunks:,} chunks, about {started.tokens:,} tokens{price};"
        f" confirm_above_texts is {limit:,}",
        where=f"index {spec.name}",
        hint=f"if that is what you want: cdcsync migrate {spec.name} start --yes",
    )


def _wanted_vectors(
    config: Config, index: str, embedders: dict[str, Embedder], findings: Sequence[Finding]
) -> WantedVectors:
    section = config.index_named(index)
    embedder = embedders.get(section.embedder)
    faults = [] if embedder is None else list(model_faults(index, section, embedder))
    faults += [one for one in findings if one.where.startswith(f"embedders.{section.embedder}")]
    if faults:
        raise SetupError(faults[0].message, where=faults[0].where, hint=faults[0].hint)
    assert embedder is not None
    return WantedVectors(section, embedder, distance_of(section, embedder))


def _check_start(
    config: Config,
    entry: Entry,
    live: Generation,
    others: Sequence[Generation],
    wanted: WantedVectors,
    embedders: dict[str, Embedder],
) -> bool:
    """Return whether a migration has to be begun; False if it is under way already.

    :raises SetupError: it cannot.
    """
    index, where = entry.name, f"index {entry.name}"
    if others and wanted.is_met_by(others[0]) and others[0].state != "dropping":
        return False
    if wanted.is_met_by(live):
        raise SetupError(
            f"the index has the vectors that [indexes.{index}] asks for, so there is nothing to migrate to",
            where=where,
            hint="change embedder, vector_type, distance or hnsw there first, and keep the [embedders] section of the"
            " vectors that are in use",
        )
    _refuse_third(entry, others)
    _require_startable(entry, live, embedders)
    return True


def _refuse_third(entry: Entry, others: Sequence[Generation]) -> None:
    """Refuse another generation beside two.

    :raises SetupError: there are two.
    """
    if others:
        raise SetupError(
            f"the index has another generation already, {others[0].generation}, which is {others[0].state}",
            where=f"index {entry.name}",
            hint=f"drop it first: cdcsync migrate {entry.name} drop",
        )


def _require_startable(entry: Entry, live: Generation, embedders: dict[str, Embedder]) -> None:
    """Refuse to migrate an index that is not searched as it should be.

    :raises SetupError: it is not.
    """
    index, where = entry.name, f"index {entry.name}"
    if embedder_of(live, embedders) is None:
        raise SetupError(
            f"no [embedders] section makes the vectors that are in use, by {live.model} ({live.dimensions} dimensions):"
            " searches need it until the switch",
            where=f"indexes.{index}.embedder",
            hint="keep the old section beside the new one, under another name",
        )
    if entry.unfollowed_at is not None or entry.state == "building":
        state = "building" if entry.unfollowed_at is None else "no longer followed"
        raise SetupError(
            f"the index is {state}",
            where=where,
            hint="start a migration once it is live; `cdcsync status` shows its state",
        )


async def _started(
    connection: Connection,
    config: Config,
    entry: Entry,
    live: Generation,
    new: Generation,
    wanted: WantedVectors,
    *,
    begun: bool,
) -> Started:
    names = Names(config.target.schema, entry.relations)
    chunks, _ = await estimate_rows(connection, names.chunks)
    if chunks <= COUNT_UP_TO:
        chunks = await fetch_value(connection, sql.SQL("SELECT count(*) FROM {}").format(names.chunks))
    characters = await fetch_value(
        connection,
        sql.SQL(
            "SELECT coalesce(avg(length(s.content)), 0)::float8 FROM (SELECT content FROM {} LIMIT 10000) AS s"
        ).format(names.chunks),
    )
    same = (live.model, live.dimensions) == (new.model, new.dimensions)
    converted = same and not (live.vector_type == "halfvec" and new.vector_type == "vector")
    tokens = 0 if converted else round(chunks * estimate("x" * round(characters)))
    each = getattr(config.embedders[wanted.index.embedder], "price_per_million_tokens", None)
    price = None if each is None else tokens * each / 1_000_000
    return Started(
        *(entry.name, new.generation, live.generation, new.embedder or wanted.index.embedder, begun, chunks),
        *(tokens, price, list(reading_warnings(wanted))),
    )


def _changed_contents(entry: Entry, wanted: WantedVectors) -> list[KeyChange]:
    """Return the keys that chunks are made by and that are others than when the index was loaded."""
    return [one for one in content_changes(entry, wanted.index) if one.key != "columns"]
