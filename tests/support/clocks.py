"""Clocks that a test sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cdcsync.postgres.sessions import Connection

if TYPE_CHECKING:  # pytest registers each fixture file before anything may import it
    from tests.support.servers import Database


class Clock:
    """Returns `now`, in seconds; stands still until a test sets it."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


async def set_back(connection: Connection, database: Database) -> None:
    """Have the statements of one session read a clock of the server that is an hour behind, from now on."""
    database.execute(
        "CREATE SCHEMA behind; GRANT USAGE ON SCHEMA behind TO PUBLIC;"
        " CREATE FUNCTION behind.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
        " AS 'SELECT pg_catalog.clock_timestamp() - interval ''1 hour'''"
    )
    await connection.execute("SET search_path = behind, pg_catalog")
