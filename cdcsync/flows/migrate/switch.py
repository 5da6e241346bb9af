"""`migrate activate` and `rollback`: make the other generation the live one.

View, search function and registry change in one transaction; where the generation has chunks of its own, the holder of
the pipeline's lock makes it (`flows/setup/exchange`). Whether the generation is good enough is measured before
(`compare`); here it is only seen that searches will find as much with it, and that it can be kept.
"""

from __future__ import annotations

from typing import NamedTuple

import anyio
import msgspec

from cdcsync.config import Config
from cdcsync.config.names import beside_name
from cdcsync.errors import SetupError
from cdcsync.flows.migrate.models import Models
from cdcsync.flows.migrate.present import opened, other_generation
from cdcsync.flows.setup.exchange import do_without_worker
from cdcsync.flows.setup.withdrawn import withdraw
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import attempt
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.status.counting import Counts, count_index
from cdcsync.target.ddl.chunks_view import chunks_view_name
from cdcsync.target.ddl.generations import switch_relations
from cdcsync.target.ddl.names import Names
from cdcsync.target.entries import Entry
from cdcsync.target.failures.documents import Listed, count_failed
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Registry
from cdcsync.target.search import stored_spec

POLL_S = 0.05
"""How often it is looked whether a running worker has let go of an index."""

UNDER_WAY = 0.001
"""The share of chunks that may wait for a vector when their generation becomes live: changes of the last moments, which
an index whose table is written to always has."""


async def candidates(config: Config, index: str) -> tuple[IndexSpec, IndexSpec]:
    """Return the index with its live generation, and with the one that can be made live.

    :raises SetupError: there is none, or it is not ready.
    """
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            generations = await Generations(config.target.schema).around(connection, index)
            other = _require_ready(entry, other_generation(entry, generations))
            spec = await stored_spec(connection, config.target.schema, index, config.index_named(index))
    return spec, next(one for one in spec.searchable if one.generation == other.generation)


def _require_ready(entry: Entry, other: Generation) -> Generation:
    if other.state != "ready":
        raise SetupError(
            f"generation {other.generation} is {other.state}: searches would find less with it",
            where=f"index {entry.name}",
            hint=f"wait until it is ready; cdcsync migrate {entry.name} status shows how far it is",
        )
    return other


async def _require_complete(
    connection: Connection, schema: str, entry: Entry, generation: int, beside: Entry | None = None
) -> None:
    """Refuse a generation with which searches would find less than with the live one.

    :param beside: the index with the chunks of that generation, if it has chunks of its own.
    :raises SetupError: more of its chunks have no vector of their text, or more rows made no document.
    """
    names = Names(schema, entry.relations)
    live = await count_index(connection, names, entry.generation)
    other = await count_index(connection, Names(schema, (beside or entry).relations), generation)
    if beside is not None:
        await _require_documents(connection, schema, entry, beside)
    if _lacking(other) - _lacking(live) <= min(other.backlog, UNDER_WAY * other.chunks):
        return
    remedies = [f"see why: cdcsync failures {entry.name} list"] if other.failed else []
    remedies += [f"try them again: cdcsync failures {entry.name} retry --discarded"] if other.discarded else []
    remedies += ["wait for the worker"] if _lacking(other) > other.failed + other.discarded else []
    discarded = f", {other.discarded:,} discarded" if other.discarded else ""
    raise SetupError(
        f"generation {generation} lacks the vectors of {_lacking(other):,} of {other.chunks:,} chunks"
        f" ({other.failed:,} failed, {other.backlog:,} wait{discarded}), and the live one of {_lacking(live):,}:"
        " searches would find less with it",
        where=f"index {entry.name}",
        hint=f"{', or '.join(remedies)}; --yes switches all the same",
    )


async def _require_documents(connection: Connection, schema: str, entry: Entry, beside: Entry) -> None:
    listed = await count_failed(connection, schema)
    live, other = listed.get(entry.name, Listed()), listed.get(beside.name, Listed())
    if other.at_least > live.at_least:
        raise SetupError(
            f"of {other.at_least:,} rows no document of generation {beside.generation} could be made, and of"
            f" {live.at_least:,} none of the live one: searches would find less with it",
            where=f"index {entry.name}",
            hint="correct template or function, drop the generation and begin anew; --yes switches all the same",
        )


def _lacking(counts: Counts) -> int:
    """Return how many chunks have no vector of their text; of a large index, those that are known by the backlog."""
    known = counts.backlog + counts.failed + counts.discarded
    return known if counts.estimated else max(known, counts.chunks - counts.vectors)


class _Choice(NamedTuple):
    """The generation that is live now, and the index that has the chunks of the other one if those are its own."""

    live: int
    beside: Entry | None


