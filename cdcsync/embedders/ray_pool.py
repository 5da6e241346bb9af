"""The driver: the process that is connected to Ray, holds the pool of actors, and hands out calls.

    frames on standard input ─► queue ─► lanes, `tasks_in_flight` for each actor ─► answers on standard output

The rules:

1. A call is in the queue, or with one lane, or answered. A lane whose actor died puts it back.
2. There are as many actors as the calls keep busy, within `actors_min` and `actors_max`. One that Ray has no room for
   counts: it waits, tells the cluster's autoscaler what is missing, and starts when a node joins.
3. An actor that died, or could not open its embedder, is replaced, after a pause that grows with each in a row.
4. A call that `MOST_DEATHS` actors died of is given up as at fault: the worker looks for the text in it.
5. While no actor runs, calls wait for `PATIENCE_S` and then fail as unavailable; the pool keeps trying.
6. The process ends with its standard input, and Ray ends its actors with it.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

import anyio
import msgspec
import numpy as np

from cdcsync import __version__, config
from cdcsync.embedders import make_embedder
from cdcsync.embedders.foreign import first_line
from cdcsync.embedders.protocol import check_shape
from cdcsync.embedders.ray import LENGTH, Answer, Call, Failure, Opening
from cdcsync.errors import CdcsyncError

CONNECT_S = 5.0
"""How long the head may take to accept a connection."""

JOIN_S = 30.0
"""How long Ray may take to let this process in. By itself it would try for minutes."""

WATCH_S = 2.0
"""How often the head is looked for. Ray waits a minute for it, and keeps a processor busy meanwhile."""

END_S = 4.0
"""How long this process may take to give its actors back once nobody listens any more."""

MOST_DEATHS = 3
"""How many actors may die during a call before the call is suspected: nodes also die for other reasons."""

PATIENCE_S = 30.0
"""How long calls wait while no actor runs: a replacement on another node takes some 10 s, with its model."""

TICK_S = 0.5
"""How often the number of actors is looked at without a reason."""

MOST_PAUSE_S = 30.0
"""The longest pause before an actor is replaced."""

INSTALL = "pip install 'cdcsync[ray]', on the worker's machine and on the cluster's nodes"


class Actor:
    """One embedder in a process of its own, somewhere on the cluster; Ray makes it."""

    def __init__(self, name: str, settings: bytes) -> None:
        self._name = name
        self._settings = settings

    async def open(self, version: str, identity: str) -> Failure | None:
        """Load the embedder; every actor has to make the vectors that the index says."""
        if version != __version__:
            return Failure("setup", f"a node runs cdcsync {__version__} and the worker {version}", INSTALL)
        try:
            settings = msgspec.msgpack.decode(self._settings, type=config.OneEmbedder)
            self._embedder = await anyio.to_thread.run_sync(make_embedder, self._name, settings)
            found = await anyio.to_thread.run_sync(lambda: self._embedder.identity)
            if found != identity:
                return Failure(
                    "setup",
                    f"a node has another model under this name: {found} instead of {identity}",
                    "pin the model's revision, and check that all machines have the same files",
                )
            await self._embedder.open()
        except CdcsyncError as error:
            return Failure.of(error)
        return None

    async def embed(self, kind: Any, texts: list[str]) -> bytes | Failure:
        """Return the texts' vectors, `float32[n, dimensions]`, as bytes."""
        try:
            vectors = np.ascontiguousarray(await self._embedder.embed(texts, kind=kind), np.float32)
            check_shape(vectors, len(texts), self._embedder.dimensions)
            return vectors.tobytes()
        except CdcsyncError as error:
            return Failure.of(error)


class Died(Exception):
    """An actor will not answer any more."""


