"""Notices that a provider serves another model under the same name: the same text gives another vector than it did.

    a fixed text, once a day ─► its vector ─► compared with the one that is kept in the target ─► status, metric, log

A provider's name for a model says nothing of its weights. Vectors of two models cannot be compared, so searches get
worse without an error. Numbers of one model differ a little from call to call; beyond `TOLERANCE` it is another model.
Other dimensions need no probe: every answer is checked for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import anyio
import structlog

from cdcsync.backoff import backoff_s
from cdcsync.errors import CdcsyncError
from cdcsync.flows.embed.dispatcher import Dispatcher
from cdcsync.flows.embed.pool import BacklogPool
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import Probe, cosine_distance
from cdcsync.postgres.errors import speaking_of
from cdcsync.target.embedders import read_probe, write_probe

log = structlog.get_logger()

TEXT = "A quick brown fox jumps over 13 lazy dogs; nobody at Grünhof saw it, said the report of May 1987."
"""The text: long enough that models differ in it, and never changed, because its vectors are kept."""

EVERY = timedelta(days=1)

MOST_PAUSE_S = 3_600.0
"""The longest pause after a probe that failed: of an embedder that works otherwise, the text is refused."""

LOOK_S = 60.0
"""How often it is looked whether a probe is due. The first look is as late, so that a short run asks for nothing."""


async def probe_for_ever(
    pool: BacklogPool,
    schema: str,
    slot: str,
    dispatchers: Mapping[str, Dispatcher],
    metrics: Metrics,
    *,
    look_s: float = LOOK_S,
) -> None:
    """Probe each of these embedders whenever that is due, until cancelled."""
    told: set[str] = set()
    failures = dict.fromkeys(dispatchers, 0)
    not_before = dict.fromkeys(dispatchers, 0.0)
    while dispatchers:
        await anyio.sleep(look_s)
        for name, dispatcher in dispatchers.items():
            if not dispatcher.ready.is_set() or dispatcher.problem is not None:
                continue
            if anyio.current_time() < not_before[name]:
                continue
            try:
                probe = await _look(pool, schema, slot, dispatcher)
            except CdcsyncError as error:
                # An embedder that fails as a whole is a problem of the dispatcher's from now on.
                pause = backoff_s(failures[name], first=look_s, most=MOST_PAUSE_S)
                failures[name] += 1
                not_before[name] = anyio.current_time() + pause
                log.debug("probe_waits", embedder=name, error=str(error))
                continue
            failures[name] = 0
            metrics.embedder_drift.labels(name).set(probe.drift)
            if not probe.changed:
                told.discard(name)
            elif name not in told:
                told.add(name)
                log.error("model_changed", embedder=name, drift=round(probe.drift, 4), since=probe.made_at.isoformat())


async def _look(pool: BacklogPool, schema: str, slot: str, dispatcher: Dispatcher) -> Probe:
    """Return the last probe of an embedder, a new one if that is due.

    :raises CdcsyncError: the embedder or the target fails now.
    """
    name, identity, now = dispatcher.embedder.name, dispatcher.embedder.identity, datetime.now(UTC)
    async with pool.connection() as connection:
        with speaking_of("target"):
            kept = await read_probe(connection, schema, slot, name)
    if kept is not None and kept.identity == identity and abs(now - kept.checked_at) < EVERY:
        return kept
    vector = tuple(float(number) for number in await dispatcher.probe(TEXT))
    if kept is None or kept.identity != identity:
        probe = Probe(identity, vector, now, now, 0.0)
    else:
        probe = Probe(identity, kept.vector, kept.made_at, now, cosine_distance(kept.vector, vector))
    async with pool.connection() as connection:
        with speaking_of("target"):
            await write_probe(connection, schema, slot, name, probe)
    return probe
