"""What goes wrong: each fault is a function that does it once, beside a writer, and says when it has taken effect.

A fault that finds no victim (a worker that is not there, a connection that is not open) does not count as fired.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from tests.chaos.history import Broken, History
from tests.chaos.provider import Loss
from tests.chaos.servers import Side, until
from tests.chaos.tables import FAR, MARKED, OF_ARTICLES, SMALLER, WISHES
from tests.chaos.worker import Worker
from tests.support import provider as misdeeds
from tests.support.disks import CannotMount, tight_disk

Fault = Callable[[History], None]

FAULTS: dict[str, Fault] = {}
"""All faults by name."""


def fault(name: str) -> Callable[[Fault], Fault]:
    """Register a fault under its name."""

    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return register


def rest(history: History, least_s: float = 0.05, most_s: float = 0.6) -> None:
    """Let writer and worker go on for a while."""
    time.sleep(history.chance.uniform(least_s, most_s))


# -- the worker ---------------------------------------------------------------------------------------------------


@fault("kill -9")
def kill(history: History) -> None:
    """Kill the worker at any moment, mostly once it streams."""
    worker = history.ensure_worker()
    if history.chance.random() < 0.8:
        worker.until_said("streaming")
    rest(history, 0, 0.8)
    if history.kill():
        history.fire("kill -9")


@fault("stop and start")
def stop(history: History) -> None:
    """Ask the worker to stop."""
    history.ensure_worker()
    rest(history)
    if history.stop():
        history.fire("stop and start")


@fault("frozen worker overtaken")
def overtake(history: History) -> None:
    """Freeze the worker, let another one take over, and wake it behind its successor: nothing tells it but the fence.

    Its sessions on the target stay as they are, but for the lock, which is taken from them. It has changes to write:
    what the source sent while it was frozen, before the source ended that connection.
    """
    frozen = history.ensure_worker()
    history.streaming()
    rest(history)
    if not _freeze_between_transactions(history, frozen):
        return
    links = list(history.target.proxy.links)
    history.writer.allow()
    rest(history, 0.5, 1)
    unlocked = [link for link in links if link.ask("SELECT pg_advisory_unlock_all()")]
    history.lose()
    history.execute(
        history.source,
        "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
        " WHERE slot_name = %s AND active_pid IS NOT NULL",
        history.name,
    )
    successor = history.start()
    history.streaming()
    rest(history, 0.1, 0.8)
    awake = {link: link.sent for link in unlocked if link.ended_at is None}
    history.provider.rivals.append(rivals := Loss())
    frozen.thaw()
    if not successor.alive:
        frozen.kill()
        history.settle_crash()
        return
    try:
        # One that had just begun anew, because the target went back, stands by without having been overtaken.
        until(lambda: frozen.stands_by or not frozen.alive, "the worker to stand by", 120)
    except TimeoutError:
        raise Broken(f"a worker that was overtaken goes on:\n{frozen.tail()}") from None
    finally:
        rivals.prolong()
    if not frozen.alive:
        history.settle_crash(frozen)
        return
    frozen.kill()  # it stands by
    if any(link.sent > sent for link, sent in awake.items()):
        history.fire("frozen worker overtaken")


def _freeze_between_transactions(history: History, worker: Worker) -> bool:
    """Freeze a worker while none of its sessions on the target is in a transaction; returns whether it is frozen."""
    busy = (
        "SELECT FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%%' AND datname = current_database()"
        " AND backend_type = 'client backend' AND state <> 'idle'"
    )
    for _ in range(50):
        if not worker.alive:
            return False
        worker.freeze()
        with contextlib.suppress(TimeoutError):
            until(lambda: not history.execute(history.target, busy), "statements to end", 0.3)
            time.sleep(0.05)  # what was on its way to the server has come to it by now
            if not history.execute(history.target, busy):
                return True
        worker.thaw()
        rest(history, 0, 0.1)
    return False


@fault("standby takes over")
def take_over(history: History) -> None:
    """Kill the worker while another one waits for its place."""
    first = history.ensure_worker()
    history.streaming()
    if not first.alive:
        return
    second = history.start()
    second.until_said("standby", "streaming")
    rest(history)
    # A crash of the target before may have cost the first one its place already.
    taken = first.kill() and not first.said("overtaken")
    history.settle_crash(first)
    history.lose()
    history.streaming()
    if taken and second.alive:
        history.fire("standby takes over")


# -- the wire -----------------------------------------------------------------------------------------------------


def _wire(name: str, side_of: Callable[[History], Side]) -> None:
    @fault(f"{name} connections cut")
    def cut(history: History) -> None:
        """Reset every connection, several times."""
        history.ensure_worker()
        history.streaming()
        for _ in range(history.chance.randint(1, 3)):
            rest(history, 0, 0.4)
            if side_of(history).proxy.cut():
                history.fire(f"{name} connections cut")

    @fault(f"{name} unreachable")
    def refuse(history: History) -> None:
        """Cut and refuse connections for a while."""
        history.ensure_worker()
        history.streaming()
        rest(history)
        if side_of(history).proxy.refuse():
            history.fire(f"{name} unreachable")
        rest(history, 0.3, 1.5)
        side_of(history).proxy.heal()

    @fault(f"{name} half-open")
    def half_open(history: History) -> None:
        """Forward nothing on open connections, without a word to either end; new connections work."""
        history.ensure_worker()
        history.streaming()
        rest(history)
        proxy = side_of(history).proxy
        if not (frozen := proxy.freeze()):
            return
        history.lose(Loss(frozen))
        try:
            until(lambda: proxy.withheld > 0, "bytes to be withheld", 10)
        except TimeoutError:
            return
        history.fire(f"{name} half-open")

    @fault(f"{name} sessions ended")
    def terminate(history: History) -> None:
        """Have the server end every session of the worker."""
        history.ensure_worker()
        history.streaming()
        rest(history)
        ended = history.execute(
            side_of(history),
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'cdcsync%%'",
        )
        if ended[0][0]:
            history.fire(f"{name} sessions ended")


_wire("source", lambda history: history.source)
_wire("target", lambda history: history.target)


# -- the servers --------------------------------------------------------------------------------------------------


def _server(name: str, side_of: Callable[[History], Side]) -> None:
    @fault(f"{name} crashes")
    def crash(history: History) -> None:
        """Crash the server and start it again."""
        history.ensure_worker()
        history.streaming()
        rest(history)
        connected = bool(side_of(history).proxy.links)
        side_of(history).crash()
        if connected:
            history.fire(f"{name} crashes")

    @fault(f"{name} restarts")
    def restart(history: History) -> None:
        """Restart the server in order."""
        history.ensure_worker()
        history.streaming()
        rest(history)
        connected = bool(side_of(history).proxy.links)
        side_of(history).restart()
        if connected:
            history.fire(f"{name} restarts")


_server("source", lambda history: history.source)
_server("target", lambda history: history.target)


@fault("source fails over")
def source_fails_over(history: History) -> None:
    """Promote a standby of the source that has the slot and everything that the worker has."""
    if not _with_a_standby_that_has_the_slot(history, waits=True):
        return
    rest(history, 0.3, 1)
    if history.one_server:
        history.rewind_expected = True  # only the slot waits for this standby, not what the worker commits
    history.source.promote()
    if history.one_server:
        history.target = history.source
    history.fire("source fails over")
    history.streaming()


@fault("source fails over with loss")
def source_fails_over_with_loss(history: History) -> None:
    """Promote a standby that lacks what the worker has applied: a gap, which reading everything again heals."""
    if history.one_server:
        return
    if not _with_a_standby_that_has_the_slot(history, waits=False):
        return
    history.settings["on_gap"] = "resync"
    history.write_config()
    history.stop()
    history.start().until_said("streaming")
    received = _cut_off(history.source)
    history.writer.allow()  # by now it has written all it might, and there would be nothing to lose
    beyond = "SELECT FROM cdcsync.pipelines WHERE checkpoint > %s::pg_lsn"
    try:
        until(lambda: history.execute(history.target, beyond, received), "changes to be applied that will be lost", 60)
    except TimeoutError:
        history.source.drop_standby()
        return
    rest(history, 0, 0.5)
    history.gap_expected = True
    history.source.promote(history.rewound)
    # Until the worker has seen the new primary, its position is one of what is lost, beyond where the source is now.
    history.settles_late = True
    history.fire("source fails over with loss")
    _until_noticed(history, "gap")


def _with_a_standby_that_has_the_slot(history: History, *, waits: bool) -> bool:
    """Make a standby; returns whether it has the slot in the end, which on a busy machine may take too long."""
    history.ensure_worker()
    history.streaming()
    side = history.source
    standby = side.add_standby()
    if waits:
        side.configure(synchronized_standby_slots=side.near)
    with psycopg.connect(standby.dsn(), autocommit=True) as session, side.connect() as primary:

        def synced() -> object:
            history.writer.finish()
            primary.execute("SELECT pg_log_standby_snapshot()")
            try:
                session.execute("SELECT pg_sync_replication_slots()")
            except psycopg.errors.ObjectNotInPrerequisiteState:
                return None
            return session.execute(
                "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND synced AND NOT temporary", [history.name]
            ).fetchone()

        try:
            until(synced, "the standby to have the slot")
        except TimeoutError as error:
            history.note(str(error))
    if not history.source.standby_has(history.name):
        history.source.drop_standby()
        return False
    return True


def _until_noticed(history: History, *events: str) -> None:
    """Wait until the newest worker, which has no crash point, says that something is lost.

    :raises Broken: it does not.
    """
    try:
        history.worker.until_said(*events)
    except TimeoutError:
        raise Broken(f"a server lost what was applied, and the worker reports no {' or '.join(events)}") from None
    history.settle_crash()


def _cut_off(side: Side) -> str:
    """Let the standby get nothing more; returns how far it is."""
    assert side.standby is not None
    with psycopg.connect(side.standby.dsn(), autocommit=True) as session:
        session.execute("ALTER SYSTEM SET primary_conninfo = ''")
        session.execute("SELECT pg_reload_conf()")
        until(
            lambda: session.execute("SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)").fetchone() == (True,),
            "the standby to be cut off",
        )
        row = session.execute("SELECT pg_last_wal_receive_lsn()::text").fetchone()
    assert row is not None
    return str(row[0])


@fault("target fails over")
def target_fails_over(history: History) -> None:
    """Promote a standby of the target that has every commit, as synchronous replication promises."""
    if history.one_server:
        return
    history.ensure_worker()
    history.streaming()
    side = history.target
    standby = side.add_standby()
    side.configure(synchronous_standby_names="*")
    with psycopg.connect(side.primary.dsn(), autocommit=True) as session:
        until(
            lambda: (
                session.execute("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'").fetchone() == (1,)
            ),
            "the standby to be synchronous",
        )
    assert standby is side.standby
    rest(history, 0.3, 1)
    side.promote()
    history.fire("target fails over")
    history.streaming()


@fault("target fails over with loss")
def target_fails_over_with_loss(history: History) -> None:
    """Promote a standby of the target that lacks what was confirmed: the worker must not build on what is gone."""
    if history.one_server:
        return
    history.ensure_worker()
    history.streaming()
    side = history.target
    side.add_standby()
    history.settings["on_gap"] = "resync"
    history.write_config()
    history.stop()
    history.start().until_said("streaming")
    with history.losing():
        _cut_off(side)
        before = _commits(history)
        history.writer.allow()
        try:
            until(lambda: _commits(history) >= before + 3, "commits to be lost", 60)
        except TimeoutError:
            side.drop_standby()
            return
        rest(history, 0.2, 0.8)
        history.gap_expected = history.rewind_expected = True
        side.promote(history.rewound)
    history.fire("target fails over with loss")
    _until_noticed(history, "target_rewound", "gap")


def _commits(history: History) -> int:
    """Return how often the worker has committed."""
    return int(history.execute(history.target, "SELECT commits FROM cdcsync.pipelines")[0][0])


# -- disk and provider --------------------------------------------------------------------------------------------


@fault("disk full under the spool")
def disk_full(history: History) -> None:
    """Have writes to the spool fail while a large transaction is streamed."""
    worker = history.ensure_worker()
    history.streaming()
    if not worker.alive:
        return
    before = worker.log.stat().st_size
    worker.limit_files(max(40_000, before + 20_000))  # it must still be able to say what is wrong
    history.writer.allow(200)
    try:
        failed = says(worker, "cannot be kept on disk", before, 30)
    finally:
        if worker.alive:
            worker.limit_files(None)
    if failed:
        history.fire("disk full under the spool")


def says(worker: Worker, words: str, since: int, patience_s: float) -> bool:
    """Wait until a worker has logged these words after so many bytes of its log, or has ended; returns whether it has.

    A worker that ended may have died of something else: what it said decides.
    """

    def said() -> bool:
        return words.encode() in worker.log.read_bytes()[since:]

    with contextlib.suppress(TimeoutError):
        until(lambda: said() or not worker.alive, f"the words {words!r}", patience_s)
    return said()


@fault("disk full under the target")
def target_disk_full(history: History) -> None:
    """Have the tables of an index lie on a disk that is full while changes come in."""
    worker = history.ensure_worker()
    history.streaming()
    tables = ["cdcsync.titles_chunks", "cdcsync.titles_backlog"]
    try:
        with tight_disk(history.target.primary, history.name, tables) as disk:
            disk.fill()
            before = worker.log.stat().st_size
            history.writer.allow(300)
            if says(worker, "No space left", before, 30):
                history.fire("disk full under the target")
                rest(history)
    except CannotMount as error:
        history.note(f"no file system can be mounted: {error}")


def _provider(name: str, misdeed: misdeeds.Misdeed) -> None:
    @fault(f"provider: {name}")
    def misbehave(history: History) -> None:
        """Have the next requests go wrong, after those that an earlier fault has left to go wrong."""
        history.ensure_worker()
        history.streaming()
        victims: list[int] = []

        def done(exchange: Any, texts: list[str]) -> None:
            victims.append(len(texts))
            misdeed(exchange, texts)

        history.provider.misdeeds.extend([done] * history.chance.randint(1, 3))
        history.writer.allow()
        with contextlib.suppress(TimeoutError):
            until(lambda: any(victims), "texts to be sent to the provider", 30)
        if any(victims):
            history.fire(f"provider: {name}")
            rest(history)


_provider("error 500", misdeeds.status(500, b"oh"))
_provider("429", misdeeds.status(429, b"slow down", retry_after="1"))
_provider("hangs up", misdeeds.cut)
_provider("hangs up in the middle", misdeeds.cut_in_the_middle)
_provider("a page of HTML", misdeeds.html)
_provider("too few vectors", misdeeds.wrong_count)
_provider("vectors too long", misdeeds.wrong_dimension)
_provider("not a number", misdeeds.not_a_number)
_provider("bytes that are no text", misdeeds.status(500, b"\xff\xfe\x00\x80", retry_after="1e30"))


@fault("provider: away")
def provider_away(history: History) -> None:
    """Take the provider away until a change's text is in the index, and on until its vector is missing."""
    worker = history.ensure_worker()
    history.streaming()
    if not _until_live(history, "notes"):
        return
    rest(history)
    history.provider.stop()
    try:
        note = write_note(history)
        if not _in_step(history, worker, note):
            return
        waits = history.execute(
            history.target,
            "SELECT FROM cdcsync.notes_chunks JOIN cdcsync.notes_backlog USING (chunk_id) WHERE lang = %s AND no = %s",
            MARKED,
            note,
        )
        rest(history, 0.3, 1.5)
    finally:
        history.provider.start()
    if waits:
        history.fire("provider: away")


