"""Any other embedder on a Ray cluster: the worker's end of it.

    worker ◄─ frames over pipes ─► driver (`ray_pool`, a process of its own) ◄─ Ray ─► actors, one embedder each

A process that is connected to Ray ends when the cluster's head or the machine's node does, and Ray starts threads and
takes over signals and logging in it. So the worker is never that process: it starts one, and starts another when that
one ends. What was asked of the old one fails as unavailable, and the backlog asks again.

What is known of the embedder is known without Ray: it is made here too, and never opened. Its identity is the index's
fingerprint, so that a model moves to Ray, and back, without any text being embedded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import anyio
import anyio.abc
import msgspec
import numpy as np

from cdcsync import config
from cdcsync.embedders.protocol import Distance, Embedder, Kind, Vectors, harmless
from cdcsync.errors import CdcsyncError, EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected

OPEN_S = 60.0
"""How long the first actor may take: Ray's own start, a worker process, the import of torch, the model. A cluster that
adds machines takes longer; then the next attempt finds them."""

END_S = 5.0
"""How long a driver may take to give its actors back; Ray ends those of a driver that was killed."""

LENGTH = struct.Struct(">I")
"""Every frame begins with its length in bytes."""

DRIVER = "from cdcsync.embedders.ray_pool import main; main()"


class Opening(msgspec.Struct, array_like=True, frozen=True):
    """The first frame to the driver: what to run, and where."""

    name: str
    identity: str
    settings: config.RayEmbedder


class Call(msgspec.Struct, array_like=True, frozen=True):
    """Texts to embed."""

    number: int
    kind: Kind
    texts: list[str]


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """An error, as it crosses from one process to another."""

    kind: Literal["unavailable", "rejected", "setup", "failed"]
    message: str
    hint: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: CdcsyncError) -> Failure:
        """Take an embedder's error apart."""
        if isinstance(error, EmbedderUnavailable):
            return cls("unavailable", error.message, error.hint, error.retry_after_s)
        kinds: dict[type[CdcsyncError], Literal["rejected", "setup"]] = {
            TextRejected: "rejected",
            EmbedderSetupError: "setup",
        }
        return cls(kinds.get(type(error), "failed"), error.message, error.hint)

    def error(self, where: str) -> CdcsyncError:
        """Return the error that this was."""
        match self.kind:
            case "unavailable":
                return EmbedderUnavailable(self.message, where=where, hint=self.hint, retry_after_s=self.retry_after_s)
            case "rejected":
                return TextRejected(self.message, where=where, hint=self.hint)
            case "setup":
                return EmbedderSetupError(self.message, where=where, hint=self.hint)
            case "failed":
                return EmbedError(self.message, where=where, hint=self.hint)


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The result of a call: `float32[n, dimensions]` as bytes, or why not. Number 0 says that the pool is open."""

    number: int
    vectors: bytes = b""
    failure: Failure | None = None


class RayEmbedder:
    """Embeds on a Ray cluster what another embedder would embed here.

    :param embedder: the one that each actor runs; only described here, never opened.
    """

    def __init__(self, name: str, settings: config.RayEmbedder, embedder: Embedder) -> None:
        self.name = name
        self.origin = f"{embedder.origin}, on Ray at {settings.address}"
        self.concurrency = settings.actors_max * settings.tasks_in_flight
        self._where = f"embedders.{name}"
        self._settings = settings
        self._embedder = embedder
        self._turn = anyio.Lock()
        self._driver: _Driver | None = None
        self._opened = False
        self._attempts = 0
        self._failure: CdcsyncError | None = None

    @property
    def identity(self) -> str:
        """The embedder's own: where it runs does not decide its vectors."""
        return self._embedder.identity

    @property
    def commit(self) -> str | None:
        """The hub's commit of the model that the actors run; None for one that does not come from the hub."""
        commit: str | None = getattr(self._embedder, "commit", None)
        return commit

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return self._embedder.dimensions

    @property
    def distance(self) -> Distance:
        """The distance that the model was made for."""
        return self._embedder.distance

    @property
    def tokenizer_json(self) -> str | None:
        """The model's tokenizer."""
        return self._embedder.tokenizer_json

    @property
    def max_input_tokens(self) -> int | None:
        """How many tokens of a document the model reads."""
        return self._embedder.max_input_tokens

    @property
    def harmless_text(self) -> str:
        """The text that the embedder is tried with."""
        return harmless(self._embedder)

    def fitting(self, texts: Sequence[str]) -> int:
        """Return how many of these texts one call of an actor should have."""
        return self._embedder.fitting(texts)

    async def open(self) -> None:
        """Connect to the cluster and wait for the first actor. Calling it again does nothing while that is there.

        :raises EmbedderUnavailable: the cluster does not answer, or has no room for an actor now.
        :raises EmbedderSetupError: Ray is not installed, or the actors cannot run the embedder as configured.
        """
        await self._connected()
        self._opened = True

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, in their order.

        :raises EmbedderUnavailable: the cluster is away, has no actor just now, or the embedder is not open.
        :raises EmbedError: actors died of these texts, one after the other.
        """
        if not self._opened:
            raise EmbedderUnavailable("the embedder is not open", where=self._where)
        driver = await self._connected()
        made = await driver.ask(kind, list(texts))
        return np.frombuffer(made, np.float32).reshape(len(texts), self.dimensions)

    async def aclose(self) -> None:
        """Give the actors back."""
        self._opened = False
        driver, self._driver = self._driver, None
        if driver is not None:
            await driver.aclose()

    async def _connected(self) -> _Driver:
        """Return the driver, starting it if there is none; callers that waited for an attempt share its failure."""
        if self._driver is not None and self._driver.ready:
            return self._driver
        attempts = self._attempts
        async with self._turn:
            if self._driver is not None and self._driver.ready:
                return self._driver
            if self._attempts > attempts and self._failure is not None:
                raise self._failure
            self._attempts += 1
            try:
                if self._driver is None or self._driver.ended:
                    opening = Opening(self.name, self.identity, self._settings)
                    self._driver = await _Driver.start(opening, self._where)
                await self._driver.opened()
            except CdcsyncError as error:
                self._failure = error
                if self._driver is not None and not self._driver.opening:
                    await self._driver.aclose()
                    self._driver = None
                raise
            return self._driver


class _Driver:
    """The driver's process, and the calls that it has not answered yet."""

    def __init__(self, process: anyio.abc.Process, where: str) -> None:
        self._process = process
        self._where = where
        self._sending = anyio.Lock()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._last = 0
        self._opening: asyncio.Future[bytes] = self._awaited(0)
        self._reader = asyncio.get_running_loop().create_task(self._read_for_ever())

    @classmethod
    async def start(cls, opening: Opening, where: str) -> _Driver:
        """Start a driver and tell it what to run."""
        process = await anyio.open_process(
            [sys.executable, "-P", "-c", DRIVER],
            # Ray's output stays out of the worker's log: it can quote texts. Ray keeps its own logs.
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
            # A signal from the terminal is for the worker, which ends its driver last.
            start_new_session=True,
        )
        driver = cls(process, where)
        await driver._send(opening)
        return driver

    @property
    def ready(self) -> bool:
        """Whether it has its pool."""
        return not self.ended and self._opening.done() and self._opening.exception() is None

    @property
    def opening(self) -> bool:
        """Whether its first actor may still start."""
        return not self.ended and not self._opening.done()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be answered."""
        return self._reader.done()

    async def opened(self) -> None:
        """Wait for the first actor.

        :raises EmbedderUnavailable: there is none yet; wait again.
        """
        with anyio.move_on_after(OPEN_S):
            await asyncio.shield(self._opening)
            return
        raise EmbedderUnavailable(
            f"no actor has started in {OPEN_S:.0f} s",
            where=self._where,
            hint="see with `ray status` whether the cluster has the cpus, gpus and resources of one actor free",
        )

    async def ask(self, kind: Kind, texts: list[str]) -> bytes:
        """Return the texts' vectors as the driver sends them."""
        self._last += 1
        number = self._last
        answer = self._awaited(number)
        try:
            await self._send(Call(number, kind, texts))
            return await answer
        finally:
            self._waiting.pop(number, None)
            answer.cancel()

    async def aclose(self) -> None:
        """End the process."""
        with anyio.CancelScope(shield=True):
            assert self._process.stdin is not None
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
                await self._process.stdin.aclose()
            with anyio.move_on_after(END_S):
                await self._process.wait()
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            await asyncio.wait([self._reader])
            await self._process.aclose()
            if self._opening.done() and not self._opening.cancelled():
                self._opening.exception()  # looked at, so that nobody is told it was not

    def _awaited(self, number: int) -> asyncio.Future[bytes]:
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        return answer

    async def _send(self, frame: msgspec.Struct) -> None:
        payload = msgspec.msgpack.encode(frame)
        assert self._process.stdin is not None
        try:
            async with self._sending:
                # Half a frame would garble the next one.
                with anyio.CancelScope(shield=True):
                    await self._process.stdin.send(LENGTH.pack(len(payload)) + payload)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as error:
            raise self._lost() from error

    async def _read_for_ever(self) -> None:
        assert self._process.stdout is not None
        buffer = bytearray()
        decoder = msgspec.msgpack.Decoder(Answer)
        try:
            async for received in self._process.stdout:
                buffer += received
                while len(buffer) >= LENGTH.size:
                    (length,) = LENGTH.unpack_from(buffer)
                    if len(buffer) < LENGTH.size + length:
                        break
                    answer = decoder.decode(memoryview(buffer)[LENGTH.size : LENGTH.size + length].tobytes())
                    del buffer[: LENGTH.size + length]
                    self._answer(answer)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        finally:
            for number in list(self._waiting):
                self._settle(number, self._lost())

    def _answer(self, answer: Answer) -> None:
        if answer.failure is None:
            self._settle(answer.number, answer.vectors)
        else:
            self._settle(answer.number, answer.failure.error(self._where))

    def _settle(self, number: int, outcome: bytes | CdcsyncError) -> None:
        """End one wait; nobody waits any more for a call that was cancelled."""
        waiting = self._waiting.pop(number, None)
        if waiting is None or waiting.done():
            return
        if isinstance(outcome, bytes):
            waiting.set_result(outcome)
        else:
            waiting.set_exception(outcome)

    def _lost(self) -> EmbedderUnavailable:
        return EmbedderUnavailable(
            "the connection to the Ray cluster was lost",
            where=self._where,
            hint="check that the cluster's head and this machine's node are up (`ray status`); it is connected again",
        )