class Waiting:
    """A call in the queue, and how many actors died with it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.deaths = 0


class Seat:
    """One place of the pool: an actor, from its creation to its end."""

    def __init__(self, now: float) -> None:
        self.ready = False
        self.busy = 0
        self.used = now
        """When it last began or ended something."""
        self.task: asyncio.Task[None]


class Pool:
    """The actors and the queue before them."""

    def __init__(self, ray: Any, opening: Opening, answers: BinaryIO) -> None:
        self._ray = ray
        self._opening = opening
        self._settings = opening.settings
        self._answers = answers
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()
        self._seats: set[Seat] = set()
        self._in_a_row = 0
        self._not_before = 0.0
        self._lonely_since = self._now()
        self._failure: Failure | None = None
        self._opened = False
        self._class = ray.remote(Actor).options(
            num_cpus=self._settings.cpus,
            num_gpus=self._settings.gpus,
            resources=self._settings.resources,
            max_concurrency=self._settings.tasks_in_flight + 1,
            max_restarts=0,
        )

    def put(self, call: Call) -> None:
        """Take a call."""
        self._queue.put_nowait(Waiting(call))
        self._tend()

    async def run(self) -> None:
        """Keep the right number of actors, until cancelled."""
        while True:
            self._tend()
            await asyncio.sleep(TICK_S)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _tend(self) -> None:
        """Start actors that are missing, end those that are idle, and answer for none at all."""
        now = self._now()
        lanes = self._settings.tasks_in_flight
        calls = self._queue.qsize() + sum(seat.busy for seat in self._seats)
        wanted = max(self._settings.actors_min, min(self._settings.actors_max, -(-calls // lanes)))
        if now >= self._not_before:
            for _ in range(wanted - len(self._seats)):
                self._seat(now)
        idle = sorted(
            (seat for seat in self._seats if not seat.busy and now - seat.used > self._settings.idle_s),
            key=lambda seat: (seat.ready, seat.used),
        )
        for seat in idle[: max(0, len(self._seats) - wanted)]:
            seat.task.cancel()
        if any(seat.ready for seat in self._seats):
            self._lonely_since = now
        elif now - self._lonely_since > PATIENCE_S:
            self._give_up()

    def _give_up(self) -> None:
        """Fail the waiting calls with the reason why there is no actor."""
        failure = self._failure or Failure(
            "unavailable",
            "no actor is running",
            "see with `ray status` whether the cluster has the cpus, gpus and resources of one actor free",
        )
        while not self._queue.empty():
            self._answer(Answer(self._queue.get_nowait().call.number, failure=failure))

    def _seat(self, now: float) -> None:
        seat = Seat(now)
        self._seats.add(seat)
        seat.task = asyncio.get_running_loop().create_task(self._occupy(seat))

    async def _occupy(self, seat: Seat) -> None:
        """Make an actor and use it until it dies, or is idle."""
        actor = self._class.remote(self._opening.name, msgspec.msgpack.encode(self._settings.embedder))
        died = True
        try:
            failure = await self._of_actor(actor.open.remote(__version__, self._opening.identity))
            if failure is not None:
                self._note(failure)
                return
            self._failure = None
            seat.ready = True
            seat.used = self._now()
            if not self._opened:
                self._opened = True
                self._answer(Answer(0))
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._settings.tasks_in_flight):
                    tasks.create_task(self._lane(seat, actor))
        except* Died as group:
            self._note(Failure("unavailable", f"an actor ended: {group.exceptions[0]}"))
        except* asyncio.CancelledError:
            died = False
        finally:
            self._seats.discard(seat)
            if died:
                self._not_before = self._now() + min(MOST_PAUSE_S, 0.5 * 2.0**self._in_a_row)
                self._in_a_row = min(self._in_a_row + 1, 10)
            self._ray.kill(actor)
            self._tend()

    def _note(self, failure: Failure) -> None:
        """Remember why there is no actor; the worker that waits for the first one is told at once."""
        self._failure = failure
        if not self._opened:
            self._answer(Answer(0, failure=failure))

    async def _lane(self, seat: Seat, actor: Any) -> None:
        """Take one call after the other to an actor."""
        while True:
            waiting = await self._queue.get()
            seat.busy += 1
            seat.used = self._now()
            try:
                call = waiting.call
                async with asyncio.timeout(self._settings.timeout_s):
                    made = await self._of_actor(actor.embed.remote(call.kind, call.texts), call.texts)
            except TimeoutError:
                self._put_back(waiting)
                raise Died(f"it did not answer in {self._settings.timeout_s:g} s") from None
            except (Died, asyncio.CancelledError):
                self._put_back(waiting)
                raise
            finally:
                seat.busy -= 1
                seat.used = self._now()
            self._in_a_row = 0
            if isinstance(made, bytes):
                self._answer(Answer(call.number, made))
            else:
                self._answer(Answer(call.number, failure=made))

    def _put_back(self, waiting: Waiting) -> None:
        waiting.deaths += 1
        if waiting.deaths < MOST_DEATHS:
            self._queue.put_nowait(waiting)
            return
        failure = Failure(
            "failed",
            f"{waiting.deaths} actors ended while they embedded these texts",
            "if an actor lacks memory, lower the embedder's batch_size or give it more",
        )
        self._answer(Answer(waiting.call.number, failure=failure))

    async def _of_actor(self, reference: Any, texts: Sequence[str] = ()) -> Any:
        """Return what an actor answers.

        :param texts: what it was given, and an error may quote.
        :raises Died: it will not: its process, its node or its answer is gone.
        """
        exceptions = self._ray.exceptions
        try:
            return await reference
        except exceptions.RayTaskError as error:
            return Failure("failed", f"the embedder failed on an actor: {_told(error.cause or error, texts)}")
        except exceptions.RayError as error:
            raise Died(type(error).__name__) from error

    def _answer(self, answer: Answer) -> None:
        _write(self._answers, answer)


def _told(error: BaseException, texts: Sequence[str] = ()) -> str:
    return f"{type(error).__name__}: {first_line(error, texts)}"


def _write(answers: BinaryIO, answer: Answer) -> None:
    payload = msgspec.msgpack.encode(answer)
    answers.write(LENGTH.pack(len(payload)) + payload)
    answers.flush()


def _connect(address: str, answers: BinaryIO) -> Any:
    """Connect this process to the cluster and return Ray, or why it cannot."""
    if importlib.util.find_spec("ray") is None:
        return Failure("setup", "ray is not installed", INSTALL)
    join = "start one with `ray start --head`, or join one with `ray start --address=HOST:PORT`"
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            return Failure("unavailable", f"no Ray cluster answers at {address}: {error.strerror or error}", join)
        if host in ("localhost", "127.0.0.1"):
            # Ray replaces these two by the machine's outward address, where a cluster on loopback does not listen.
            address = f"LOCALHOST:{port}"

    def too_late() -> None:
        _write(answers, Answer(0, failure=Failure("unavailable", f"{address} does not answer as Ray does", join)))
        os._exit(1)

    timer = threading.Timer(JOIN_S, too_late)
    timer.start()
    try:
        ray = importlib.import_module("ray")
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # whatever Ray finds wrong: versions, addresses, a machine that is not a node
        return Failure("unavailable", f"Ray does not let this machine in: {_told(error)}", join)
    finally:
        timer.cancel()
    return ray


async def _serve(ray: Any, opening: Opening, answers: BinaryIO) -> None:
    """Answer calls until standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    pool = Pool(ray, opening, answers)
    tending = loop.create_task(pool.run())
    watching = loop.create_task(_end_with_the_head(ray.get_runtime_context().gcs_address))
    decoder = msgspec.msgpack.Decoder(Call)
    try:
        while True:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            pool.put(decoder.decode(await reader.readexactly(length)))
    except asyncio.IncompleteReadError:
        tending.cancel()
        watching.cancel()