def write_note(history: History) -> int:
    """Write a row of `notes` that nobody else changes, and return its number."""
    history.marked += 1
    row = (MARKED, history.marked, f"marked {history.marked}")
    history.execute(history.source, "INSERT INTO notes VALUES (%s, %s, %s)", *row)
    return history.marked


def _in_step(history: History, worker: Worker, note: int) -> bool:
    """Wait until the text of a note is in its index, or the worker has ended; returns whether it is.

    :raises Broken: the worker lives and does not write it.
    """
    there = "SELECT FROM cdcsync.notes_chunks WHERE lang = %s AND no = %s"

    def gone() -> bool:
        return not history.execute(history.source, "SELECT FROM notes WHERE lang = %s AND no = %s", MARKED, note)

    def looked() -> bool:
        history.writer_finishes()  # a lock that waits for a transaction of the writer's is none of the worker's
        return bool(history.execute(history.target, there, MARKED, note)) or gone() or not worker.alive

    try:
        until(looked, f"note {note}")
    except TimeoutError:
        raise Broken(f"the text of note {note} does not get into the index:\n{worker.tail()}") from None
    return bool(history.execute(history.target, there, MARKED, note))


# -- the tables ---------------------------------------------------------------------------------------------------


def _ddl(history: History, *statements: str) -> bool:
    """Run statements in one transaction, waiting for the writer's locks at most a moment; returns whether it worked."""
    for _ in range(20):
        try:
            with history.source.connect(history.name) as session, session.transaction():
                session.execute("SET LOCAL lock_timeout = '500ms'")
                for statement in statements:
                    session.execute(statement)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            history.writer_finishes()
            continue
        return True
    return False


