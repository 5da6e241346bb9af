"""The two servers of a history, each behind a proxy, each with a standby while one is needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psycopg
from psycopg import sql

from cdcsync.demo.cluster import Cluster
from tests.chaos.proxy import Proxy

SETTINGS: Mapping[str, str] = {
    "logical_decoding_work_mem": "64kB",
    "max_prepared_transactions": "20",
    "max_connections": "150",
    "wal_sender_timeout": "6s",
    "autovacuum_naptime": "5s",
}

PATIENCE_S = 180.0

FIRST_LOOK_S, RAREST_LOOK_S = 0.01, 0.25
"""A condition is looked at less and less often: most looks cost a session and a process of the server."""


def until(probe: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Return once `probe` is true.

    :raises TimeoutError: it does not become true in time.
    """
    deadline = time.monotonic() + patience_s
    pause_s = FIRST_LOOK_S
    while not probe():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s:.0f} s in vain for {what}")
        time.sleep(pause_s)
        pause_s = min(RAREST_LOOK_S, 1.3 * pause_s)


class Side:
    """The source or the target: the primary of the moment and the address under which the worker knows it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.primary = Cluster(settings=SETTINGS)
        self.primary.create()
        self.primary.start()
        self.standby: Cluster | None = None
        self.proxy = Proxy(self.primary.port)
        self._generation = 0

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        """Open a session on the primary, past the proxy; the caller closes it."""
        # The server refuses a statement that it prepared before a column had another type: that is the application's.
        return psycopg.connect(self.primary.dsn(database), autocommit=True, connect_timeout=10, prepare_threshold=None)

    def dsn(self, database: str) -> str:
        """Return the address that the worker uses."""
        return f"postgresql://postgres@127.0.0.1:{self.proxy.port}/{database}"

    @contextlib.contextmanager
    def database(self, name: str) -> Iterator[str]:
        """Create a database with pgvector and drop it afterwards with everything that uses it."""
        with self.connect() as admin:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        with self.connect(name) as inside:
            inside.execute("CREATE EXTENSION vector")
        try:
            yield name
        finally:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Drop a database, its slots and its prepared transactions."""
        with self.connect(name) as inside:
            for (gid,) in inside.execute(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
            ).fetchall():
                inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        with self.connect() as admin:
            admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
            admin.execute(
                "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
                " WHERE database = %s AND active_pid IS NOT NULL",
                [name],
            )
            admin.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
            )
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def configure(self, **settings: str) -> None:
        """Change settings of the running primary; an empty value is set as such."""
        with self.connect() as admin:
            for name, value in settings.items():
                admin.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
            admin.execute("SELECT pg_reload_conf()")

    def crash(self) -> None:
        """End the primary as a crash does, and start it again."""
        self.primary.kill()
        self.primary.start()

    def restart(self) -> None:
        """Restart the primary in order."""
        self.primary.restart()

    def add_standby(self) -> Cluster:
        """Make a standby that streams from the primary."""
        self._generation += 1
        standby = self.standby = self.primary.standby(slot=f"near_{self._generation}")
        standby.create()
        standby.start()
        return standby

    @property
    def near(self) -> str:
        """The slot of the standby."""
        return f"near_{self._generation}"

    def promote(self, unseen: Callable[[], object] = lambda: None) -> None:
        """End the primary as a crash does and make the standby the primary, at the same address.

        :param unseen: called once it is the primary, before anyone else finds it there.
        """
        assert self.standby is not None
        old, self.primary, self.standby = self.primary, self.standby, None
        old.kill()
        self.proxy.cut()
        self.primary.promote()
        unseen()
        self.proxy.upstream = self.primary.port
        self.configure(synchronized_standby_slots="", synchronous_standby_names="", primary_conninfo="")
        old.remove()

    def standby_has(self, slot: str) -> bool:
        """Say whether the standby would keep a slot when it is promoted."""
        assert self.standby is not None
        with psycopg.connect(self.standby.dsn(), autocommit=True) as session:
            row = session.execute(
                "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND synced AND NOT temporary", [slot]
            ).fetchone()
        return row is not None

    def drop_standby(self) -> None:
        """Remove a standby that is not needed any more, also one that is only half made."""
        if self.standby is not None:
            self.configure(synchronized_standby_slots="", synchronous_standby_names="")
            self.standby.remove()
            self.standby = None
            with self.connect() as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots"
                    " WHERE slot_name = %s AND active_pid IS NOT NULL",
                    [self.near],
                )
                admin.execute(
                    "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                    [self.near],
                )

    def close(self) -> None:
        """Remove everything."""
        self.proxy.close()
        if self.standby is not None:
            self.standby.remove()
        self.primary.remove()