async def _end_with_the_head(address: str) -> None:
    """End this process once the head is gone: the worker is told at once, and connects again to what it finds."""
    host, _, port = address.rpartition(":")
    missed = 0
    while missed < 2:
        await asyncio.sleep(WATCH_S)
        try:
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            missed = 0
        except OSError:
            missed += 1
    os._exit(1)


def _end_with_the_worker() -> None:
    """End this process soon after the worker's end of standard input, whatever Ray is waiting for."""
    gone = select.poll()
    gone.register(0, select.POLLHUP)
    gone.poll()
    time.sleep(END_S)
    os._exit(1)


def main() -> None:
    """Run the driver. It takes no arguments: the first frame says what to do."""
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    # Standard output is for frames alone; anything that a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    (length,) = LENGTH.unpack(_exactly(LENGTH.size))
    opening = msgspec.msgpack.decode(_exactly(length), type=Opening)
    ray = _connect(opening.settings.address, answers)
    if isinstance(ray, Failure):
        _write(answers, Answer(0, failure=ray))
        return
    # Ray takes SIGTERM for itself. The worker ends this process by closing its end, once it needs no more answers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        asyncio.run(_serve(ray, opening, answers))
    finally:
        ray.shutdown()


def _exactly(count: int) -> bytes:
    """Read so many bytes from standard input, which nothing buffers before the loop takes it."""
    received = b""
    while len(received) < count:
        if not (more := os.read(0, count - len(received))):
            sys.exit(1)
        received += more
    return received
