"""Changes that a command asks for and that cannot be made: the request is taken back.

No index of the pipeline is followed while such a change is tried, so a dump, or a transaction that somebody left open,
is not waited for (`attempt` of `postgres/locking`). The request is withdrawn with the reason, and can be made again.
"""

from __future__ import annotations

from cdcsync.config.names import own_name
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.generations import Generations
from cdcsync.target.registry import Registry


async def withdraw(connection: Connection, schema: str, index: str, generation: int, why: str, *, drop: bool) -> bool:
    """Note that what was asked of a generation cannot be done, and why: it stays, and is not live.

    :param index: the one that it is of, which for chunks that stand beside an index is their own.
    :param drop: whether it was to be dropped, and not to be made live.
    :returns: whether that is still asked.
    """
    registry = Registry(schema)
    async with connection.transaction():
        # The order in which every command locks these rows.
        await registry.find(connection, own_name(index), lock=True)
        await registry.withdraw(connection, index)
        refused = await Generations(schema).refuse(connection, index, generation, why, drop=drop)
        crash_point("request withdrawn")
    crash_point("withdrawn request committed")
    return refused
