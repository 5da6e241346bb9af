"""Changes of relations that others may be using: they are tried a few times, and then withdrawn.

A command asks for such a change, and no index of the pipeline is followed while it is made. So a dump, or a transaction
that somebody left open, is not waited for. The request is taken back instead, with the reason, and can be made again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from cdcsync.config import QualifiedName
from cdcsync.config.names import own_name
from cdcsync.errors import SetupError
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import LOCKED_OUT
from cdcsync.postgres.locking import REPLACING_WAITS, exclusive_locks, until_locked
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.generations import Generations
from cdcsync.target.registry import Registry

T = TypeVar("T")

ATTEMPTS = 6
"""How often a change is tried: for some seconds in all."""

OPEN_FOR_S = 1.0
"""A transaction that is younger was not in the way of the first attempts."""


async def attempt(
    connection: Connection,
    change: Callable[[], Awaitable[T]],
    relations: Sequence[QualifiedName],
    *,
    where: str,
    vacuumed: Vacuumed | None = None,
) -> T:
    """Do a change as `until_locked` does, a few times.

    :param relations: the ones that nobody else may use meanwhile. The first names the change in the log.
    :raises SetupError: others used them each time; nothing was changed. It names one of them.
    """
    try:
        return await until_locked(change, table=str(relations[0]), attempts=ATTEMPTS, vacuumed=vacuumed)
    except LOCKED_OUT as error:
        held = await exclusive_locks(connection, relations, modes=REPLACING_WAITS, open_for_s=OPEN_FOR_S)
        raise SetupError(
            "other transactions have locked its view or tables for some seconds, a dump for one"
            + "".join(f": {lock}" for lock in held[:1]),
            where=where,
            hint=f"{held[0].remedy}; then try again"
            if held
            else "see pg_locks and pg_stat_activity; when they are over, try again",
        ) from error


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
