"""One history: two databases, a writer, a worker, and what goes wrong in between; then the oracle."""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from cdcsync.process.crashpoints import VARIABLE
from tests.chaos.oracle import differences, standing
from tests.chaos.provider import Held, Loss, Place, Provider, Rewound
from tests.chaos.servers import FIRST_LOOK_S, RAREST_LOOK_S, Side, until
from tests.chaos.tables import FAR, INDEXES, TABLES, WHOLE, Writer
from tests.chaos.worker import Worker
from tests.support import forked

CONFIG = """
[source]
dsn = "{source}"
slot = "{slot}"
feedback_every_s = 0.5
heartbeat_every_s = {heartbeat}
on_gap = "{on_gap}"
failover = {failover}
[target]
dsn = "{target}"
[worker]
listen = "127.0.0.1:0"
batch_rows = {batch_rows}
backfill_page_rows = {page_rows}
evaluate_every_s = {evaluate}
verify_every_s = {verify}
stop_timeout_s = 10
settle_after_s = {settle}
[embedders.far]
type = "openai"
model = "chaos"
dimensions = 8
base_url = "{provider}"
distance = "l2"
timeout_s = 4
concurrency = 2
batch_texts = 32
[embedders.words]
type = "hash"
dimensions = 8
"""

STANDS_S = 30.0
"""Without progress for so long, a history notes what the servers' sessions do."""

SESSIONS = (
    "SELECT application_name, pid, backend_type, state, wait_event_type, wait_event, pg_blocking_pids(pid)::text,"
    " (now() - xact_start)::text, (now() - state_change)::text, left(query, 120)"
    " FROM pg_stat_activity WHERE datname = %s OR backend_type LIKE 'wal%%'"
)

LOSS_S = 20.0
"""How long after a call its vectors may still be on their way into the target."""

SETTLE_S = 120.0
"""How long the worker may take to find what it finds only by looking at the catalog every few seconds."""

CONVERGE_S = 180.0
"""How long the index may take without any progress, once everything works again, on a busy machine."""


TOLD = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
HELD = "SELECT checkpoint::text, checkpoint >= %s::pg_lsn FROM cdcsync.pipelines"


WATCH_EVERY_S = 0.03
"""How often the slot's position is compared with the checkpoint: two short statements."""

LOOK_EVERY_S = 1.0
"""How often it is noted what the target has vectors of."""

AWAY = (psycopg.OperationalError, psycopg.InterfaceError, OSError)
"""What a session says whose server is away, or just being promoted."""

NOT_YET = (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedColumn)
"""What the target says before the worker has made its tables."""


class Broken(AssertionError):
    """A property did not hold."""