async def _checked(
    connection: Connection,
    config: Config,
    models: Models,
    index: str,
    generation: int,
    *,
    confirmed: bool,
    lock: bool = False,
) -> _Choice:
    """Refuse a generation that may not become live, and return what a switch to it needs to know.

    :param lock: keep others from changing that until the transaction around this ends.
    :raises SetupError: as `check`.
    """
    schema = config.target.schema
    entry = await Registry(schema).find(connection, index, lock=lock)
    generations = await Generations(schema).around(connection, index, lock=lock)
    assert entry is not None
    if entry.generation == generation:
        return _Choice(generation, None)
    one = next((one for one in generations if one.generation == generation), None)
    one = _require_ready(entry, one or other_generation(entry, generations))
    models.require(one, confirmed=confirmed)
    beside = await Registry(schema).find(connection, one.index_name) if one.of_other_chunks else None
    if not confirmed:
        await _require_complete(connection, schema, entry, generation, beside)
    if beside is not None:
        _require_live(beside)
    return _Choice(entry.generation, beside)


async def check(config: Config, index: str, generation: int, *, confirmed: bool = False) -> None:
    """Refuse a generation as `switch` would, and change nothing.

    Whether something is built on the view, or others have it locked, is not found before the switch.

    :param confirmed: whether it may have fewer vectors than the one that is live, and the worker may lack its embedder.
    :raises SetupError: it is not ready, or this configuration has no embedder for it; or, unless `confirmed`, it has
        fewer vectors or the worker has no embedder for it.
    """
    models = Models.of(config)
    async with opened(config, index) as (connection, _):
        with speaking_of("target", where=f"index {index}"):
            await _checked(connection, config, models, index, generation, confirmed=confirmed)


async def switch(config: Config, index: str, generation: int, *, confirmed: bool = False) -> int:
    """Make a generation the live one, in one transaction; returns which was live before.

    If this is cancelled, the caller has to withdraw what is still asked for: see `withdrawal`.

    :param confirmed: as for `check`.
    :raises SetupError: as `check`; or something is built on the view that would have to be dropped, or others have the
        view locked. Nothing was changed.
    """
    schema, models = config.target.schema, Models.of(config)

    async def once(connection: Connection) -> int:
        async with connection.transaction():
            before, beside = await _checked(
                connection, config, models, index, generation, confirmed=confirmed, lock=True
            )
            if before == generation:
                return before
            if beside is not None:
                await Registry(schema).ask_for_activation(connection, index)
                await Generations(schema).activation_asked(connection, beside.name, generation)
            else:
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
            view = config.index_named(index).view_name
            relations = [view, chunks_view_name(view)]
            before = await attempt(connection, lambda: once(connection), relations, where=f"index {index}")
        await _answered(connection, config, index, generation)
        return before


def _require_live(beside: Entry) -> None:
    if beside.unfollowed_at is not None:
        raise SetupError(
            f"no worker follows generation {beside.generation} any more: it is as it was at"
            f" {beside.unfollowed_at:%Y-%m-%d %H:%M} UTC",
            where=f"index {beside.name}",
            hint="start the worker with a file that has the index, and wait until it is ready",
        )
    if beside.state != "live":
        raise SetupError(
            f"generation {beside.generation} is {beside.state}"
            + (f": {beside.pause}" if beside.pause is not None else ""),
            where=f"index {beside.name}",
            hint="wait until it is ready, or correct why it is not",
        )


async def _answered(connection: Connection, config: Config, index: str, generation: int) -> None:
    """Return once a generation is live that was asked for: at once, but for one that has chunks of its own.

    A running worker has to let go of the index first; it sees the request within seconds, or does what it says.

    :raises SetupError: it could not become live.
    """
    schema = config.target.schema
    while True:
        with speaking_of("target", where=f"index {index}"):
            entry, other = await Registry(schema).both(connection, index)
            if entry is None or entry.generation == generation:
                return
            if other is None or other.activation_asked_at is None:
                beside = await Generations(schema).of(connection, beside_name(index))
                refusals = [one.refusal for one in beside if one.generation == generation and one.refusal]
                why = refusals[0] if refusals else "nobody asks for it any more"
                raise SetupError(
                    f"generation {generation} did not become live: {why}",
                    where=f"index {index}",
                    hint=f"see what is there now: cdcsync migrate {index} status",
                )
        if await do_without_worker(connection, config):
            continue
        with speaking_of("target", where=f"index {index}"):
            _, other = await Registry(schema).both(connection, index)  # as the worker that holds the lock has it
            if other is not None and other.activation_asked_at is not None and other.unfollowed_at is not None:
                why = "no worker follows the index any more"
                await withdraw(connection, schema, other.name, generation, why, drop=False)
                _require_live(other)
        await anyio.sleep(POLL_S)
