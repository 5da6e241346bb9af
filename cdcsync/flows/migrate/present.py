"""The present generations of an index: which of them is live, and which is not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from cdcsync.config import Config
from cdcsync.errors import SetupError
from cdcsync.postgres.sessions import Connection, connect, speaking_of
from cdcsync.preflight.generations import live_generation
from cdcsync.status.generations import GenerationStatus, read_generations
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Entry, Registry


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


async def spare(config: Config, index: str) -> Generation:
    """Return the generation that is not live, which `drop` would drop.

    :raises SetupError: there is none.
    """
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            return other_generation(entry, await Generations(config.target.schema).of(connection, index))