@fault("column added")
def column_added(history: History) -> None:
    """Add a column that no index needs."""
    history.ensure_worker()
    if _ddl(history, f"ALTER TABLE articles ADD COLUMN extra_{history.chance.randint(0, 10**9)} int DEFAULT 7"):
        history.fire("column added", loses=False)
    rest(history)


@fault("type of a carried column changed")
def type_changed(history: History) -> None:
    """Change the type of a column that indexes carry, which makes them read the table again."""
    worker = history.ensure_worker()
    history.streaming()
    if not all(_until_live(history, one) for one in (*OF_ARTICLES, "notes")):
        return
    wanted = history.execute(
        history.source,
        "SELECT CASE atttypid WHEN 'int'::regtype THEN 'bigint' ELSE 'int' END FROM pg_attribute"
        " WHERE attrelid = 'articles'::regclass AND attname = 'tenant'",
    )[0][0]
    statements = [f"ALTER TABLE articles ALTER tenant TYPE {wanted}"]
    if away := history.chance.random() < 0.5:
        statements.append("ALTER TABLE articles RENAME tenant TO tenancy")
    history.pause_expected = True
    before = len(worker.events())
    if not _ddl(history, *statements):
        return
    try:
        if not _paused(history, worker, before, away=away):
            return
        # One index's fault is that index's: while these wait, another one gets in step.
        if away and _in_step(history, worker, write_note(history)) and not _paused(history, worker, before, away=True):
            return
    finally:
        if away and not _ddl(history, "ALTER TABLE articles RENAME tenancy TO tenant"):
            raise Broken("the column cannot be renamed back")
    history.fire("type of a carried column changed")
    rest(history)


