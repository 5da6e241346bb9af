"""`migrate start` to other chunks: an index of its own is made beside the one that is searched, of the same tables.

The worker loads and follows it as it does any index (`target/beside`). Its vectors may be of another model too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from cdcsync.config import Config
from cdcsync.config.differences import KeyChange
from cdcsync.config.names import MAX_NAME_BYTES, beside_name
from cdcsync.documents.chunks import make_chunker
from cdcsync.embedders import Embedder
from cdcsync.errors import SetupError, UsageError
from cdcsync.flows.dry_run import Bounds
from cdcsync.flows.migrate.present import Started
from cdcsync.flows.setup.approval import COUNTED_S, Cost, Reading, confirm_above, cost_of
from cdcsync.flows.setup.needs import Need
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight import examine, refuse
from cdcsync.preflight.identity import connect_followed
from cdcsync.preflight.indexes import WantedVectors
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.beside import is_met_by
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History
from cdcsync.target.requests.submission import Requests

LONGEST_SUFFIX = len("~12_vectors_12_fresh_near")
"""The longest that is put behind the name of an index to name a relation beside it."""


async def start_beside(
    connection: Connection,
    config: Config,
    entry: Entry,
    live: Generation,
    wanted: WantedVectors,
    embedders: Mapping[str, Embedder],
    changed: Sequence[KeyChange],
    number: int,
    *,
    max_rows_per_s: int | None,
    confirmed: bool,
) -> Started:
    """Begin a migration to the chunks and vectors that the configuration asks for.

    :param changed: the keys that make other chunks.
    :param number: of the new generation.
    :raises UsageError: it would embed more texts than it may.
    :raises SetupError: it cannot begin; nothing was changed.
    """
    schema, index, where = config.target.schema, entry.name, f"index {entry.name}"
    if len(index.encode()) + LONGEST_SUFFIX > MAX_NAME_BYTES:
        raise SetupError(
            f"the index's name is too long for chunks beside it: it may have {MAX_NAME_BYTES - LONGEST_SUFFIX} letters",
            where=where,
            hint="load an index of its own under a shorter name, with a view of its own",
        )
    cost, spec = await _cost(connection, config, entry, live, wanted, embedders)
    started = Started(
        *(index, number, live.generation, wanted.index.embedder, True, cost.texts, cost.tokens, cost.price),
        list(reading_warnings(wanted)),
        own_chunks=[str(change) for change in changed],
        estimated=cost.estimated,
    )
    limit = confirm_above(config, spec)
    if not confirmed and limit is not None and cost.texts > limit:
        price = "" if cost.price is None else f" at a price of about {cost.price:,.2f}"
        raise UsageError(
            f"this embeds {cost.texts:,} texts, about {cost.tokens:,} tokens{price}; confirm_above_texts is {limit:,}",
            where=where,
            hint=f"if that is what you want: cdcsync migrate {index} start --yes",
        )
    registry, generations = Registry(schema), Generations(schema)
    with speaking_of("target", where=where):
        async with connection.transaction():
            now = await registry.find(connection, index, lock=True)
            same = now is not None and now.last_generation == entry.last_generation
            if not same or len(await generations.around(connection, index)) > 1:
                raise SetupError(
                    "somebody else began or ended a migration just now",
                    where=where,
                    hint=f"cdcsync migrate {index} status",
                )
            if (forced := await History(schema).forced(connection, index)) is not None:
                # Whoever asks for one looks for other chunks under the same lock.
                raise SetupError(
                    f"request {forced} makes vectors anew, and the new chunks would take over those of before",
                    where=where,
                    hint=f"wait until it is done (`cdcsync status` shows how far it is), or cancel it:"
                    f" cdcsync replay {index} --cancel",
                )
            hnsw = wanted.index.hnsw
            new = Generation(
                *(
                    beside_name(index),
                    number,
                    wanted.index.embedder,
                    wanted.embedder.identity,
                    wanted.embedder.dimensions,
                ),
                *(wanted.index.vector_type, wanted.distance, "filling", hnsw.m, hnsw.ef_construction),
                quantise=hnsw.quantise,
            )
            facts = (number, new.model, new.dimensions, new.vector_type, new.distance)
            await registry.add_beside(connection, index, wanted.index, facts)
            await generations.add(connection, new)
            await registry.note_generation(connection, index, number)
            await registry.decline(connection, index, None)
            await Requests(schema).add(
                connection, new.index_name, "initial", rewrite=False, filter_=None, max_rows_per_s=max_rows_per_s
            )
            crash_point("migration to other chunks asked for")
        crash_point("migration to other chunks begun")
    return started


async def under_way(
    connection: Connection,
    config: Config,
    entry: Entry,
    other: Entry,
    wanted: WantedVectors,
    *,
    max_rows_per_s: int | None,
) -> Started:
    """Return the migration to other chunks that is under way, and have its load go at this pace if one is given.

    :raises SetupError: it is one to others than the configuration asks for.
    """
    index = entry.name
    if not is_met_by(wanted.index, other):
        raise SetupError(
            f"generation {other.generation} has chunks of its own, and not those that the configuration asks for",
            where=f"index {index}",
            hint=f"drop it first: cdcsync migrate {index} drop",
        )
    if max_rows_per_s is not None:
        with speaking_of("target", where=f"index {index}"):
            await Requests(config.target.schema).limit(connection, other.name, max_rows_per_s)
            crash_point("limit of a load set")
    return Started(
        *(index, other.generation, entry.generation, wanted.index.embedder, False, 0, 0, None, []),
        own_chunks=[],
    )


async def _cost(
    connection: Connection,
    config: Config,
    entry: Entry,
    live: Generation,
    wanted: WantedVectors,
    embedders: Mapping[str, Embedder],
) -> tuple[Cost, IndexSpec]:
    """Return what the new chunks embed, by reading the table for a minute at most; and what they will be made by."""
    # What is wrong with another index is not in the way of this one.
    config = msgspec.structs.replace(config, indexes={entry.name: config.indexes[entry.name]})
    report = await examine(config, embedders)
    refuse(report)
    catalog, spec = report.catalog, next((one for one in report.specs if one.name == entry.name), None)
    if spec is None or catalog is None:
        pause = report.broken.get(entry.name)
        raise SetupError(
            f"the index cannot be followed: {pause.reason if pause else 'see cdcsync check'}",
            where=f"index {entry.name}",
            hint=pause.remedy if pause else None,
        )
    spec = msgspec.structs.replace(
        spec,
        config=wanted.index,
        model=wanted.embedder.identity,
        dimensions=wanted.embedder.dimensions,
        distance=wanted.distance,
        cutter=None,
        others=(),
    )
    # Texts that the index has a vector of are not embedded again, if it is of the same model and type.
    made = wanted.embedder.identity, wanted.embedder.dimensions, wanted.index.vector_type
    known = entry if made == (live.model, live.dimensions, live.vector_type) else None
    reading = Reading(known, Need("replay", True, ()))
    async with await connect_followed(config, connection, application_name="cdcsync migrate") as source:
        bounds = Bounds(seconds=COUNTED_S)
        return await cost_of(source, connection, config, spec, reading, embedders, catalog, bounds), spec


def reading_warnings(wanted: WantedVectors) -> Iterator[str]:
    """Say where the model reads less than a chunk has."""
    reads = wanted.embedder.max_input_tokens
    chunker = make_chunker(wanted.index.chunking, wanted.embedder.tokenizer_json, None)
    if reads is not None and chunker.capacity is not None and chunker.capacity > reads:
        yield (
            f"chunks have up to {chunker.capacity} tokens, and {wanted.index.embedder} reads {reads}: what is beyond is"
            " not in the vector"
        )
