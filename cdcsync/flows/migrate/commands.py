"""The commands of a migration: each checks, changes something in one transaction, and returns what an operator sees.

    start     adds a generation, which the worker then fills
    activate  makes the other generation the live one: view, search function, registry
    rollback  the same, back to the one that was live before
    drop      asks for the end of the generation that is not live

The configuration says what the index should become; the target says what it is. `start` takes the difference. A second
`start`, `activate` or `drop` finds its work done or does the rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec
from psycopg import sql

from cdcsync.config import Config
from cdcsync.crashpoints import crash_point
from cdcsync.documents.chunks import estimate, make_chunker
from cdcsync.embedders import Embedder
from cdcsync.errors import SetupError, UsageError
from cdcsync.flows.setup.approval import confirm_above
from cdcsync.flows.setup.start import drop_generations
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection, connect, speaking_of
from cdcsync.preflight import build_embedders
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.generations import embedder_of, live_generation
from cdcsync.preflight.indexes import Wish, distance_of, model_faults
from cdcsync.status.counting import Counts, count_index
from cdcsync.status.generations import GenerationStatus, read_generations
from cdcsync.target.ddl.generations import switch_relations
from cdcsync.target.ddl.locking import until_locked
from cdcsync.target.ddl.names import Names
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Entry, Registry
from cdcsync.target.search import stored_spec

POLL_S = 0.2
"""How often it is looked whether the worker has dropped a generation."""

UNDER_WAY = 0.001
"""The share of chunks that may wait for a vector when their generation becomes live: changes of the last moments, which
an index whose table is written to always has."""


class Started(msgspec.Struct, frozen=True):
    """A migration that has begun, or goes on.

    :ivar begun: whether this command began it.
    :ivar chunks: how many vectors there will be.
    :ivar tokens: of the texts that will be embedded; 0 where the vectors only have to be converted.
    :ivar price: of these tokens, in the currency of the embedder's `price_per_million_tokens`.
    :ivar warnings: what the operator should know.
    """

    index: str
    generation: int
    live: int
    embedder: str
    begun: bool
    chunks: int
    tokens: int
    price: float | None
    warnings: list[str]


@asynccontextmanager
async def opened(config: Config, index: str) -> AsyncIterator[tuple[Connection, Entry]]:
    """Connect to the target, and find the index there.

    :raises SetupError: the target does not hold the index, or another pipeline keeps it.
    """
    schema, where = config.target.schema, f"index {index}"
    config.index_named(index)
    async with await connect(config.target.dsn, "target", application_name="cdcsync migrate") as connection:
        with speaking_of("target", where=where):
            entry = await Registry(schema).find(connection, index)
        if entry is None:
            raise SetupError(
                "the target holds no such index",
                where=f"{where}, schema {schema}",
                hint="`cdcsync run` creates and fills it; check target.dsn and target.schema",
            )
        if entry.slot != config.source.slot:
            raise SetupError(
                f"the pipeline of slot {entry.slot} keeps the index, not that of {config.source.slot}",
                where=where,
                hint=f'set source.slot = "{entry.slot}"',
            )
        yield connection, entry


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
            wish = _wish(config, index, embedders, findings)
            live = live_generation(entry, generations)
            others = [one for one in generations if one.generation != live.generation]
            begun = _check_start(config, entry, live, others, wish, embedders)
            if not begun:
                if others[0].state == "filling":
                    await Generations(schema).limit(connection, index, others[0].generation, max_rows_per_s)
                    crash_point("limit of a migration set")
                return await _started(connection, config, entry, live, others[0], wish, begun=False)
            hnsw, number = wish.index.hnsw, _next_number(entry, generations)
            new = Generation(
                *(index, number, wish.index.embedder, wish.embedder.identity, wish.embedder.dimensions),
                *(wish.index.vector_type, wish.distance, "filling", hnsw.m, hnsw.ef_construction),
                quantise=hnsw.quantise,
                max_rows_per_s=max_rows_per_s,
            )
            spec = await stored_spec(connection, schema, index, config.index_named(index))
            started = await _started(connection, config, entry, live, new, wish, begun=True)
            if not confirmed:
                _refuse_unconfirmed(config, spec, wish, started)
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


def _refuse_unconfirmed(config: Config, spec: IndexSpec, wish: Wish, started: Started) -> None:
    """Refuse to embed more texts than the configuration allows without a yes.

    :raises UsageError: it would.
    """
    limit = confirm_above(config, msgspec.structs.replace(spec, config=wish.index, others=()))
    if limit is None or not started.tokens or started.chunks <= limit:
        return
    price = "" if started.price is None else f" at a price of about {started.price:,.2f}"
    raise UsageError(
        f"this embeds {started.chunks:,} chunks, about {started.tokens:,} tokens{price};"
        f" confirm_above_texts is {limit:,}",
        where=f"index {spec.name}",
        hint=f"if that is what you want: cdcsync migrate {spec.name} start --yes",
    )


def _wish(config: Config, index: str, embedders: dict[str, Embedder], findings: Sequence[Finding]) -> Wish:
    section = config.index_named(index)
    embedder = embedders.get(section.embedder)
    faults = [] if embedder is None else list(model_faults(index, section, embedder))
    faults += [one for one in findings if one.where.startswith(f"embedders.{section.embedder}")]
    if faults:
        raise SetupError(faults[0].message, where=faults[0].where, hint=faults[0].hint)
    assert embedder is not None
    return Wish(section, embedder, distance_of(section, embedder))


def _check_start(
    config: Config,
    entry: Entry,
    live: Generation,
    others: Sequence[Generation],
    wish: Wish,
    embedders: dict[str, Embedder],
) -> bool:
    """Return whether a migration has to be begun; False if it is under way already.

    :raises SetupError: it cannot.
    """
    index, where = entry.name, f"index {entry.name}"
    if others and wish.is_met_by(others[0]) and others[0].state != "dropping":
        return False
    if wish.is_met_by(live):
        raise SetupError(
            f"the index has the vectors that [indexes.{index}] asks for, so there is nothing to migrate to",
            where=where,
            hint="change embedder, vector_type, distance or hnsw there first, and keep the [embedders] section of the"
            " vectors that are in use",
        )
    if others:
        raise SetupError(
            f"the index has another generation already, {others[0].generation}, which is {others[0].state}",
            where=where,
            hint=f"drop it first: cdcsync migrate {index} drop",
        )
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
    return True


async def _started(
    connection: Connection,
    config: Config,
    entry: Entry,
    live: Generation,
    new: Generation,
    wish: Wish,
    *,
    begun: bool,
) -> Started:
    names = Names(config.target.schema, entry.name)
    chunks, characters = await fetch_one(
        connection,
        sql.SQL(
            "SELECT CASE WHEN c.reltuples > 1000000 THEN c.reltuples::int8 ELSE (SELECT count(*) FROM {}) END,"
            " coalesce((SELECT avg(length(s.content)) FROM (SELECT content FROM {} LIMIT 10000) AS s), 0)::float8"
            " FROM pg_class AS c WHERE c.oid = %s::regclass"
        ).format(names.chunks, names.chunks),
        [names.chunks.as_string(connection)],
    )
    same = (live.model, live.dimensions) == (new.model, new.dimensions)
    converted = same and not (live.vector_type == "halfvec" and new.vector_type == "vector")
    tokens = 0 if converted else round(chunks * estimate("x" * round(characters)))
    each = getattr(config.embedders[wish.index.embedder], "price_per_million_tokens", None)
    price = None if each is None else tokens * each / 1_000_000
    return Started(
        *(entry.name, new.generation, live.generation, new.embedder or wish.index.embedder, begun, chunks),
        *(tokens, price, list(_warnings(wish))),
    )


def _warnings(wish: Wish) -> list[str]:
    reads = wish.embedder.max_input_tokens
    chunker = make_chunker(wish.index.chunking, wish.embedder.tokenizer_json, None)
    if reads is not None and chunker.capacity is not None and chunker.capacity > reads:
        return [
            f"chunks have up to {chunker.capacity} tokens, and {wish.index.embedder} reads {reads}: what is beyond is"
            " not in the vector"
        ]
    return []


async def status(config: Config, index: str) -> list[GenerationStatus]:
    """Return the generations of an index, in the order of their numbers."""
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            schema = config.target.schema
            generations = await Generations(schema).of(connection, index) or [live_generation(entry, ())]
            return await read_generations(connection, schema, entry, generations)


def other_generation(entry: Entry, generations: Sequence[Generation]) -> Generation:
    """Return the generation that is not live.

    :raises SetupError: there is none.
    """
    others = [one for one in generations if one.generation != entry.generation]
    if not others:
        raise SetupError(
            f"the index has only one generation of vectors, {entry.generation}",
            where=f"index {entry.name}",
            hint=f"begin a migration with: cdcsync migrate {entry.name} start",
        )
    return others[0]


async def candidates(config: Config, index: str) -> tuple[IndexSpec, IndexSpec]:
    """Return the index with its live generation, and with the one that can be made live.

    :raises SetupError: there is none, or it is not ready.
    """
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            generations = await Generations(config.target.schema).of(connection, index)
            other = _require_ready(entry, other_generation(entry, generations))
            spec = await stored_spec(connection, config.target.schema, index, config.index_named(index))
    return spec, next(one for one in spec.others if one.generation == other.generation)


def _require_ready(entry: Entry, other: Generation) -> Generation:
    if other.state != "ready":
        raise SetupError(
            f"generation {other.generation} is {other.state}: searches would find less with it",
            where=f"index {entry.name}",
            hint=f"wait until it is ready; cdcsync migrate {entry.name} status shows how far it is",
        )
    return other


async def _require_complete(connection: Connection, schema: str, entry: Entry, generation: int) -> None:
    """Refuse a generation with which searches would find less than with the live one.

    :raises SetupError: more of its chunks have no vector of their text.
    """
    names = Names(schema, entry.name)
    live, other = [await count_index(connection, names, one) for one in (entry.generation, generation)]
    if _lacking(other) - _lacking(live) <= min(other.backlog, UNDER_WAY * other.chunks):
        return
    remedies = [f"see why: cdcsync failures {entry.name} list"] if other.failed else []
    remedies += ["wait for the worker"] if _lacking(other) > other.failed else []
    raise SetupError(
        f"generation {generation} lacks the vectors of {_lacking(other):,} of {other.chunks:,} chunks"
        f" ({other.failed:,} failed, {other.backlog:,} wait), and the live one of {_lacking(live):,}: searches would"
        " find less with it",
        where=f"index {entry.name}",
        hint=f"{', or '.join(remedies)}; --yes switches all the same",
    )


def _require_embedder(one: Generation, embedders: dict[str, Embedder], findings: Sequence[Finding]) -> None:
    """Refuse a generation that could not be kept: the index would be paused with the switch.

    :raises SetupError: the configuration has no embedder that makes its vectors.
    """
    if embedder_of(one, embedders) is not None:
        return
    unusable = "".join(f"; {one.where} cannot be used: {one.message}" for one in findings)
    raise SetupError(
        f"no [embedders] section makes the vectors of generation {one.generation}, by {one.model} ({one.dimensions}"
        " dimensions): the index would be paused",
        where=f"index {one.index_name}",
        hint=f"put its section back beside the other, under any name, and start the worker again{unusable}",
    )


def _lacking(counts: Counts) -> int:
    """Return how many chunks have no vector of their text; of a large index, those that are known by the backlog."""
    known = counts.backlog + counts.failed
    return known if counts.estimated else max(known, counts.chunks - counts.vectors)


async def switch(config: Config, index: str, generation: int, *, confirmed: bool = False) -> int:
    """Make a generation the live one, in one transaction; returns which was live before.

    :param confirmed: whether it may have fewer vectors than the one that is live.
    :raises SetupError: it is not ready, no embedder makes its vectors, it has fewer vectors and may not, or something
        is built on the view that would have to be dropped; nothing was changed.
    """
    schema = config.target.schema
    findings: list[Finding] = []
    embedders = build_embedders(config, findings)

    async def once(connection: Connection) -> int:
        async with connection.transaction():
            entry = await Registry(schema).find(connection, index, lock=True)
            generations = await Generations(schema).of(connection, index, lock=True)
            assert entry is not None
            before = entry.generation
            if before == generation:
                return before
            one = next((one for one in generations if one.generation == generation), None)
            one = _require_ready(entry, one or other_generation(entry, generations))
            _require_embedder(one, embedders, findings)
            if not confirmed:
                await _require_complete(connection, schema, entry, generation)
            live = await stored_spec(connection, schema, index, config.index_named(index))
            spec = next(one for one in live.others if one.generation == generation)
            others = (msgspec.structs.replace(live, others=()), *(one for one in live.others if one is not spec))
            spec = msgspec.structs.replace(spec, others=tuple(others))
            await switch_relations(connection, schema, spec, before)
            await Registry(schema).switch(connection, spec)
            await Generations(schema).stamp(connection, index, generation, "live_at")
            crash_point("switch written")
        crash_point("switch committed")
        return before

    async with opened(config, index) as (connection, _):
        with speaking_of("target", where=f"index {index}"):
            return await until_locked(lambda: once(connection), table=str(config.index_named(index).view_name))


async def drop(config: Config, index: str) -> int:
    """Drop the generation that is not live, and return its number once it is gone.

    A running worker has to let go of it first; without one, it is dropped here.

    :raises SetupError: there is no such generation.
    """
    schema = config.target.schema
    async with opened(config, index) as (connection, _):
        with speaking_of("target", where=f"index {index}"):
            async with connection.transaction():
                entry = await Registry(schema).find(connection, index, lock=True)
                assert entry is not None
                other = other_generation(entry, await Generations(schema).of(connection, index, lock=True))
                await Generations(schema).drop_asked(connection, index, other.generation)
                crash_point("end of a generation asked for")
            crash_point("end of a generation committed")
            pipelines = Pipelines(schema, config.source.slot)
            while any(one.generation == other.generation for one in await Generations(schema).of(connection, index)):
                if await pipelines.try_lock(connection):
                    spec = await stored_spec(connection, schema, index, config.index_named(index))
                    await drop_generations(connection, schema, spec)
                else:
                    await anyio.sleep(POLL_S)
    return other.generation