def _paused(history: History, worker: Worker, since: int, *, away: bool) -> bool:
    """Wait until the indexes of `articles` are paused, or the worker has ended; returns whether they are.

    :param away: whether they must still be, as their column is; otherwise it is enough that the worker said so after
        so many of its events, or that it reads them again: it does not tell of a pause that its next look ends.
    :raises Broken: the worker lives and does not pause them.
    """

    def paused() -> bool:
        if away:
            stated = "SELECT FROM cdcsync.indexes WHERE name = ANY (%s) AND state = 'paused'"
            return len(history.execute(history.target, stated, list(OF_ARTICLES))) == len(OF_ARTICLES)
        told = [one for one in worker.events()[since:] if one["event"] in ("index_paused", "backfill_requested")]
        return {one["index"] for one in told} >= set(OF_ARTICLES)

    history.writer.allow()
    try:
        until(lambda: paused() or not worker.alive, "paused indexes")
    except TimeoutError:
        raise Broken(f"indexes whose column was changed are not paused:\n{worker.tail()}") from None
    return paused()


@fault("partition detached and attached")
def partition(history: History) -> None:
    """Take a partition out, change it, and put it back."""
    history.ensure_worker()
    history.streaming()
    if not _ddl(history, "ALTER TABLE events DETACH PARTITION events_2"):
        return
    # Somebody may look before it is back, and take its documents out of the index.
    history.provider.returning += [f"on day {day}:" for day in range(10, 20)]
    rest(history)
    history.execute(history.source, "UPDATE events_2 SET payload = payload || ' apart' WHERE id % 2 = 0")
    history.execute(history.source, "DELETE FROM events_2 WHERE id % 5 = 0")
    if history.chance.random() < 0.5:
        rest(history, 5, 6)
    if _ddl(history, "ALTER TABLE events ATTACH PARTITION events_2 FOR VALUES FROM (10) TO (20)"):
        history.fire("partition detached and attached")
        history.settles_late = True


