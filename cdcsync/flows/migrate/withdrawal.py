"""A request that the holder of the pipeline's lock has not served yet, when the command that made it is interrupted.

An activation of other chunks is withdrawn; `rollback` withdraws one, too. The lock of the index's row decides: the
switch has been made by then, or is never made. A drop, which the operator has confirmed, is left to the worker.
"""

from __future__ import annotations

from typing import NamedTuple

from cdcsync.config import Config
from cdcsync.config.names import beside_name
from cdcsync.errors import CdcsyncError
from cdcsync.flows.migrate.present import opened
from cdcsync.postgres.errors import speaking_of
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.generations import Generations
from cdcsync.target.registry import Registry

PATIENCE = "SET LOCAL lock_timeout = '5s'"
"""How long to wait while the switch is being made: an attempt takes less than a second."""


class Withdrawn(NamedTuple):
    """The live generation, and the one whose activation was withdrawn; None if none was asked for."""

    live: int
    generation: int | None


async def withdraw_activation(config: Config, index: str, *, newer: bool = False) -> Withdrawn:
    """Withdraw the activation of the chunks beside an index, unless it has been made.

    :param newer: only of chunks that are newer than the live ones.
    :raises CdcsyncError: it could not be withdrawn now; a worker may still make it.
    """
    registry = Registry(config.target.schema)
    async with opened(config, index) as (connection, entry):
        with speaking_of("target", where=f"index {index}"):
            withdrawn = None
            async with connection.transaction():
                await connection.execute(PATIENCE)
                entry = await registry.find(connection, index, lock=True) or entry
                other = await registry.find(connection, beside_name(index), lock=True)
                asked = other is not None and other.activation_asked_at is not None
                if other is not None and asked and (other.generation > entry.generation or not newer):
                    await registry.withdraw(connection, other.name)
                    withdrawn = other.generation
                crash_point("activation withdrawn")
            crash_point("withdrawn activation committed")
    return Withdrawn(entry.generation, withdrawn)


async def end_of_switch(config: Config, index: str, generation: int) -> str:
    """Withdraw the switch of a command that was interrupted, and return what has become of it."""
    try:
        live, withdrawn = await withdraw_activation(config, index)
    except CdcsyncError as error:
        return _left_to_the_worker(f"the switch to generation {generation}", index, error)
    if live == generation:
        return f"generation {generation} is live: it was switched before the command was interrupted"
    what = "nothing was switched" if withdrawn is None else f"the switch to generation {withdrawn} is withdrawn"
    return f"{what}; generation {live} stays live"


async def end_of_drop(config: Config, index: str, generation: int) -> str:
    """Return what has become of the drop of a command that was interrupted."""
    try:
        async with opened(config, index) as (connection, _):
            with speaking_of("target", where=f"index {index}"):
                present = await Generations(config.target.schema).around(connection, index)
    except CdcsyncError as error:
        return _left_to_the_worker(f"the drop of generation {generation}", index, error)
    states = {one.generation: one.state for one in present}
    if generation not in states:
        return f"generation {generation} is dropped"
    if states[generation] == "dropping":
        return _left_to_the_worker(f"the drop of generation {generation}", index)
    return f"nothing was dropped; generation {generation} is {states[generation]}"


def _left_to_the_worker(what: str, index: str, error: CdcsyncError | None = None) -> str:
    why = "" if error is None else f" ({error.message})"
    return f"{what} is left to the worker{why}; see how it ends: cdcsync migrate {index} status"
