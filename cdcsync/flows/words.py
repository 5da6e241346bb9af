"""The words flows: count the words of each index again when enough of its chunks have changed, and enter new words.

Searches weight words by how rare they are. A count that is some tenths off changes no order, so an index is counted
again only after a tenth of it changed, and counting takes a bounded share of the time.

Where the target has the extension pg_textsearch, each live index gets an index of that, and searches rank by it. An
administrator may install or drop the extension at any time; the search function ranks by the counts meanwhile.

The words of changed chunks are entered into the index for keyword search each second (`target/tidying`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio
import structlog
from psycopg import sql

from cdcsync.backoff import Backoff, Cooldown
from cdcsync.errors import CdcsyncError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import BRIEFLY, SHARED_LOCK_WAIT_MS
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import IDLE_S, Connection, Session
from cdcsync.target.ddl.bm25 import bm25_option
from cdcsync.target.ddl.building import HELD_S, keep_bm25
from cdcsync.target.ddl.names import Names, words_name
from cdcsync.target.registry import Registry
from cdcsync.target.search import count_words
from cdcsync.target.tidying import enter_words

log = structlog.get_logger()

LOOK_EVERY_S = 60.0
"""How often it is asked how much has changed: a row of the server's statistics for each index."""

CHANGED_SHARE = 0.1
"""An index is counted again when so many of its chunks were written since the last time."""

SHARE = 0.01
"""How much of the time words may be counted: what took a second is not done again for a hundred."""


ENTER_EVERY_S = 1.0
"""How often the words of changed chunks are entered into their index; see `target/tidying`."""


async def count_words_for_ever(dsn: str, schema: str, specs: Sequence[IndexSpec]) -> None:
    """Keep the counts of words of these indexes current, until cancelled."""
    counted_at: dict[str, int] = {}

    async def count(connection: Connection, spec: IndexSpec) -> None:
        await _count_if_changed(connection, schema, spec, counted_at)
        await _keep_ranking(connection, schema, spec)

    def failed(spec: IndexSpec, error: CdcsyncError) -> None:
        log.warning("words_not_counted", index=spec.name, error=str(error), fix=error.hint)

    async with Session(
        dsn, "target", application_name="cdcsync words", idle_s=IDLE_S, lock_wait_ms=SHARED_LOCK_WAIT_MS, works=True
    ) as target:
        await _for_ever(
            target, specs, count, failed, "words are not counted", lambda took_s: max(LOOK_EVERY_S, took_s / SHARE)
        )


async def enter_words_for_ever(dsn: str, schema: str, specs: Sequence[IndexSpec]) -> None:
    """Keep the pending lists of the indexes for keyword search short, until cancelled.

    Over a session of its own: a long list takes seconds, which nothing else has to wait for.
    """

    async def enter(connection: Connection, spec: IndexSpec) -> None:
        await enter_words(connection, schema, spec)

    def failed(spec: IndexSpec, error: CdcsyncError) -> None:
        log.warning("words_not_entered", index=spec.name, error=str(error), fix=error.hint)

    async with Session(dsn, "target", application_name="cdcsync pending words") as target:
        await _for_ever(target, specs, enter, failed, "words are not entered", lambda _: ENTER_EVERY_S)


async def _for_ever(
    target: Session,
    specs: Sequence[IndexSpec],
    work: Callable[[Connection, IndexSpec], Awaitable[None]],
    failed: Callable[[IndexSpec, CdcsyncError], None],
    waits: str,
    pause_s: Callable[[float], float],
) -> None:
    """Work on each index that has words, one after the other, again and again.

    :param failed: called with an index whose work failed, which is left alone for a while.
    :param waits: what cannot be done while the target is away.
    :param pause_s: how long to wait after a round that took so long.
    """
    searchable = [spec for spec in specs if spec.config.search is not None]
    cooldowns = {spec.name: Cooldown() for spec in searchable}
    backoff = Backoff(lambda failure: log.warning("words_wait", error=str(failure.error)), waits=waits)
    while searchable:
        async with backoff:
            started = anyio.current_time()
            for spec in searchable:
                # One index may lack what another has: memory for its index, or a text search configuration.
                if not cooldowns[spec.name].over:
                    continue
                connection = await target.connection()
                try:
                    with speaking_of("target", where=f"index {spec.name}"):
                        await work(connection, spec)
                    cooldowns[spec.name].succeeded()
                except CdcsyncError as error:
                    failed(spec, error)
                    cooldowns[spec.name].failed(error)
            backoff.succeeded()
            await anyio.sleep(pause_s(anyio.current_time() - started))


async def _written(connection: Connection, schema: str, spec: IndexSpec) -> tuple[int, int, int | None] | None:
    """Return how many rows of chunks were written, how many there are, and how many were counted last.

    The first two are of the server's statistics. They begin anew at zero after a crash, a failover or pg_stat_reset().
    """
    async with connection.transaction():
        await connection.execute(BRIEFLY)
        return await fetch_row(
            connection,
            sql.SQL(
                "SELECT s.n_tup_ins + s.n_tup_upd + s.n_tup_del, s.n_live_tup,"
                " (SELECT w.chunks FROM {} AS w WHERE w.lexeme = '')"
                " FROM pg_stat_user_tables AS s WHERE s.relid = to_regclass(%s)"
            ).format(words_name(schema, spec.relations)),
            [Names(schema, spec.relations).chunks.as_string(connection)],
        )


async def _count_if_changed(connection: Connection, schema: str, spec: IndexSpec, counted_at: dict[str, int]) -> None:
    """Count an index's words if it has never been, or if enough was written since."""
    if (row := await _written(connection, schema, spec)) is None:
        return
    written, live, counted = row
    before = counted_at.get(spec.name)
    if before is None and counted is not None and abs(live - counted) <= CHANGED_SHARE * live:
        counted_at[spec.name] = written  # by the worker before this one
    elif before is None or counted is None or not 0 <= written - before <= CHANGED_SHARE * counted:
        # Less was written than before if the server's statistics began anew: nobody knows how much has changed.
        looked_at = await count_words(connection, schema, spec)
        counted_at[spec.name] = written
        log.info("words_counted", index=spec.name, chunks=looked_at)


async def _keep_ranking(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Rank a live index by pg_textsearch if the target has that extension, else by the index's counts."""
    entry = await Registry(schema).find(connection, spec.name)
    if entry is None or entry.state != "live":
        return
    if await keep_bm25(connection, schema, spec, patience_s=HELD_S):
        by = "pg_textsearch" if await bm25_option(connection, schema, spec) else "sql"
        log.info("words_ranked", index=spec.name, by=by)
