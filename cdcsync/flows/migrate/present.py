"""The present generations of an index: which of them is live, and which is not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from cdcsync.config import Config
from cdcsync.config.names import beside_name
from cdcsync.errors import SetupError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.generations import live_generation
from cdcsync.status.builds import read_builds
from cdcsync.status.generations import GenerationStatus, read_generations
from cdcsync.target.entries import Entry
from cdcsync.target.failures.documents import Listed, count_failed, has_list
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Registry
from cdcsync.target.version import open_target


class Started(msgspec.Struct, frozen=True):
    """A migration that has begun, or is in progress.

    :ivar begun: whether this command began it.
    :ivar chunks: how many vectors there will be; of a generation with chunks of its own, how many texts are embedded.
    :ivar tokens: of the texts that will be embedded; 0 where the vectors only have to be converted.
    :ivar price: of these tokens, in the currency of the embedder's `price_per_million_tokens`.
    :ivar warnings: what the operator should know.
    :ivar own_chunks: the keys that make other chunks, of a generation that has chunks of its own; else None.
    :ivar estimated: whether only a part of the table was read to count them.
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
    own_chunks: list[str] | None = None
    estimated: bool = False


@asynccontextmanager
async def opened(config: Config, index: str) -> AsyncIterator[tuple[Connection, Entry]]:
    """Connect to the target, and find the index there.

    :raises SetupError: the target does not hold the index, or another pipeline keeps it.
    """
    schema, where = config.target.schema, f"index {index}"
    config.index_named(index)
    async with await open_target(config.target, application_name="cdcsync migrate", works=True) as connection:
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


async def status(config: Config, index: str) -> list[GenerationStatus]:
    """Return the generations of an index, in the order of their numbers."""
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            schema = config.target.schema
            generations = await Generations(schema).around(connection, index) or [live_generation(entry, ())]
            other = await Registry(schema).find(connection, beside_name(index))
            lost = Listed()
            if other is not None and await has_list(connection, schema):
                lost = (await count_failed(connection, schema)).get(other.name, lost)
            builds = await read_builds(connection, schema)
            return await read_generations(connection, schema, entry, generations, builds, other=other, left_out=lost)


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


async def spare(config: Config, index: str) -> Generation:
    """Return the generation that is not live, which `drop` would drop.

    :raises SetupError: there is none.
    """
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            return other_generation(entry, await Generations(config.target.schema).around(connection, index))
