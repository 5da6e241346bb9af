"""The watch: what the stream does not tell, asked of the source from time to time while it flows.

    tables     is each still published as it was, and the one that it was, with the partitions it had
    slot       how much of `max_slot_wal_keep_size` does it hold, before that is a gap
    heartbeat  a message now and then, where an idle source should show that the pipeline moves

Source: PostgreSQL, "pg_replication_slots", "Replication" (max_slot_wal_keep_size); "System Administration Functions"
(pg_logical_emit_message).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio
import structlog

from cdcsync.config import Config
from cdcsync.crashpoints import crash_point
from cdcsync.errors import SchemaChanged, Unavailable
from cdcsync.flows.setup.partitions import follow_partitions
from cdcsync.flows.setup.start import unpublished_tables
from cdcsync.metrics import Metrics
from cdcsync.model.rows import AGAIN
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Session, speaking_of
from cdcsync.source.catalog import Slot, read_slot

log = structlog.get_logger()

WATCH_S = 5.0
"""How often the catalog is asked."""

RETENTION_MARKS = (0.5, 0.8)
"""Shares of `max_slot_wal_keep_size` that are worth a word: half, while there is time; four fifths, while there is
still some."""

RETENTION_SLACK = 0.05
"""How far below a mark the share must fall before the next crossing counts: WAL comes and goes by whole segments."""

HEARTBEAT_PREFIX = "cdcsync heartbeat"
"""The prefix of the messages: not that of the marks, which are looked for."""


class Retention:
    """Remembers which marks the slot's share of `max_slot_wal_keep_size` has passed, to tell of each crossing once."""

    def __init__(self) -> None:
        self._passed = 0

    def crossed(self, share: float) -> float | None:
        """Return the highest mark that was passed since the last call, None when none was."""
        above = sum(share >= mark for mark in RETENTION_MARKS)
        if above > self._passed:
            self._passed = above
            return RETENTION_MARKS[above - 1]
        while self._passed and share < RETENTION_MARKS[self._passed - 1] - RETENTION_SLACK:
            self._passed -= 1
        return None


def retained_share(slot: Slot) -> float:
    """Return how much of the WAL that it may hold a slot holds: 0.0 without a limit, from 1.0 on it may be lost."""
    if slot.wal_status == "lost":
        return 1.0
    if slot.safe_bytes is None or slot.retained_bytes is None:
        return 0.0
    # Beyond the limit, what is safe is negative, and retained and safe together are still the limit.
    limit = slot.retained_bytes + slot.safe_bytes
    return slot.retained_bytes / limit if limit > 0 else 1.0


async def watch(
    config: Config, specs: Sequence[IndexSpec], pause: Callable[[SchemaChanged], None], metrics: Metrics
) -> None:
    """Watch tables and slot until cancelled.

    :param pause: called with the reason when an index's table cannot be followed any more.
    """
    retention = Retention()
    async with (
        Session(config.source.dsn, "source", application_name="cdcsync watch") as session,
        Session(config.target.dsn, "target", application_name="cdcsync watch") as target,
    ):
        while True:
            await anyio.sleep(WATCH_S)
            try:
                with speaking_of("source"):
                    connection = await session.connection()
                    unpublished = await unpublished_tables(connection, config, specs)
                    slot = await read_slot(connection, config.source.slot)
                    await follow_partitions(connection, target, config, specs)
            except Unavailable as error:
                log.debug("watch_waits", error=str(error))
                continue
            for spec in specs:
                table = spec.shape.table
                if table in unpublished:
                    pause(SchemaChanged(unpublished[table], index=spec.name, where=str(table), hint=AGAIN))
            if slot is not None:
                share = retained_share(slot)
                metrics.slot_retained_share.set(share)
                if (mark := retention.crossed(share)) is not None:
                    _tell(slot, share, mark)


def _tell(slot: Slot, share: float, mark: float) -> None:
    tell = log.warning if mark < RETENTION_MARKS[-1] else log.error
    tell(
        "slot_retention",
        slot=slot.name,
        percent=round(100 * share),
        retained_bytes=slot.retained_bytes,
        safe_bytes=slot.safe_bytes,
        fix="let the index catch up: see why it is behind; or raise max_slot_wal_keep_size on the source",
    )


async def send_heartbeats(config: Config) -> None:
    """Write a message to the source's WAL every `source.heartbeat_every_s`, until cancelled; without it do nothing."""
    if not config.source.heartbeat_every_s:
        return
    async with Session(config.source.dsn, "source", application_name="cdcsync heartbeat") as session:
        while True:
            try:
                with speaking_of("source"):
                    # In no transaction: it takes no transaction id, and waits for no commit.
                    await (await session.connection()).execute(
                        "SELECT pg_logical_emit_message(false, %s, '')", [HEARTBEAT_PREFIX]
                    )
                    crash_point("heartbeat written")
            except Unavailable as error:
                log.debug("heartbeat_waits", error=str(error))
            await anyio.sleep(config.source.heartbeat_every_s)