@fault("table of many appears")
def member_appears(history: History) -> None:
    """Create another table of an index over many, and change it before anyone has seen it, or after."""
    history.ensure_worker()
    history.streaming()
    shop = f"shop_4_{history.chance.randint(0, 10**9)}" if _shop(history, "shop_4") else "shop_4"
    history.execute(history.source, "SELECT make_shop(%s)", shop)
    if history.chance.random() < 0.5:
        rest(history, 4, 6)
    history.execute(history.source, f"UPDATE {shop}.items SET body = body || ' once more' WHERE id % 3 = 0")
    history.fire("table of many appears")
    history.settles_late = True


@fault("table of many goes")
def member_goes(history: History) -> None:
    """Drop, or rename, one of an index's many tables, and perhaps make another under its name."""
    history.ensure_worker()
    history.streaming()
    shop = f"shop_{history.chance.randint(2, 3)}"
    if not _shop(history, shop):
        return
    gone = history.chance.choice(
        (f"DROP SCHEMA {shop} CASCADE", f"ALTER SCHEMA {shop} RENAME TO shop_9_{history.chance.randint(0, 10**9)}")
    )
    if not _ddl(history, gone):
        return
    history.provider.returning.append("item ")  # under another name, they are other documents of the same texts
    rest(history, 0, 1)
    if history.chance.random() < 0.5:
        history.execute(history.source, "SELECT make_shop(%s)", shop)
    history.fire("table of many goes")
    history.settles_late = True


