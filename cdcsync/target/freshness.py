"""How far an index holds what its source committed, as those see it who only read the target.

The checkpoint is of a pipeline. An index that is paused, being built, read again or no longer followed does not keep up
with it, and then nothing can be said of how far it is; nor of a generation of its vectors that is being built. For an
index that is live `wait_for` decides that here too, so that a position which is told and one which is waited for mean
the same.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config.names import own_name
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target import generations
from cdcsync.target.entries import TABLE, State


class Freshness(msgspec.Struct, frozen=True):
    """The state of an index, and its position if it has one.

    :ivar state: as it is registered; `gone` if it is not.
    :ivar lsn: the index holds everything that the source had committed up to here; None if that is not known.
    :ivar lag_s: for how many seconds it may have been behind; None likewise.
    :ivar warning: why the position is not known, for callers of any kind; None if it is, or nothing was followed yet.
    """

    state: State | Literal["gone"] = "gone"
    lsn: str | None = None
    lag_s: float | None = None
    warning: str | None = None


async def read_freshness(connection: Connection, schema: str, spec: IndexSpec) -> Freshness:
    """Return how fresh an index is, with the generation of vectors that the spec has, in one statement."""
    index = own_name(spec.name)
    statement = sql.SQL(
        "SELECT i.state, i.unfollowed_at IS NOT NULL, g.state = 'filling' AND i.generation <> g.generation,"
        " p.checkpoint::text, extract(epoch FROM now() - greatest(p.commit_time,"
        # A time ahead of the target's clock was set before that went back. The source's clock is another one.
        " CASE WHEN p.caught_up_at <= clock_timestamp() THEN p.caught_up_at END))::float8,"
        " CASE WHEN i.state = 'live' AND i.unfollowed_at IS NULL AND p.checkpoint IS NOT NULL"
        " THEN {}(i.name, p.checkpoint, '0 s') END"
        " FROM {} AS i JOIN {} AS p USING (slot)"
        " LEFT JOIN {} AS g ON g.index_name = i.name AND g.generation = %s WHERE i.name = %s"
    ).format(
        sql.Identifier(schema, "wait_for"),
        sql.Identifier(schema, TABLE),
        sql.Identifier(schema, "pipelines"),
        sql.Identifier(schema, generations.TABLE),
    )
    asked = [spec.generation, spec.name]
    try:
        row = await fetch_row(connection, statement, asked)
    except psycopg.errors.RaiseException:  # paused between our look at its row and that of wait_for
        row = await fetch_row(connection, statement, asked)
    except psycopg.errors.InsufficientPrivilege:  # somebody has taken EXECUTE from PUBLIC
        row = await fetch_row(
            connection,
            sql.SQL("SELECT state FROM {} WHERE name = %s").format(sql.Identifier(schema, TABLE)),
            [spec.name],
        )
        unseen = f"how fresh the index '{index}' is cannot be seen: the server's role may not execute wait_for"
        return Freshness() if row is None else Freshness(row[0], warning=unseen)
    if row is None:
        return Freshness()
    state, unfollowed, filling, lsn, lag_s, whole = row
    if whole and not filling:
        return Freshness(state, lsn, None if lag_s is None else round(max(0.0, lag_s), 3))
    of = f"the index '{index}'"
    built = of if spec.name == index and not filling else f"generation {spec.generation} of {of}"
    return Freshness(
        state, warning=_warning(of, built, "building" if filling else state, unfollowed=unfollowed, whole=whole)
    )


def _warning(of: str, built: str, state: State, *, unfollowed: bool, whole: bool | None) -> str | None:
    """Return why nothing is known of an index's position. The reason of a pause may name a row, so it is not told."""
    if unfollowed:
        return f"{of} is no longer followed"
    match state:
        case "paused":
            return f"{of} is paused"
        case "building":
            return f"{built} is being built: a search may not find all of it"
        case "live":
            return None if whole is None else f"{of} is being completed: it may lack rows, or hold older ones"
