"""The settle flow: vectors that have rested move into the HNSW index, at the pace that the target can spare.

    look at both tiers ─► what has rested, the oldest first ─► moves, over a few connections ─► look again

Fresh vectors cost every search a comparison each, and settling costs the target some milliseconds of a processor for
each. So settling takes its time while the comparisons stay within the index's `fresh_scan_budget_ms`: it waits until a
vector has not changed for a while, leaves pauses, and stands back while the stream is late. Beyond the budget it takes
precedence: no pauses, no rest, all its connections. Where so much is fresh that the HNSW index is better built anew,
that waits for a stream that is far behind, but not for long.

What changed and moved vectors leave behind in fresh is removed before each look (`target/tidying`).

Each move is a transaction, and nothing is remembered between two of them: the flow can be stopped at any moment and
begun again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import anyio
import structlog

from cdcsync.backoff import Backoff, Cooldown
from cdcsync.config.sections import Worker
from cdcsync.errors import CdcsyncError, SetupError, leading
from cdcsync.metrics import Metrics
from cdcsync.model.lag import CLOSE_S, Lag
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import SHARED_LOCK_WAIT_MS, away
from cdcsync.postgres.sessions import Session
from cdcsync.target.ddl.rebuilding import Emptied, Rebuild
from cdcsync.target.settling import Settling, Tiers
from cdcsync.target.tidying import tidy

log = structlog.get_logger()

LOOK_S = 1.0
"""How often the tiers are looked at while nothing moves: a count of few rows, and one comparison of them."""

LOOKS = 10
"""So many of the last looks say what a comparison costs."""

NOTE_S = 5.0
"""How often what was seen is written down for `cdcsync status`."""

ROUND = 512
"""Vectors that are chosen at once: a second's work, after which the tiers are looked at again."""

MOVE = 32
"""Vectors in one transaction: 0.1 s of HNSW, which is what a TRUNCATE may have to wait for."""


REBUILD_SHARE = 0.3
"""Beyond this share of the settled vectors it takes less to build all of them anew than to insert the fresh ones: a row
costs some 0.4 ms when HNSW is built, and some 2 ms of two connections when it grows."""

REBUILD_ROWS = 5_000
"""Fewer are inserted within seconds."""

REBUILD_WAITS_S = 60.0
"""How long a rebuild waits for a stream that is far behind: it takes several processors of the target, and a stream
that catches up brings more vectors for the same rebuild."""

REBUILD_AGAIN_S = 300.0
"""How soon a rebuild is tried again after it failed."""


CLEAR_ATTEMPTS = 4
"""How often a turn asks for the locks under which a killed rebuild is cleared away: after the third time, an autovacuum
lets go."""

TIDY_SHARE = 0.1
"""The share of the time that may go into removing what is dead in fresh: an old transaction can make it be in vain."""

TIDY_AGAIN_S = 60.0
"""How soon that is tried again after it failed."""


class _Seen:
    """Recent observations of one index."""

    def __init__(self) -> None:
        self.scans: deque[float] = deque(maxlen=LOOKS)
        """Milliseconds of a search by fresh vector."""
        self.per_s = 0.0
        self.noted_at = -NOTE_S
        self.noted = False
        self.cleared = False
        """Whether leftovers of a rebuild that was killed have been looked for: they note every change for nobody."""
        self.not_before = -math.inf
        """No rebuild before this time: the last one failed."""
        self.wanted_at = math.inf
        """Since when a rebuild has been wanted that did not begin."""
        self.built = False
        """Whether the settled tier had its HNSW index: until it has, everything may be fresh, and nothing is moved."""
        self.cooldown = Cooldown()
        self.tidy_at = -math.inf
        """When fresh is tidied again."""

    def wants_rebuild(self, tiers: Tiers, *, pressing: bool) -> bool:
        """Say whether it takes less to build the settled tier anew than to move what is fresh, and it may be tried."""
        many = tiers.fresh > max(REBUILD_ROWS, REBUILD_SHARE * tiers.settled)
        wants = pressing and many and anyio.current_time() >= self.not_before
        self.wanted_at = min(self.wanted_at, anyio.current_time()) if wants else math.inf
        return wants

    def scan_ms(self, tiers: Tiers) -> float:
        """Return what fresh adds to a search.

        A look that shares the processor with others takes longer than the comparisons cost, so that the one counts
        which took least for each vector. To press for less would take even more of that processor.
        """
        if not tiers.fresh:
            return 0.0
        self.scans.append(tiers.scan_ms / tiers.fresh)
        return min(self.scans) * tiers.fresh