def _shop(history: History, name: str) -> bool:
    return bool(history.execute(history.source, "SELECT FROM pg_namespace WHERE nspname = %s", name))


@fault("publication edited")
def publication(history: History) -> None:
    """Take a table out of the publication, change it, and put it back before anyone looks."""
    history.ensure_worker()
    history.streaming()
    history.pause_expected = True
    edited = history.chance.choice(
        (
            ("ALTER PUBLICATION cdcsync DROP TABLE notes", "ALTER PUBLICATION cdcsync ADD TABLE notes"),
            (
                "ALTER PUBLICATION cdcsync SET (publish = 'insert')",
                "ALTER PUBLICATION cdcsync SET (publish = 'insert, update, delete, truncate')",
            ),
        )
    )
    history.execute(history.source, edited[0])
    changed = history.execute(
        history.source, "UPDATE notes SET body = body || ' unseen' WHERE no % 3 = 1 RETURNING no"
    ) + history.execute(history.source, "DELETE FROM notes WHERE no % 7 = 2 RETURNING no")
    rest(history, 0.3, 1)
    with contextlib.suppress(psycopg.errors.DuplicateObject):  # the worker may have put the table back by itself
        history.execute(history.source, edited[1])
    history.settles_late = True
    if changed:
        history.fire("publication edited")


