"""The loop that empties one index's backlog of texts that wait for a vector of one generation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import anyio
import anyio.abc
import psycopg
import structlog

from cdcsync.backoff import Backoff, Failure, backoff_s
from cdcsync.embedders.protocol import UNUSABLE_HINT
from cdcsync.errors import EmbedderUnavailable, EmbedError, TextRejected, leading
from cdcsync.flows.embed.calls import Made
from cdcsync.flows.embed.commits import Commits
from cdcsync.flows.embed.dispatcher import Dispatcher
from cdcsync.flows.embed.pace import WINDOW_TEXTS
from cdcsync.flows.embed.pool import BacklogPool
from cdcsync.metrics import Metrics
from cdcsync.model.changeset import LIVE
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.errors import LOCKED_OUT, first_line, speaking_of, without_values
from cdcsync.target.backlog import Backlog, Waiting

log = structlog.get_logger()

T = TypeVar("T")

HOLD_S = 10.0
"""How long the loop waits for a stream that is far behind: a restart's worth of changes is applied by then, and a text
that changed several times is embedded once. A stream that stays behind gets vectors all the same."""

HOLD_POLL_S = 0.05

STORE_TEXTS = 128
"""Vectors stored in one transaction: apply waits for one that holds a chunk which changed again, some 0.2 s."""

LIVE_S = 1.0
"""So long after a live change others are expected."""

OURS = "cdcsync "
"""How the names of our sessions begin."""

LOOK_S, LOOK_MOST_S = 2.0, 15.0
"""How soon it is looked who holds rows that could not be written, and how long at most until the next look."""

POLL_S = 5.0
"""How often the backlog is looked at without a word from apply: postponed texts become due by themselves."""


class EmbedLoop:
    """Empties one index's backlog for ever.

    :param searched: whether searches use what it makes; a migration's vectors say nothing about freshness.
    :param alike: other generations, those of other chunks included, whose vectors can serve as those of this one.
    """

    def __init__(
        self,
        pool: BacklogPool,
        spec: IndexSpec,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        searched: bool = True,
        alike: Sequence[IndexSpec] = (),
    ) -> None:
        self._pool = pool
        self._spec = spec
        self._alike = alike
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._searched = searched
        self._wake = anyio.Event()
        self._live = False
        self._live_at = -math.inf
        self._broken = False
        self._apart: dict[bytes, Waiting] = {}
        """Suspects that windows found; no other window has them."""
        self._suspected = anyio.Event()
        """Set when there are more of them."""
        self._under_way: dict[bytes, int] = {}
        """Texts whose batch has begun and not ended, with their lanes. A batch may hang: the next window does without
        them."""
        # One batch more than can be embedded at a time is under way, which is stored meanwhile.
        self._slots = anyio.Semaphore(dispatcher.places + 1)
        self._target_outage = Backoff(self._target_away, waits="vectors are not stored")
        self._held = False
        self._locked_out = False
        """Whether another session was last seen to hold the tables."""
        self._rows_held = False
        """Whether other sessions seem to hold rows, so that what is made for these could not be stored."""
        self._looks = 0
        """How often somebody was found to hold them."""
        self._look_at = 0.0
        """When that is looked at next."""
        self._one_tries = anyio.Lock()
        self._lock_wait = Backoff()
        self.commits = Commits()
        """When the texts that apply put into the backlog were committed."""
        self.drained: Callable[[], None] = lambda: None
        """Called each time nothing is left that is due."""

    def notify(self, *, live: bool) -> None:
        """Say that the backlog has grown; `live` that some of it should not wait behind a window."""
        self._live = self._live or live
        if live:
            self._live_at = anyio.current_time()
        self._wake.set()

    @property
    def beside_live(self) -> bool:
        """Whether live changes have come just now."""
        return anyio.current_time() - self._live_at < LIVE_S

    def avoided(self, reason: str, texts: int) -> None:
        """Count texts of this index that need no call."""
        self._dispatcher.avoided(reason, texts)

    async def run(self) -> None:
        """Embed until cancelled, connecting again whenever the target was away."""
        await self._dispatcher.ready.wait()
        while True:
            async with self._target_outage:
                with speaking_of("target", where=f"index {self._spec.name}", index=self._spec.name):
                    await self._drain_for_ever()

    def _target_away(self, failure: Failure) -> None:
        log.warning("target_unavailable", index=self._spec.name, loop="embed", error=str(failure.error))
        self._metrics.reconnects.labels("target").inc()

    async def _drain_for_ever(self) -> None:
        self._apart, self._under_way = {}, {}
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._windows_for_ever, tasks)
                tasks.start_soon(self._suspects_for_ever)
        except BaseExceptionGroup as group:
            raise leading(group) from None

    async def _windows_for_ever(self, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            self._wake = anyio.Event()
            self._live = False
            await self._hold_while_far_behind()
            if self._dispatcher.health.problem is not None:
                self._note_rows()
            await self._dispatcher.health.works()
            if self._dispatcher.waits_until(load=False) is not None:
                self._note_rows()
                await anyio.sleep(POLL_S)  # and look again: the day may end, or the limit be raised
                continue
            self._broken = False
            # Loads stop first when the tokens of a day run out.
            lane = None if self._dispatcher.waits_until(load=True) is None else LIVE
            started = anyio.current_time()
            found = await self._window(tasks, lane=lane)
            if self._rows_held and anyio.current_time() >= self._look_at:
                await self._look_at_rows()
            if found:
                continue
            if self._rows_held and await self._of_backlog(partial(Backlog.due, lane=lane)):
                # To look for a free row again takes as long as there are rows that are not.
                await anyio.sleep(max(HOLD_POLL_S, anyio.current_time() - started))
            elif not (self._apart or self._under_way):
                self._note_unlocked()
                self._note_rows()
                self.drained()
            with anyio.move_on_after(LOOK_S if self._rows_held else POLL_S):
                await self._wake.wait()

    async def _hold_while_far_behind(self) -> None:
        """Wait for the stream to catch up, once each time that it falls behind."""
        if self._dispatcher.far_behind and not self._held:
            for _ in range(round(HOLD_S / HOLD_POLL_S)):
                await anyio.sleep(HOLD_POLL_S)
                if not self._dispatcher.far_behind:
                    break
        self._held = self._dispatcher.far_behind

    async def _window(self, tasks: anyio.abc.TaskGroup, *, lane: int | None) -> int:
        """Begin to embed one window of due texts, but for suspects, and return how many there were."""
        found = await self._due(lane)
        window = self._without_suspects(found)
        # Texts of about the same length together: a batch is padded to its longest.
        tokens = await self._dispatcher.measure(_texts(window))
        window.sort(key=lambda waiting: (waiting.lane, tokens[waiting.hash]))
        while window and self._goes_on(load=window[0].lane > LIVE):
            if self._live and lane is None and window[0].lane > LIVE:
                self._live = False
                while await self._window(tasks, lane=LIVE) and self._goes_on(load=False):
                    pass
                if not self._goes_on(load=True):
                    break
            # A live change shares the calls with no load.
            altogether = len(window) + sum(lane <= window[0].lane for lane in self._under_way.values())
            size = self._dispatcher.batch(_texts(window[:WINDOW_TEXTS]), of=altogether)
            batch, window = window[:size], window[size:]
            await self._slots.acquire()
            self._under_way |= {one.hash: one.lane for one in batch}
            tasks.start_soon(self._one_batch, batch)
        return len(found)

    async def _due(self, lane: int | None) -> list[Waiting]:
        """Read a window of due texts, without those that are under way or set apart."""
        most, free, room = self._dispatcher.pace.window_texts, self._rows_held, self._has_room
        without = [*self._under_way, *self._apart, *(() if room else self._dispatcher.suspects)]
        window = await self._of_backlog(lambda it: it.window(most, lane=lane, free=free, without=without, failed=room))
        self._target_outage.succeeded()
        return window

    def _without_suspects(self, window: Sequence[Waiting]) -> list[Waiting]:
        """Set the suspects of a window apart, those that failed before a restart included; return the others."""
        suspects = {one.hash: one for one in window if one.attempts or one.hash in self._dispatcher.suspects}
        self._set_apart(suspects)
        return [one for one in window if one.hash not in suspects]

    @property
    def _has_room(self) -> bool:
        """Whether more suspects are kept: a window's worth, as their texts are in memory."""
        return len(self._apart) < self._dispatcher.pace.window_texts

    def _set_apart(self, suspects: Mapping[bytes, Waiting]) -> None:
        self._apart |= suspects
        if suspects:
            self._suspected.set()

    async def _suspects_for_ever(self) -> None:
        """Embed suspects call by call, beside the windows."""
        by_rank = False
        while True:
            self._suspected = anyio.Event()
            while waiting := [one for one in self._apart.values() if self._goes_on(load=one.lane > LIVE)]:
                # Those that have not failed alone are probably innocent. Every other call is for what has waited
                # longest: however many suspects come, each has its turn.
                by_rank = not by_rank
                if by_rank:
                    waiting.sort(key=lambda one: (one.attempts > 0, one.lane))
                call = self._dispatcher.suspects.together(_texts(waiting))
                left = await self._embed([self._apart[one] for one in call], apart=True)
                for one in call:
                    del self._apart[one]
                self._apart |= left  # at the end
                if self._rows_held:
                    break
            # A window finds again what has to wait for the embedder, and of rows that somebody holds the free ones.
            self._apart = {}
            self._wake.set()
            await self._suspected.wait()

    def _goes_on(self, *, load: bool) -> bool:
        """Say whether the embedder takes more texts of a load, or of live changes, in the windows that are open."""
        return not self._broken and self._dispatcher.waits_until(load=load) is None

    async def _one_batch(self, batch: Sequence[Waiting]) -> None:
        try:
            suspects = await self._embed(batch)
            if self._has_room:  # else a window finds them again once there is
                self._set_apart(suspects)
        finally:
            for one in batch:
                self._under_way.pop(one.hash, None)
            self._slots.release()
            if self._broken or not self._under_way:
                self._wake.set()

    async def _embed(self, batch: Sequence[Waiting], *, apart: bool = False) -> dict[bytes, Waiting]:
        """Embed and store texts, each as soon as the call that it was in has ended; returns the suspects among them."""
        try:
            # Texts that changed again while they waited in the window are not worth a call, nor are those that another
            # generation has by now.
            left, held = await self._of_backlog(partial(_left, [one.hash for one in batch]))
            self._dispatcher.avoided("superseded", len(batch) - len(left) - len(held))
            if held:
                self._suspect_rows()
            waiting = {one.hash: one for one in batch if one.hash in left}
            if self._broken:
                return {}
            async with aclosing(self._dispatcher.parts(_texts(waiting.values()), apart=apart)) as parts:
                async for made in parts:
                    await self._keep(waiting, made)
                    for one in (*made.vectors, *made.failed):
                        del waiting[one]
        except EmbedderUnavailable:
            # The embedder fails as a whole: no text's attempt. Whatever waits is read again once it works.
            self._broken = True
            return {}
        return waiting

    async def _keep(self, waiting: Mapping[bytes, Waiting], made: Made) -> None:
        """Store vectors; notes texts that cannot be embedded."""
        unusable = self._spec.unusable(made.vectors)
        for one, error in made.failed.items():
            await self._postpone(one, error, waiting[one].attempts)
        for one, fault in unusable.items():
            await self._postpone(one, TextRejected(f"the text's vector {fault}", hint=UNUSABLE_HINT))
        vectors = {one: vector for one, vector in made.vectors.items() if one not in unusable}
        await self._store(vectors)
        now = datetime.now(UTC)
        for text in map(waiting.__getitem__, vectors) if self._searched else ():
            if text.lane == LIVE:
                committed = self.commits.of(text.commit_lsn) or text.applied_at
                self._metrics.note_vector_freshness(self._spec.name, max(0.0, (now - committed).total_seconds()))

    async def _postpone(self, one: bytes, error: EmbedError, attempts: int = 0) -> None:
        """Note that a text cannot be embedded: for ever if it was refused, else for a while."""
        log.warning("text_not_embedded", index=self._spec.name, attempts=attempts + 1, error=str(error))
        final = isinstance(error, TextRejected)
        delay_s = backoff_s(attempts)
        if not await self._of_backlog(lambda it: it.postpone([one], str(error), delay_s=delay_s, final=final)):
            self._suspect_rows()

    async def _store(self, made: Mapping[bytes, FloatVector]) -> None:
        """Store vectors, a part at a time, over as many connections as there are."""
        items = list(made.items())
        async with anyio.create_task_group() as tasks:
            for at in range(0, len(items), STORE_TEXTS):
                tasks.start_soon(self._store_part, dict(items[at : at + STORE_TEXTS]))

    async def _store_part(self, part: Mapping[bytes, FloatVector]) -> None:
        try:
            stored = await self._of_backlog(lambda backlog: backlog.store(part))
        except psycopg.DataError as error:
            # PostgreSQL has the last word on what it stores: the texts are at fault whose vectors it does not take.
            if len(part) > 1:
                for one, vector in part.items():
                    await self._store_part({one: vector})
                return
            await self._postpone(next(iter(part)), TextRejected(f"the target: {without_values(error)}"))
            return
        self._note_unlocked()
        # Or they have changed again: then to look which rows are free is in vain, and does no harm.
        if stored < len(part):
            self._suspect_rows()
        self._dispatcher.avoided("shared", stored - len(part))
        self._metrics.vectors.labels(self._spec.name, "backlog" if self._searched else "migration").inc(stored)

    async def _of_backlog(self, work: Callable[[Backlog], Awaitable[T]]) -> T:
        """Work on the backlog; while another session holds its tables, wait and try again.

        The tasks that wait keep the vectors that they have made, but no connection: other indexes need it. One task at
        a time tries for all of them.
        """
        while True:
            tries = self._locked_out
            async with self._one_tries if tries else contextlib.nullcontext():
                try:
                    async with self._pool.backlog(self._spec, self._alike) as backlog:
                        if tries or not self._locked_out:  # found out while we waited for the connection
                            return await work(backlog)
                except LOCKED_OUT as error:
                    self._locked_out = True
                    if tries:
                        await self._tell_who_locks(error)
                        await self._lock_wait.wait()

    def _suspect_rows(self) -> None:
        """Note that a row could not be written: from here on only those are read that nobody holds."""
        if not self._rows_held:
            self._rows_held, self._look_at = True, anyio.current_time() + LOOK_S

    async def _look_at_rows(self) -> None:
        """See whether anybody holds rows of the backlog, and tell of it."""
        held = await self._of_backlog(Backlog.row_lockers)
        # Our own transactions end by themselves, and are nothing to tell of.
        locks = [str(one) for one in held if not one.session.startswith(OURS)]
        self._note_rows(locks, held=bool(held))
        if held:
            self._looks += 1
            self._look_at = anyio.current_time() + backoff_s(self._looks, first=LOOK_S, most=LOOK_MOST_S)
        if locks:
            log.warning(
                "backlog_locked", index=self._spec.name, error="its rows are held", attempt=self._looks, locks=locks
            )

    def _note_rows(self, locks: Sequence[str] = (), *, held: bool = False) -> None:
        """Note who holds rows of the backlog, for the worker to tell; unless any are held, all count as free again."""
        if not held:
            self._rows_held, self._looks = False, 0
        if not self._searched:
            return
        if locks:
            self._pool.problems[self._spec.name] = f"other sessions hold rows of its backlog: {locks[0]}"
        else:
            self._pool.problems.pop(self._spec.name, None)

    def _note_unlocked(self) -> None:
        """Note that vectors could be stored, or that none are left. A read does not prove that a write is possible."""
        self._locked_out = False
        self._lock_wait.succeeded()

    async def _tell_who_locks(self, error: psycopg.Error) -> None:
        async with self._pool.backlog(self._spec, self._alike) as backlog:
            locks = [str(one) for one in await backlog.lockers()]
        attempt = self._lock_wait.failures + 1
        log.warning("backlog_locked", index=self._spec.name, error=first_line(error), attempt=attempt, locks=locks)


async def _left(hashes: list[bytes], backlog: Backlog) -> tuple[set[bytes], set[bytes]]:
    """Take over the vectors that other generations have by now; returns the texts that still need one.

    Besides, it returns those whose vector could not be stored, as somebody holds their rows: a later window finds them.
    """
    taken = await backlog.take_over(hashes)
    waiting = await backlog.still_waiting(hashes)
    return waiting - taken, waiting & taken


def _texts(waiting: Iterable[Waiting]) -> dict[bytes, str]:
    return {one.hash: one.text for one in waiting}
