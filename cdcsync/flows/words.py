"""The words flow: counts the words of each index again when enough of its chunks have changed.

Searches weight words by how rare they are. A count that is some tenths off changes no order, so an index is counted
again only after a tenth of it changed, and counting takes a bounded share of the time.

Where the target has the extension pg_textsearch, each live index gets an index of that, and searches rank by it. An
administrator may install or drop the extension at any time; the search function ranks by the counts meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import structlog
from psycopg import sql

from cdcsync.backoff import backoff_s
from cdcsync.errors import CdcsyncError, Unavailable
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import IDLE_S, Connection, Session, speaking_of
from cdcsync.target.ddl.bm25 import bm25_option
from cdcsync.target.ddl.building import keep_bm25
from cdcsync.target.ddl.names import Names, words_name
from cdcsync.target.registry import Registry
from cdcsync.target.search import count_words

log = structlog.get_logger()

LOOK_EVERY_S = 60.0
"""How often it is asked how much has changed: a row of the server's statistics for each index."""

CHANGED_SHARE = 0.1
"""An index is counted again when so many of its chunks were written since the last time."""

SHARE = 0.01
"""How much of the time words may be counted: what took a second is not done again for a hundred."""


async def count_words_for_ever(dsn: str, schema: str, specs: Sequence[IndexSpec]) -> None:
    """Keep the counts of words of these indexes current, until cancelled."""
    counted_at: dict[str, int] = {}
    searchable = [spec for spec in specs if spec.config.search is not None]
    failures = {spec.name: _Failures() for spec in searchable}
    async with Session(dsn, "target", application_name="cdcsync words", idle_s=IDLE_S) as target:
        while searchable:
            started = anyio.current_time()
            for spec in searchable:
                # One index may lack what another has: memory for its index, or a text search configuration.
                if anyio.current_time() < failures[spec.name].until:
                    continue
                try:
                    connection = await target.connection()
                    with speaking_of("target", where=f"index {spec.name}"):
                        await _count_if_changed(connection, schema, spec, counted_at)
                        await _keep_ranking(connection, schema, spec)
                    failures[spec.name] = _Failures()
                except CdcsyncError as error:
                    log.warning("words_not_counted", index=spec.name, error=str(error), fix=error.hint)
                    failures[spec.name].add(error)
            took = anyio.current_time() - started
            await anyio.sleep(max(LOOK_EVERY_S, took / SHARE))


class _Failures:
    """The failures of one index in a row, and until when it is left alone."""

    def __init__(self) -> None:
        self._count = 0
        self.until = 0.0

    def add(self, error: CdcsyncError) -> None:
        self._count += 1 if isinstance(error, Unavailable) else 5  # which does not pass by itself
        self.until = anyio.current_time() + backoff_s(self._count, most=3600)


async def _count_if_changed(connection: Connection, schema: str, spec: IndexSpec, counted_at: dict[str, int]) -> None:
    """Count an index's words if it has never been, or if enough was written since."""
    row = await fetch_row(
        connection,
        sql.SQL(
            "SELECT s.n_tup_ins + s.n_tup_upd + s.n_tup_del, s.n_live_tup,"
            " (SELECT w.chunks FROM {} AS w WHERE w.lexeme = '')"
            " FROM pg_stat_user_tables AS s WHERE s.relid = to_regclass(%s)"
        ).format(words_name(schema, spec.relations)),
        [Names(schema, spec.relations).chunks.as_string(connection)],
    )
    if row is None:
        return
    written, live, counted = row
    before = counted_at.get(spec.name)
    if before is None and counted is not None and abs(live - counted) <= CHANGED_SHARE * live:
        counted_at[spec.name] = written  # by the worker before this one
    elif before is None or written - before > CHANGED_SHARE * live:
        looked_at = await count_words(connection, schema, spec)
        counted_at[spec.name] = written
        log.info("words_counted", index=spec.name, chunks=looked_at)


async def _keep_ranking(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Rank a live index by pg_textsearch if the target has that extension, else by the index's counts."""
    entry = await Registry(schema).find(connection, spec.name)
    if entry is None or entry.state != "live":
        return
    if await keep_bm25(connection, schema, spec):
        by = "pg_textsearch" if await bm25_option(connection, schema, spec) else "sql"
        log.info("words_ranked", index=spec.name, by=by)