@fault("verify --repair in between")
def verify(history: History) -> None:
    """Damage the index by hand and repair it while everything goes on."""
    history.ensure_worker()
    history.streaming()
    damaged = history.execute(
        history.target,
        "WITH gone AS (DELETE FROM cdcsync.titles_chunks WHERE id % 7 = 3 RETURNING chunk_id)"
        " SELECT count(*) FROM gone",
    )
    history.repair("titles")
    if damaged[0][0]:
        history.fire("verify --repair in between")


def _until_live(history: History, index: str) -> bool:
    """Wait until an index is live; returns whether it is."""
    live = f"SELECT FROM cdcsync.indexes WHERE name = '{index}' AND state = 'live'"
    with contextlib.suppress(TimeoutError):
        until(lambda: history.execute(history.target, live) or not history.worker.alive, "a live index")
    return bool(history.execute(history.target, live))


def _migrate(history: History, index: str, name: str, steps: Sequence[str]) -> None:
    """Start a migration of an index, and take some of these steps at random."""
    if history.command("migrate", index, "start", "--yes") == 0:
        history.fire(name)
    for _ in range(history.chance.randint(3, 7)):
        step = history.chance.choice(steps)
        if step == "wait":
            rest(history, 1, 4)
        elif step == "kill":
            history.kill()
            history.start()
        elif (status := history.command("migrate", index, step, "--yes")) not in (0, 2):
            raise Broken(f"migrate {index} {step} ended with {status}")
        elif step == "drop":
            history.provider.calls.clear()  # what was dropped may be made again


@fault("migration")
def migration(history: History) -> None:
    """Exchange the vectors of an index, in steps and with kills at random."""
    history.ensure_worker()
    history.streaming()
    _wishes(history, history.chance.choice(list(WISHES.values())))
    steps = ("wait", "wait", "kill", "start", "activate", "activate", "rollback", "drop")
    _until_live(history, "titles")
    _migrate(history, "titles", "migration", steps)
    if history.wish == WISHES["another model"]:
        end_migration(history)


@fault("migration to other chunks")
def other_chunks(history: History) -> None:
    """Cut an index's documents anew beside the chunks that are searched, in steps and with kills at random."""
    history.ensure_worker()
    history.streaming()
    steps = ("wait", "wait", "kill", "activate", "activate", "rollback", "drop", "start")
    _until_live(history, "articles")
    ask_for_smaller_chunks(history)
    _migrate(history, "articles", "migration to other chunks", steps)


def ask_for_smaller_chunks(history: History) -> None:
    """Have the configuration ask for other chunks, which a worker that runs does not know of."""
    history.cut = SMALLER
    history.write_config()


def _wishes(history: History, wish: str) -> None:
    """Have the configuration ask for other vectors, and a worker that knows it."""
    history.wish = wish
    history.write_config()
    history.ensure_worker()
    history.stop()
    history.ensure_worker()
    history.streaming()


def _back(history: History) -> None:
    """Migrate to the vectors of the provider again: those that there were have been dropped."""
    _wishes(history, FAR)
    if history.command("migrate", "titles", "start", "--yes") != 0:
        raise Broken("no migration back begins")
    history.provider.calls.clear()
    filled = "SELECT FROM cdcsync.generations AS g JOIN cdcsync.indexes AS i ON i.name = g.index_name"
    filled += " WHERE i.name = 'titles' AND g.state = 'ready' AND g.generation <> i.generation"
    until(lambda: history.execute(history.target, filled), "the generation to go back to", 300)
    until(lambda: history.command("migrate", "titles", "activate", "--yes") == 0, "the migration back", 300)


def end_migration(history: History) -> None:
    """Go back to the vectors of the provider, and forget about others."""
    history.ensure_worker()
    history.streaming()
    live = "SELECT embedder FROM cdcsync.generations JOIN cdcsync.indexes USING (generation) WHERE name = 'titles'"
    by_words = history.execute(history.target, f"{live} AND index_name = name") == [("words",)]
    if by_words and history.command("migrate", "titles", "rollback", "--yes") != 0:
        _back(history)
    if history.command("migrate", "titles", "drop", "--yes") not in (0, 2):
        raise Broken("migrate titles drop failed")
    _wishes(history, FAR)
