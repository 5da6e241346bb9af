"""Collations whose order has changed since the server recorded their versions, so that indexes may be sorted wrongly.

The order of texts comes from a library, the C library's or ICU's. Another version of it may sort otherwise, and an
index that was sorted by the earlier one then misses rows. That happens when the files of a server are taken to another
version of the operating system: by a new image, a physical copy, a standby, or pg_upgrade. The server records the
version of each collation, and that of a database's own collation from PostgreSQL 15 on.

Source: PostgreSQL, "ALTER COLLATION" (Notes), "ALTER DATABASE" (REFRESH COLLATION VERSION), "System Catalogs"
(pg_collation, pg_database).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import LiteralString

import msgspec

from cdcsync.config.names import quote
from cdcsync.postgres.queries import fetch_rows
from cdcsync.postgres.sessions import Connection

DATABASES_VERSION = 150000
"""PostgreSQL 15: pg_database.datcollversion. Earlier ones do not record by which version a database sorts."""

DEFAULT_COLLATION = 'pg_catalog."default"'
"""The collation of columns that name none: that of the database."""

_NAMED: LiteralString = """
    WITH named AS MATERIALIZED (
        SELECT c.oid, format('%%I.%%I', n.nspname, c.collname) AS name, c.collversion AS recorded
        FROM pg_collation c JOIN pg_namespace n ON n.oid = c.collnamespace
        WHERE format('%%I.%%I', n.nspname, c.collname) = ANY(%(names)s)
            AND (c.collencoding = -1 OR pg_encoding_to_char(c.collencoding) = getdatabaseencoding())
    )
    SELECT name, current_database()::text, recorded, pg_collation_actual_version(oid) FROM named
    WHERE recorded <> pg_collation_actual_version(oid)"""
"""Of two of one name, such as en_US, columns have that of the database's encoding, and ALTER COLLATION refreshes it.
Apart, because ICU has some eight hundred collations, and to ask it for a version it opens the collation."""

_OF_THE_DATABASE: LiteralString = """
    UNION ALL
    SELECT %(default)s, d.datname::text, d.datcollversion, pg_database_collation_actual_version(d.oid)
    FROM pg_database d
    WHERE d.datname = current_database() AND %(default)s = ANY(%(names)s)
        AND d.datcollversion <> pg_database_collation_actual_version(d.oid)"""


class Outdated(msgspec.Struct, frozen=True):
    """A collation whose recorded version is not that of the library.

    :ivar name: as SQL writes it, with its schema.
    :ivar database: the database in which it was looked at.
    :ivar recorded: the version that indexes were sorted by when it was recorded.
    :ivar present: the version that the server sorts by now.
    """

    name: str
    database: str
    recorded: str
    present: str

    def __str__(self) -> str:
        what = f"the collation {self.name}"
        if self.name == DEFAULT_COLLATION:
            what = f"the default collation of the database {quote(self.database)}"
        return f"{what}, recorded in version {self.recorded}, while the server sorts by version {self.present}"

    @property
    def owner(self) -> str:
        """Who may type these statements: a collation that came with the server is its superuser's."""
        builtin = self.name.startswith("pg_catalog.") and self.name != DEFAULT_COLLATION
        return "a superuser" if builtin else "the owner of the database"

    @property
    def rebuild(self) -> str:
        """The statement that sorts all indexes of the database anew."""
        return f"REINDEX DATABASE CONCURRENTLY {quote(self.database)}"

    @property
    def refresh(self) -> str:
        """The statement that records the present version, once that is done."""
        if self.name == DEFAULT_COLLATION:
            return f"ALTER DATABASE {quote(self.database)} REFRESH COLLATION VERSION"
        return f"ALTER COLLATION {self.name} REFRESH VERSION"


async def outdated_collations(connection: Connection, names: Collection[str]) -> dict[str, Outdated]:
    """Return those of some collations whose version has changed, by their names as SQL writes them.

    One whose version the library does not tell, such as "C" or a locale of musl, is left out.
    """
    if not names:
        return {}
    asked = _NAMED
    if connection.info.server_version >= DATABASES_VERSION:
        asked += _OF_THE_DATABASE
    rows = await fetch_rows(connection, asked, {"names": list(names), "default": DEFAULT_COLLATION})
    return {row[0]: Outdated(*row) for row in rows}
