"""Tidying: what changes leave behind is removed before searches and the next changes pay for it.

A vector that changes while it is fresh, or settles, leaves a dead row, and a dead entry in the tier's list that every
search compares until VACUUM. Autovacuum looks once a minute by default, and a thousand changes a second make a search
of 2,000 fresh vectors 50 times as slow in that minute. The list also keeps its empty pages for ever. So the worker
vacuums the tier itself, and builds the list anew where most of its pages are empty.

The words of changed chunks wait in the pending list of their GIN index, which every search reads whole. The insert that
fills the list (`gin_pending_list_limit`, 4 MB by default) enters all of it into the index, and its transaction takes
some tenths of a second for that. So the worker does it beside apply, while the list is short.

Source: PostgreSQL, "VACUUM", "REINDEX", "The Cumulative Statistics System" (pg_stat_get_dead_tuples), "GIN Fast Update
Technique", "System Administration Functions" (gin_clean_pending_list).
"""

from __future__ import annotations

import msgspec
import psycopg
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import LOCKED_OUT
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.tiers import LIST_MEMORY

DEAD_ROWS = 1_000
"""So many dead rows of 384 dimensions add a quarter of a millisecond to a search; a VACUUM takes some milliseconds."""

SPARE_PAGES = 500
"""Pages of the list that may be empty: 0.3 ms of a search."""

LIST_ROWS = 5_000
"""Searches wait while the list is built: for so many rows of 384 dimensions some 30 ms. A larger one is left alone."""

WORDS_MS = 2_000
"""So long words are entered into their index at once."""

PAGE_BYTES = 8_100
"""Bytes of a page that vectors can use."""

ENTRY_BYTES = 24
"""Bytes of an entry of the list besides its values."""

VALUE_BYTES = {"vector": 4, "halfvec": 2}


class Untidy(msgspec.Struct, frozen=True):
    """Parts of the fresh tier that it does not need.

    The server's statistics begin anew at zero after a crash, a failover or pg_stat_reset(). A VACUUM too many does no
    harm, but searches wait while the list is built, so its rows are counted.

    :ivar live: rows, by the server's statistics.
    :ivar dead: rows that VACUUM would remove, unless an old transaction still sees them; by the statistics.
    :ivar listed: rows, counted; one more than `LIST_ROWS` at most.
    :ivar pages: pages of the list.
    """

    live: int
    dead: int
    listed: int
    pages: int

    @property
    def vacuum(self) -> bool:
        """Whether to vacuum: a search spends a quarter as much on what is dead as on what is alive."""
        return self.dead > max(DEAD_ROWS, self.live // 4)

    def rebuild(self, spec: IndexSpec) -> bool:
        """Say whether to build the list anew."""
        entry = ENTRY_BYTES + spec.dimensions * VALUE_BYTES[spec.config.vector_type]
        needed = (self.listed + self.dead) // max(1, PAGE_BYTES // entry) + 1
        return self.listed <= LIST_ROWS and self.pages > 2 * needed + SPARE_PAGES


async def tidy(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Vacuum the fresh tier and build its list anew, each if it is worth it. Needs a connection in autocommit."""
    names = Names(schema, spec.relations)
    fresh = names.fresh(spec.generation)
    near = sql.Identifier(schema, names.near_name(spec.generation))
    if (await _look(connection, fresh, near)).vacuum:
        # Whoever vacuums it already is not waited for.
        await connection.execute(sql.SQL("VACUUM (SKIP_LOCKED) {}").format(fresh))
        crash_point("fresh vacuumed")
    if (await _look(connection, fresh, near)).rebuild(spec):
        try:
            async with connection.transaction():
                await connection.execute(f"{BRIEFLY}; {LIST_MEMORY}")
                await connection.execute(sql.SQL("REINDEX INDEX {}").format(near))
                crash_point("fresh list written")
            crash_point("fresh list rebuilt")
        except LOCKED_OUT:
            return  # a long search: the next look tries again


async def enter_words(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Enter the words that wait for it into the index for keyword search, if that is there and we act for its owner.

    Whoever does so already, VACUUM for one, is not waited for, and no snapshot is kept for long.
    """
    try:
        async with connection.transaction():
            await connection.execute(f"{BRIEFLY}; SET LOCAL statement_timeout = {WORDS_MS}")
            await connection.execute(
                "SELECT gin_clean_pending_list(c.oid) FROM pg_class AS c JOIN pg_index AS i ON i.indexrelid = c.oid"
                " WHERE c.oid = to_regclass(%s) AND i.indisvalid AND pg_has_role(c.relowner, 'USAGE')",
                [sql.Identifier(schema, Names(schema, spec.relations).search_name).as_string(connection)],
            )
            crash_point("words entered")
        crash_point("entered words committed")
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
        return  # what was entered stays entered


async def _look(connection: Connection, fresh: sql.Identifier, near: sql.Identifier) -> Untidy:
    return Untidy(
        *await fetch_one(
            connection,
            sql.SQL(
                "SELECT pg_stat_get_live_tuples(f.oid), pg_stat_get_dead_tuples(f.oid),"
                " (SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS listed), coalesce("
                "pg_relation_size(to_regclass(%s)) / current_setting('block_size')::int8, 0)"
                " FROM (SELECT %s::regclass AS oid) AS f"
            ).format(fresh, LIST_ROWS + 1),
            [near.as_string(connection), fresh.as_string(connection)],
        )
    )
