"""`migrate drop`: asks for the end of the generation that searches do not use, and waits for it."""

from __future__ import annotations

import anyio

from cdcsync.config import Config
from cdcsync.config.differences import as_stored, contents_of
from cdcsync.config.names import beside_name
from cdcsync.errors import SetupError
from cdcsync.flows.migrate.present import opened, other_generation
from cdcsync.flows.setup.exchange import do_without_worker
from cdcsync.flows.setup.indexes import drop_generations
from cdcsync.postgres.errors import speaking_of
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.beside import asks_for_others
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generations
from cdcsync.target.registry import Registry
from cdcsync.target.search import stored_spec

POLL_S = 0.2
"""How often the command checks whether the worker has dropped a generation, or says why it cannot."""


async def drop(config: Config, index: str, generation: int) -> int:
    """Drop a generation that is not live, and return its number once it is gone.

    A running worker has to release it first; without one, it is dropped here.

    :raises SetupError: there is no such generation, or it is live by now; or others use it or have built on it; or the
        index is paused, so that a running worker lets go of it only later.
    """
    schema = config.target.schema
    async with opened(config, index) as (connection, _):
        with speaking_of("target", where=f"index {index}"):
            async with connection.transaction():
                entry = await Registry(schema).find(connection, index, lock=True)
                assert entry is not None
                await Registry(schema).withdraw(connection, beside_name(index))
                other = other_generation(entry, await Generations(schema).around(connection, index, lock=True))
                if other.generation != generation:
                    raise SetupError(
                        f"generation {generation} is not the one that searches do not use any more",
                        where=f"index {index}",
                        hint=f"see what is there now: cdcsync migrate {index} status",
                    )
                await Generations(schema).drop_asked(connection, other.index_name, other.generation)
                section = config.index_named(index)
                if other.of_other_chunks and asks_for_others(section, entry):
                    # Once nothing stands beside it any more, a worker with this file would make these in place.
                    await Registry(schema).decline(connection, index, [contents_of(as_stored(section))])
                crash_point("end of a generation asked for")
            crash_point("end of a generation committed")
            generations = Generations(schema)
            while left := [
                one for one in await generations.around(connection, index) if one.generation == other.generation
            ]:
                if left[0].state != "dropping":
                    why = left[0].refusal or "something else was asked of it meanwhile"
                    raise SetupError(
                        f"generation {generation} could not be dropped: {why}",
                        where=f"index {index}",
                        hint=f"see what is there now: cdcsync migrate {index} status",
                    )
                if await do_without_worker(connection, config):
                    spec = await stored_spec(connection, schema, index, config.index_named(index))
                    await drop_generations(connection, schema, spec)
                else:
                    # A worker looks for other chunks that are to go even where the index is paused.
                    entry = await Registry(schema).find(connection, index)
                    if not other.of_other_chunks or (entry is not None and entry.unfollowed_at is not None):
                        _require_followed(entry, generation)
                    await anyio.sleep(POLL_S)
    return other.generation


def _require_followed(entry: Entry | None, generation: int) -> None:
    """Refuse to wait for a worker that has nothing to do with an index until it is resumed.

    :raises SetupError: it is paused, or the worker's file does not have it.
    """
    if entry is not None and entry.unfollowed_at is not None:
        raise SetupError(
            f"no worker follows the index; one drops generation {generation} once it does",
            where=f"index {entry.name}",
            hint="start the worker with a file that has the index; or stop the worker, and run this again",
        )
    if entry is not None and entry.state == "paused":
        raise SetupError(
            f"the index is paused; the worker drops generation {generation} once it follows the index again",
            where=f"index {entry.name}",
            hint="correct what `cdcsync status` says of it; or stop the worker, and run this again",
        )