class History:
    """The state of one history, with what its faults need."""

    def __init__(self, seed: int, source: Side, target: Side, directory: Path, *, one_server: bool = False) -> None:
        self.seed = seed
        self.chance = random.Random(f"history {seed}")
        self.source, self.target = source, target if not one_server else source
        self.one_server = one_server
        self.directory = directory
        self.name = f"chaos_{seed}"
        self.provider = Provider()
        self.indexes = list(INDEXES)
        self.settings: dict[str, Any] = {
            "batch_rows": self.chance.choice((7, 40, 5000)),
            "page_rows": self.chance.choice((9, 50, 2000)),
            "on_gap": "stop",
            "failover": "true",
            "heartbeat": 0,
            "evaluate": self.chance.choice((0, 2)),
            "verify": self.chance.choice((0, 2)),
            "settle": self.chance.choice((0, 1, 30)),
        }
        self.wish = FAR
        """What the configuration asks for of the vectors of `titles`."""
        self.cut = WHOLE
        """What the configuration asks for of the chunks of `articles`."""
        self.workers: list[Worker] = []
        self.fired: Counter[str] = Counter()
        self.hit: set[str] = set()
        self.losses: list[Loss] = []
        """When the results of calls may have been lost."""
        self.gap_expected = False
        """Whether this history made a gap, which the worker heals by reading everything again."""
        self.rewind_expected = False
        """Whether the target lost what the worker had committed."""
        self.pause_expected = False
        """Whether this history changed tables so that indexes may pause; in any other one, none may."""
        self.marked = 0
        """The number of the last note that a fault wrote to see whether it gets into the index."""
        self.settles_late = False
        """Whether something was done that the worker finds out by looking, some seconds later."""
        self.damaged = False
        """Whether this history changed the index by hand; in any other one, an audit may find nothing."""
        self.notes: list[str] = []
        self._began = time.monotonic()
        self._watched: str | None = None
        self.embedded = self.covered = 0
        """How many texts were embedded, and of how many a second call would be found."""
        self.compared = 0
        """How often the slot's position was compared with the checkpoint."""
        self.writer = Writer(seed, lambda: self.source.connect(self.name))

    # -- life ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Set up databases and tables, and take everything down afterwards."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self.provider.start()
        with contextlib.ExitStack() as stack:
            stack.callback(self.provider.stop)
            stack.enter_context(self.source.database(self.name))
            if not self.one_server:
                stack.enter_context(self.target.database(self.name))
            stack.callback(self._heal_servers)
            stack.callback(self._end_workers)
            with self.source.connect(self.name) as session:
                session.execute(TABLES)
            self.write_config()
            watching = threading.Event()
            watcher = threading.Thread(target=self._watch, args=[watching], daemon=True)
            watcher.start()
            try:
                yield
            finally:
                watching.set()
                watcher.join()
                with contextlib.suppress(psycopg.Error):
                    self.writer.stop()

    def note(self, what: str) -> None:
        """Remember what was done, for the report of a failure."""
        self.notes.append(f"{time.monotonic() - self._began:6.2f} {what}")

    def fire(self, fault: str, *, loses: bool = True) -> None:
        """Count a fault that has taken effect.

        :param loses: whether it may lose the vectors of a call under way.
        """
        self.fired[fault] += 1
        self.note(f"fired: {fault}")
        if loses:
            self.lose()

    def lose(self, *losses: Loss) -> None:
        """Take the results of calls for lost that the target does not have now.

        :param losses: since when; since now if none is named.
        """
        self.losses.extend(losses or [Loss()])
        self.look_what_is_held()

    def look_what_is_held(self) -> None:
        """Note the texts of which the target has a vector now, if it tells."""
        with contextlib.suppress(*AWAY, *NOT_YET):
            texts = {text for text, _ in self._held()}
            self.provider.held.append(Held(time.monotonic(), texts))

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """Take the results of calls for lost for the time of a block."""
        self.losses.append(loss := Loss())
        try:
            yield
        finally:
            loss.prolong()

    def rewound(self) -> None:
        """Note what the target has vectors of, as a server has gone back and nothing has been read again."""
        writing = (
            "SELECT FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%%' AND xact_start IS NOT NULL"
            " AND datname = current_database()"
        )
        until(lambda: not self.execute(self.target, writing), "the worker to finish what it writes")
        held: defaultdict[str, set[Place]] = defaultdict(set)
        for text, place in self._held():
            held[text].add(place)
        self.provider.rewound.append(Rewound(time.monotonic(), held))
        self.note(f"a server went back; the target has vectors of {len(held)} texts")

    def _held(self) -> Iterator[tuple[str, Place]]:
        """Yield the text and the place of each chunk that has a vector of the provider's."""
        for stem, generation in self.execute(
            self.target,
            "SELECT coalesce(i.stem, i.name), g.generation FROM cdcsync.generations AS g"
            " JOIN cdcsync.indexes AS i ON i.name = g.index_name WHERE g.embedder = 'far'",
        ):
            statement = (
                "SELECT c.content, c.chunk_id, c.applied_at::text"
                f' FROM cdcsync."{stem}_chunks" AS c JOIN cdcsync."{stem}_vectors_{generation}" AS v'
                " USING (chunk_id, content_hash)"
            )
            # The worker makes a generation's tables after it was asked for, and removes them after it was dropped.
            with contextlib.suppress(psycopg.errors.UndefinedTable):
                for text, chunk, applied_at in self.execute(self.target, statement):
                    yield text, (stem, chunk, applied_at)

    def writer_finishes(self) -> None:
        """End the prepared transactions, whose locks would be in the way for ever."""
        self.writer.finish()

    def write_config(self) -> None:
        """Write the configuration as it is to be from now on."""
        text = CONFIG.format(
            source=self.source.dsn(self.name),
            target=self.target.dsn(self.name),
            slot=self.name,
            provider=self.provider.url,
            **self.settings,
        )
        sections = {
            **INDEXES,
            "titles": INDEXES["titles"].replace(FAR, self.wish),
            "articles": INDEXES["articles"].replace(WHOLE, self.cut),
        }
        (self.directory / "cdcsync.toml").write_text(text + "".join(sections[name] for name in self.indexes))

    def start(self, crash_at: str | None = None) -> Worker:
        """Start a worker."""
        self.note(f"worker {len(self.workers) + 1} starts" + (f", to die at {crash_at}" if crash_at else ""))
        log = self.directory / f"worker{len(self.workers) + 1}.log"
        worker = Worker(self.directory / "cdcsync.toml", log, crash_at=crash_at)
        self.workers.append(worker)
        return worker

    @property
    def worker(self) -> Worker:
        """The newest worker."""
        return self.workers[-1]

    def kill(self) -> bool:
        """Kill the newest worker; returns whether it was alive."""
        alive = self.worker.kill()
        if not alive:
            self.settle_crash()
        self.lose()
        return alive

    def stop(self) -> bool:
        """Have the newest worker stop in order; what calls under way bring is lost all the same.

        :returns: whether it did: it may have died at its crash point before, or on the way.
        """
        worker = self.worker
        stopped = False
        if worker.alive:
            status = worker.stop()
            stopped = not worker.crashed
            if stopped and status and not worker.died_young:
                raise Broken(f"the worker ended with {status} when it was asked to stop:\n{worker.tail()}")
        if not stopped:
            self.settle_crash(worker)
        worker.killed = True
        self.lose()
        return stopped

    def streaming(self) -> None:
        """Wait until the newest worker streams, or has ended."""
        worker = self.worker
        until(lambda: worker.streams or not worker.alive, "the worker to stream", CONVERGE_S)

    def ensure_worker(self) -> Worker:
        """Start a worker if none runs; one that ended by itself without a reason is a failure."""
        if self.workers and self.worker.alive:
            return self.worker
        if self.workers:
            self.settle_crash()
        return self.start()

    def settle_crash(self, worker: Worker | None = None) -> None:
        """See that a worker that ended, the newest if none is named, was killed, by us or at its crash point."""
        worker = worker or self.worker
        if worker.alive or worker.killed:
            return
        if worker.crashed:
            worker.killed = True
            assert worker.crash_at is not None
            self.hit.add(worker.crash_at.partition("#")[0])
            self.fire("crash at a named point")
            self.note(f"died at {worker.crash_at}")
            return
        if worker.process.returncode == 0 and worker.said("stopping"):
            return  # a scene sent SIGTERM to reach a point on the way to the end
        raise Broken(f"a worker ended by itself with {worker.process.returncode}:\n{worker.tail()}")

    def repair(self, index: str) -> None:
        """Have a command repair what was damaged by hand; what changes just then, it may leave undecided."""
        self.damaged = True
        self.provider.calls.clear()  # what was damaged is made again
        for _ in range(4):
            self.ensure_worker()
            if self.command("verify", index, "--repair") == 0 and self.command("verify", index) == 0:
                self.provider.calls.clear()
                return
            self._pass_now()  # a worker that is far behind leaves much undecided, for as long as it is
        raise Broken(f"verify --repair does not make {index} equal")

    def command(self, *arguments: str, crash_at: str | None = None, patience_s: float = 300.0) -> int:
        """Run a command of cdcsync to its end and return its exit status."""
        self.note(f"cdcsync {' '.join(arguments)}" + (f", to die at {crash_at}" if crash_at else ""))
        armed = {VARIABLE: crash_at} if crash_at else {}
        given = (*arguments, "-c", str(self.directory / "cdcsync.toml"))
        done = forked.run(*given, more=armed, timeout_s=patience_s)
        with (self.directory / "commands.log").open("a") as log:
            log.write(done.stdout + done.stderr)
        if crash_at and done.returncode == -signal.SIGKILL:
            self.hit.add(crash_at.partition("#")[0])
            self.fire("crash at a named point")
        return done.returncode

    def execute(self, side: Side, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Run a statement in this history's database."""
        for attempt in itertools.count():
            try:
                with side.connect(self.name) as session:
                    cursor = session.execute(statement, arguments or None)
                    return cursor.fetchall() if cursor.description is not None else []
            except psycopg.errors.DeadlockDetected:
                if attempt == 3:
                    raise
        raise AssertionError

    # -- the end ------------------------------------------------------------------------------------------------

    def converge(self) -> None:
        """Heal everything, wait until the worker says that it is through, and compare.

        :raises Broken: a property did not hold.
        """
        self.writer.stop()
        self._heal()
        self.writer.finish()
        self.ensure_worker()
        (lsn,) = self.execute(self.source, "SELECT pg_current_wal_insert_lsn()::text")[0]
        self.note(f"everything works again; the source is at {lsn}")
        with self.source.connect(self.name) as source, self.target.connect(self.name) as target:
            try:
                self._wait_for_progress(target, lsn)
            except TimeoutError as error:
                raise Broken(f"{error}\n{self.worker.tail()}") from None
            found = self._compare(source, target)
            if found and self.settles_late:
                with contextlib.suppress(TimeoutError):
                    until(lambda: not self._compare(source, target), "the worker to look", SETTLE_S)
                found = self._compare(source, target)
            if not found:
                found = self._stands(source, target)
            if found:
                raise Broken("; ".join(found) + f"\n{self.worker.tail()}")
            row = source.execute(TOLD, [self.name]).fetchone()
            (checkpoint,) = target.execute("SELECT checkpoint FROM cdcsync.pipelines").fetchone() or (None,)
            (kept,) = target.execute("SELECT %s::pg_lsn <= %s::pg_lsn", [row and row[0], checkpoint]).fetchone() or (0,)
            if not kept:
                raise Broken(f"the slot was told {row}, beyond the checkpoint {checkpoint}")
        if self._watched:
            raise Broken(self._watched)
        if not self.compared and not self.gap_expected:
            raise Broken("the slot's position was never compared with the checkpoint")
        self.refuse_what_had_no_cause()
        self.provider.returning += self.writer.returned
        self.embedded, self.covered = self.provider.covered()
        self.note(f"of {self.embedded} embedded texts, {self.covered} were seen in the target while it all went on")
        kept = {place for _, place in self._held()} if self.provider.rewound else set()
        repeated = self.provider.repeated(self.losses, kept, within_s=LOSS_S)
        # When everything is read again, another row may have taken the old key, and the vector's place, before the page
        # is read on which the moved row is.
        moved = self.writer.moved if self.gap_expected or self.pause_expected else []
        excused = [*moved, *self.writer.undone, *self.writer.displaced]
        repeated = [one for one in repeated if not any("".join(one.text.split()) in row for row in excused)]
        if repeated:
            for one in repeated:
                times = ", ".join(f"{at - self._began:.2f}" for at in (one.first, one.again))
                self.note(f"embedded twice, at {times}: {one.text!r}")
            raise Broken(f"{len(repeated)} texts were embedded twice for no reason, such as {repeated[0].text[:60]!r}")
        tracebacks = [worker.log.name for worker in self.workers if "Traceback" in worker.log.read_text()]
        if tracebacks:
            raise Broken(f"a traceback in {tracebacks}")
        self._stop_in_order()

    def refuse_what_had_no_cause(self) -> None:
        """See that no worker reported a loss or a difference that there was not, or paused an index that was well.

        :raises Broken: one did.
        """
        for name, expected in (
            ("gap", self.gap_expected),
            ("target_rewound", self.rewind_expected),
            ("index_paused", self.pause_expected),
            ("audit_found", self.damaged or self.settles_late or self.gap_expected or self.pause_expected),
        ):
            if not expected and (found := [one for one in self._events() if one.get("event") == name]):
                raise Broken(f"a worker reported {name} where nothing had caused it: {found[0]}")

    def _stop_in_order(self) -> None:
        """See that the last worker ends as it is asked to, or at its crash point, and that no other ended by itself."""
        self.stop()
        for worker in self.workers:
            self.settle_crash(worker)

    def _compare(self, source: psycopg.Connection[Any], target: psycopg.Connection[Any]) -> list[str]:
        """Ask the oracle, again if a statement of the worker's was in its way."""
        for _ in range(5):
            with contextlib.suppress(psycopg.errors.DeadlockDetected, psycopg.errors.UndefinedTable):
                return differences(source, target, self.indexes)
            time.sleep(0.5)
        return differences(source, target, self.indexes)

    def _stands(self, source: psycopg.Connection[Any], target: psycopg.Connection[Any]) -> list[str]:
        """Return what the oracle finds wrong with indexes and slots, and keeps finding: a build may be under way."""
        found: list[str] = []

        def well() -> bool:
            found[:] = []
            with contextlib.suppress(psycopg.errors.DeadlockDetected, psycopg.errors.UndefinedTable):
                found[:] = standing(source, target, self.indexes, self.name)
                return not found
            return False

        with contextlib.suppress(TimeoutError):
            until(well, "valid indexes", SETTLE_S)
            return []
        return found or ["tables come and go all the time"]

    def _pass_now(self) -> None:
        """Wait until the worker is through with what is committed now, as long as it gets on."""
        (lsn,) = self.execute(self.source, "SELECT pg_current_wal_insert_lsn()::text")[0]
        with contextlib.suppress(TimeoutError), self.target.connect(self.name) as target:
            self._wait_for_progress(target, lsn)

    def _wait_for_progress(self, target: psycopg.Connection[Any], lsn: str) -> None:
        reached: object = None
        deadline, pause_s, told = time.monotonic() + CONVERGE_S, FIRST_LOOK_S, False
        while True:
            if not self.worker.alive:
                self.settle_crash()
                self.start()
            now = self._state(target, lsn)
            if now is True:
                return
            if now != reached:
                reached, deadline, told = now, time.monotonic() + CONVERGE_S, False
            elif not told and time.monotonic() > deadline - CONVERGE_S + STANDS_S:
                told = True
                for side in (self.source, self.target):
                    for session in self.execute(side, SESSIONS, self.name):
                        self.note(f"nothing moves; session {session}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the index does not get on: {now}")
            time.sleep(pause_s)
            pause_s = min(RAREST_LOOK_S, 1.3 * pause_s)

    def _state(self, target: psycopg.Connection[Any], lsn: str) -> object:
        """Return True once the worker claims to be through, else how far it is."""
        try:
            rows = target.execute(
                "SELECT i.name, i.state, i.reason, p.checkpoint::text, p.checkpoint >= %s::pg_lsn,"
                " (SELECT count(*) FROM cdcsync.backfills AS b WHERE b.index_name = i.name"
                " AND b.state IN ('requested', 'running')), coalesce(i.stem, i.name)"
                " FROM cdcsync.indexes AS i CROSS JOIN cdcsync.pipelines AS p ORDER BY 1",
                [lsn],
            ).fetchall()
            waiting = [
                (target.execute(f'SELECT count(*) FROM cdcsync."{row[-1]}_backlog"').fetchone() or (0,))[0]
                for row in rows
            ]
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.InvalidSchemaName,
            psycopg.errors.DeadlockDetected,
        ) as error:
            return str(error)
        through = [row[1] == "live" and row[4] and row[5] == 0 for row in rows]
        if {row[0] for row in rows} >= set(self.indexes) and all(through) and not any(waiting):
            return True
        return rows, waiting

    def _watch(self, ended: threading.Event) -> None:
        """See all the time that nothing is acknowledged before it is in the target, until the history loses something.

        The slot is read first: the checkpoint, read directly after it, may have moved on by then, but never back.
        """
        with contextlib.ExitStack() as stack:
            sessions: dict[int, psycopg.Connection[tuple[Any, ...]]] = {}

            def session(side: Side) -> psycopg.Connection[tuple[Any, ...]]:
                port = side.primary.port
                if port not in sessions or sessions[port].closed:
                    sessions[port] = stack.enter_context(contextlib.closing(side.connect(self.name)))
                return sessions[port]

            look_at = time.monotonic()
            while not ended.wait(WATCH_EVERY_S) and self._watched is None:
                if time.monotonic() >= look_at:
                    self.look_what_is_held()
                    look_at = time.monotonic() + LOOK_EVERY_S
                if self.gap_expected:
                    continue
                try:
                    source, target = session(self.source), session(self.target)
                    told = source.execute(TOLD, [self.name]).fetchone()
                    holds = target.execute(HELD, told).fetchone() if told and told[0] else None
                except (*AWAY, *NOT_YET):
                    continue
                except Exception as error:  # a comparison that cannot be made must not pass for one that was made
                    self._watched = f"the slot cannot be compared with the checkpoint: {error}"
                    return
                # Without a checkpoint, the pipeline has not begun: the slot's position is where it was created.
                if told is None or holds is None or holds[0] is None:
                    continue
                self.compared += 1
                # A fault may have lost something between the two answers.
                if holds[1] is False and not self.gap_expected:
                    self._watched = f"the slot was told {told[0]} while the checkpoint was {holds[0]}"

    def _events(self) -> list[dict[str, Any]]:
        return [event for worker in self.workers for event in worker.events()]

    def _heal(self) -> None:
        self.provider.misdeeds.clear()
        self.provider.always = None
        self.provider.rejects = lambda text: False
        self.provider.released.set()
        self._heal_servers()
        if self.workers and self.worker.alive:
            self.worker.thaw()
            self.worker.limit_files(None)

    def _heal_servers(self) -> None:
        for side in (self.source, self.target):
            side.proxy.heal()
            if not side.primary.running:
                side.primary.start()
            side.drop_standby()

    def _end_workers(self) -> None:
        for worker in self.workers:
            if worker.alive:
                worker.thaw()
                worker.kill()
