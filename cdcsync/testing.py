"""For the tests of applications: a worker that follows a database inside a test, and leaves nothing behind.

    from cdcsync.testing import cdcsync_worker  # in conftest.py: pytest finds fixtures by their names


    def test_a_new_ticket_is_found(cdcsync_worker, database):
        with cdcsync_worker(load_config("cdcsync.toml")) as worker:
            database.execute("INSERT INTO tickets (subject) VALUES ('forgot my login')")
            worker.catch_up()
            assert worker.index("tickets").search("login")[0].key == {"id": 1}

The server is yours, and real: one with `wal_level = logical` and pgvector. The models are not, unless you ask for them:
each embedder is replaced by feature hashing, which needs no weights and knows words but no meaning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from time import monotonic, sleep

import anyio
import msgspec
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from cdcsync.backoff import Backoff
from cdcsync.config import Config, HashEmbedder
from cdcsync.errors import CdcsyncError, SetupError, Unavailable
from cdcsync.flows.teardown.pipeline import tear_down, what_exists
from cdcsync.sync import Index
from cdcsync.worker.run import run
from cdcsync.worker.state import WorkerState

DIMENSIONS = 256
"""Of the stand-ins for models: enough that two words of a test rarely share a place."""

START_S = 60.0
"""How long the first load of a test's tables may take."""

LOOK_S = 0.02
"""How often the worker is asked whether it has caught up."""

Work = Callable[..., AbstractContextManager["Worker"]]


class Worker:
    """A running worker.

    :ivar config: what it runs with.
    """

    def __init__(self, config: Config, stack: ExitStack, portal: BlockingPortal) -> None:
        self.config = config
        self._stack = stack
        self._portal = portal
        self._indexes: dict[str, Index] = {}
        self._state: WorkerState | None = None
        self._started = threading.Event()
        self._ended: Future[None] | None = None

    def index(self, name: str) -> Index:
        """Return an index, open until the worker ends."""
        if name not in self._indexes:
            self._indexes[name] = self._stack.enter_context(Index.open(self.config, name))
        return self._indexes[name]

    def catch_up(self, *, timeout_s: float = START_S) -> None:
        """Wait until every index holds, with its vectors, what is committed now.

        :raises AssertionError: it took longer.
        :raises CdcsyncError: the worker has ended.
        """
        for name in self.config.indexes:
            assert self.index(name).wait_for(timeout_s=timeout_s), f"index {name} did not catch up in {timeout_s:g} s"
        self._until_embedded(timeout_s)

    def _until_embedded(self, timeout_s: float) -> None:
        assert self._ended is not None
        assert self._state is not None
        deadline = monotonic() + timeout_s
        while True:
            if self._ended.done():
                self._ended.result()  # raises what ended it
                raise CdcsyncError("the worker has ended")
            status = self._portal.call(self._state.status)
            found = [status.indexes.get(name) for name in self.config.indexes]
            if all(one is not None and one.state == "live" and one.backlog == 0 for one in found):
                return
            assert monotonic() < deadline, f"after {timeout_s:g} s: {status.problems or found}"
            sleep(LOOK_S)

    def _start(self) -> None:
        def started(state: WorkerState) -> None:
            self._state = state
            self._started.set()

        async def work() -> None:
            try:
                await run(self.config, started=started, handle_signals=False, listening=False)
            finally:
                self._started.set()

        self._ended = self._portal.start_task_soon(work)
        self._started.wait()
        if self._state is None:
            self._ended.result()
        self._until_embedded(START_S)

    def _stop(self) -> None:
        assert self._ended is not None
        if self._state is not None and not self._ended.done():
            self._portal.call(self._state.stop)
        self._ended.result(START_S)


@contextmanager
def following(config: Config, *, models: bool = False) -> Iterator[Worker]:
    """Follow the tables of a configuration; at the end, drop slot, publication and index.

    :param models: take the configured models instead of feature hashing.
    :raises SetupError: the pipeline, its slot or an index of it exists, and is left as it is; or the servers or tables
        are not as the worker needs them.
    """
    if not models:
        stand_in = HashEmbedder(dimensions=DIMENSIONS)
        config = msgspec.structs.replace(config, embedders=dict.fromkeys(config.embedders, stand_in))
    with start_blocking_portal(name="cdcsync.testing") as portal:
        portal.call(_refuse_existing, config)  # what is there is not ours to drop
        try:
            with ExitStack() as stack:
                worker = Worker(config, stack, portal)
                try:
                    worker._start()
                    yield worker
                finally:
                    worker._stop()
        finally:
            portal.call(lambda: tear_down(config, purge=True))


async def _refuse_existing(config: Config) -> None:
    """See that the block begins the pipeline, before anything is done; waits for the servers as a start does.

    :raises SetupError: there is something that its end would drop.
    """
    backoff = Backoff(first=LOOK_S, most=1)
    deadline = anyio.current_time() + config.worker.start_timeout_s
    existing: list[str] | None = None
    while existing is None:
        try:
            existing = await what_exists(config)
        except Unavailable:
            if anyio.current_time() > deadline:
                raise
            await backoff.wait()
    if existing:
        raise SetupError(
            f"a test would drop what it did not make: {', '.join(existing)}",
            where="cdcsync_worker",
            hint="give tests a source.slot, a source.publication and a target.schema of their own; if a test run that"
            " was killed has left these, drop them with its configuration: cdcsync teardown --purge",
        )


@pytest.fixture
def cdcsync_worker() -> Work:
    """Return `following`: a worker for the time of a `with` block."""
    return following