def _place(spec: IndexSpec) -> tuple[str, int]:
    """Return what a set of vectors is known by."""
    return spec.name, spec.generation


class Settle:
    """Settles the vectors of all indexes of a pipeline, one index after the other."""

    def __init__(
        self,
        dsn: str,
        schema: str,
        specs: Sequence[IndexSpec],
        settings: Callable[[], Worker],
        metrics: Metrics,
        lag: Lag,
    ) -> None:
        """Make the flow.

        :param settings: the worker's section of the configuration as it is now.
        :param lag: of the stream, which should have the target to itself while it is late.
        """
        self._schema = schema
        self._specs = [one for spec in specs for one in spec.generations]
        self._searched = {_place(spec) for spec in specs}
        """Metrics are of the generations that searches use."""
        self._settings = settings
        self._metrics = metrics
        self._lag = lag
        self._dsn = dsn
        self._sessions: list[Session] = []
        self._seen = {_place(spec): _Seen() for spec in self._specs}
        self._rebuilding: set[tuple[str, int]] = set()

    async def run(self) -> None:
        """Settle until cancelled, connecting again whenever the target was away."""
        backoff = Backoff(
            lambda failure: log.warning("settling_waits", error=str(failure.error)), waits="vectors do not settle"
        )
        try:
            async with anyio.create_task_group() as self._tasks:
                while True:
                    async with backoff:
                        if not any([await self._turn(spec) for spec in self._specs]):
                            await anyio.sleep(LOOK_S)
        finally:
            with anyio.CancelScope(shield=True):
                for session in self._sessions:
                    await session.aclose()

    async def _turn(self, spec: IndexSpec) -> bool:
        """Move some vectors of an index if there is reason to; returns whether it did."""
        seen = self._seen[_place(spec)]
        cooldown = seen.cooldown
        if not cooldown.over:
            return False
        try:
            with speaking_of("target", where=f"index {spec.name}", index=spec.name):
                moved = await self._settle(spec)
        except CdcsyncError as error:
            seen.wanted_at = math.inf
            if away(error, "target"):
                raise
            # Of this index alone: its tables are looked after by others.
            log.warning("settling_failed", index=spec.name, error=error.with_fix)
            cooldown.failed(error)
            return False
        cooldown.succeeded()
        return moved

    async def _settle(self, spec: IndexSpec) -> bool:
        settings, seen = self._settings(), self._seen[_place(spec)]
        settling = await self._on(0, spec)
        if not seen.cleared:
            await Rebuild(await self._sessions[0].connection(), self._schema, spec).clear(CLEAR_ATTEMPTS)
            seen.cleared = True
        if seen.built and anyio.current_time() >= seen.tidy_at:
            await self._tidy(spec, seen)
        tiers = await settling.look()
        seen.built = tiers.built
        scan_ms = seen.scan_ms(tiers)
        await self._note(settling, spec, tiers, scan_ms)
        pressing = scan_ms > spec.config.fresh_scan_budget_ms
        if not tiers.built or not tiers.fresh or not settings.settle_connections or (self._late() and not pressing):
            seen.per_s = 0.0
            seen.wanted_at = math.inf
            return False
        if _place(spec) in self._rebuilding:
            return False
        if seen.wants_rebuild(tiers, pressing=pressing):
            if not self._lag.far_behind or anyio.current_time() - seen.wanted_at >= REBUILD_WAITS_S:
                seen.wanted_at = math.inf
                self._rebuilding.add(_place(spec))
                self._tasks.start_soon(self._rebuild, spec)
            return False
        chunks = await settling.rested(ROUND, rest_s=0 if pressing else settings.settle_after_s)
        if not chunks:
            seen.per_s = 0.0
            return False
        await self._move(spec, chunks, settings, pressing=pressing)
        return True

    async def _tidy(self, spec: IndexSpec, seen: _Seen) -> None:
        """Remove what is dead in fresh. A failure costs searches some time, and keeps no vector from moving."""
        began = anyio.current_time()
        seen.tidy_at = began + TIDY_AGAIN_S
        try:
            with speaking_of("target", where=f"index {spec.name}"):
                await tidy(await self._sessions[0].connection(), self._schema, spec)
        except SetupError as error:
            log.warning("tidying_failed", index=spec.name, error=error.with_fix)
        else:
            seen.tidy_at = anyio.current_time() + (anyio.current_time() - began) / TIDY_SHARE

    async def _rebuild(self, spec: IndexSpec) -> None:
        """Build the settled tier anew with what is fresh in it; if that fails, vectors move one by one."""
        log.info("hnsw_rebuilding", index=spec.name)
        try:
            async with Session(self._dsn, "target", application_name="cdcsync rebuild", works=True) as session:
                with speaking_of("target", where=f"index {spec.name}"):
                    moved = await Rebuild(await session.connection(), self._schema, spec).run()
        except (CdcsyncError, Emptied) as error:
            seen = self._seen[_place(spec)]
            seen.not_before, seen.cleared = anyio.current_time() + REBUILD_AGAIN_S, False
            said = error.with_fix if isinstance(error, CdcsyncError) else str(error)
            log.warning("hnsw_rebuild_failed", index=spec.name, error=said)
        else:
            self._metrics.settled.labels(spec.name).inc(moved)
            log.info("hnsw_rebuilt", index=spec.name, vectors=moved)
        finally:
            self._rebuilding.discard(_place(spec))

    def _late(self) -> bool:
        """Say whether the stream is later than it is under steady load."""
        return self._lag.far_behind or self._lag.seconds > CLOSE_S

    async def _move(self, spec: IndexSpec, chunks: Sequence[int], settings: Worker, *, pressing: bool) -> None:
        """Move these vectors over as many connections as there may be, until done or the stream needs the target."""
        left = deque(chunks[at : at + MOVE] for at in range(0, len(chunks), MOVE))
        moved = 0
        began = anyio.current_time()

        async def work(number: int) -> None:
            nonlocal moved
            settling = await self._on(number, spec)
            while left and (pressing or not self._late()):
                started = anyio.current_time()
                count = await settling.settle(left.popleft())
                moved += count  # not in one statement: the other connections add to it during the wait
                if not pressing:
                    await anyio.sleep((anyio.current_time() - started) * (1 / settings.settle_share - 1))

        try:
            async with anyio.create_task_group() as tasks:
                for number in range(min(settings.settle_connections, len(left))):
                    tasks.start_soon(work, number)
        except BaseExceptionGroup as group:
            raise leading(group) from None
        self._metrics.settled.labels(spec.name).inc(moved)
        self._seen[_place(spec)].per_s = moved / max(anyio.current_time() - began, 1e-6)

    async def _note(self, settling: Settling, spec: IndexSpec, tiers: Tiers, scan_ms: float) -> None:
        """Show what was seen: in the metrics at once, and in the target from time to time."""
        seen = self._seen[_place(spec)]
        if _place(spec) in self._searched:
            self._metrics.fresh.labels(spec.name).set(tiers.fresh)
            self._metrics.fresh_scan.labels(spec.name).set(scan_ms / 1000)
        now = anyio.current_time()
        if (tiers.fresh or seen.noted) and now - seen.noted_at >= NOTE_S:
            seen.noted_at = now
            try:
                with speaking_of("target", index=spec.name):
                    await settling.note(scan_ms, seen.per_s)
            except CdcsyncError as error:
                if away(error, "target"):
                    raise
                log.debug("tiers_not_noted", index=spec.name, error=str(error))
            else:
                seen.noted = bool(tiers.fresh)

    async def _on(self, number: int, spec: IndexSpec) -> Settling:
        """Return what settles an index over one of our connections."""
        while len(self._sessions) <= number:
            self._sessions.append(
                Session(
                    self._dsn,
                    "target",
                    application_name="cdcsync settle",
                    lock_wait_ms=SHARED_LOCK_WAIT_MS,
                    works=True,
                )
            )
        return Settling(await self._sessions[number].connection(), self._schema, spec)
