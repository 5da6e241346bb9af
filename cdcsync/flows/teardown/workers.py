"""Sees that no worker follows what is dropped, and that none begins to."""

from __future__ import annotations

from cdcsync.config import Config
from cdcsync.errors import SetupError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.entries import Entry
from cdcsync.target.pipelines import Pipelines

ENDING_S = 5.0
"""How long to wait for what a worker that has just ended holds: a server notices that within a moment, or a busy one
within some seconds."""


async def hold_pipeline(target: Connection, config: Config) -> None:
    """Take the pipeline's lock for as long as the session lasts.

    :raises SetupError: a worker runs.
    """
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        if await pipelines.try_lock(target, wait_s=ENDING_S):
            return
        holder = await pipelines.holder(target)
    raise SetupError(
        "a worker runs for this pipeline" + (f" (its session in the target has pid {holder})" if holder else ""),
        where=f"slot {config.source.slot}",
        hint="stop it, and every standby, then tear down again",
    )


async def hold_index(target: Connection, config: Config, entry: Entry, *, wait: bool = False) -> bool:
    """See that no worker follows an index, and that none begins to; returns whether that took the pipeline's lock.

    :param wait: whether to wait for a worker that is just ending.
    :raises SetupError: one does.
    """
    pipelines = Pipelines(config.target.schema, config.source.slot)
    if entry.unfollowed_at is not None:
        return False
    if await pipelines.try_lock(target, wait_s=ENDING_S if wait else 0):
        return True
    holder = await pipelines.holder(target)
    raise SetupError(
        f"a worker follows the index (its session in the target has pid {holder})",
        where=f"index {entry.name}",
        hint=f"remove [indexes.{entry.name}] from its configuration and start it again; then drop the index",
    )


async def raise_fence(target: Connection, config: Config) -> None:
    """Have a worker that was cut off write nothing more before it has examined what there is."""
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        lease = await pipelines.take_over(target)
        crash_point("fence raised to drop")
        await pipelines.end_overtaken(target, lease)
