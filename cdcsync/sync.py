"""`cdcsync.sync.Index`: the same index, for threads.

    with Index.open(load_config("cdcsync.toml"), "tickets") as tickets:
        hits = tickets.search("forgot my login")

Any number of threads may use one index at the same time; each process opens its own. Their calls run on an event loop
in a thread of its own, on the index that `cdcsync.Index` is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from cdcsync import index as asynchronous
from cdcsync.config import Config
from cdcsync.errors import UsageError
from cdcsync.postgres.pool import used_before_fork

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[asynchronous.Index, P], Awaitable[T]],
) -> Callable[Concatenate[Index, P], T]:
    """Return a method that calls one of the asynchronous index, and waits for its answer."""

    @functools.wraps(method)
    def call(self: Index, /, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return self._running().call(functools.partial(method, self._index, *arguments, **named))
        except RuntimeError as error:
            # The error that anyio raises if the loop ended between our look and the call.
            if self._portal is None:
                raise _closed() from error
            raise

    return call


class Index:
    """An index, searched by any number of threads. Use it in a `with` block."""

    def __init__(self, index: asynchronous.Index, parent: Index | None = None) -> None:
        self._index = index
        self._parent = parent
        self._process = os.getpid()
        self._portal: BlockingPortal | None = None
        self._loop: AbstractContextManager[BlockingPortal] | None = None
        self._entered: AbstractContextManager[asynchronous.Index] | None = None

    @property
    def name(self) -> str:
        """The index's name."""
        return self._index.name

    @classmethod
    def open(
        cls,
        config: Config,
        name: str,
        *,
        connections: int = asynchronous.CONNECTIONS,
        model_timeout_s: float = asynchronous.MODEL_TIMEOUT_S,
        application_name: str = "cdcsync index",
    ) -> Self:
        """Return the index of this name; see `cdcsync.Index.open`."""
        return cls(
            asynchronous.Index.open(
                config,
                name,
                connections=connections,
                model_timeout_s=model_timeout_s,
                application_name=application_name,
            )
        )

    def beside(self, name: str) -> Self:
        """Return another index of the same configuration; see `cdcsync.Index.beside`."""
        return type(self)(self._index.beside(name), self)

    def __enter__(self) -> Self:
        """Look the index up and load its model; see `cdcsync.Index`."""
        if self._parent is None:
            self._loop = start_blocking_portal(name="cdcsync.sync.Index")
            self._portal = self._loop.__enter__()
            self._process = os.getpid()
        self._entered = self._running().wrap_async_context_manager(self._index)
        try:
            self._entered.__enter__()
        except BaseException:
            self._entered = None
            self._stop()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        if self._inherited():  # the thread and the sessions are those of the process that opened it
            self._entered = self._loop = self._portal = None
            return
        try:
            if self._entered is not None:
                self._entered.__exit__(None, None, None)
        finally:
            self._entered = None
            self._stop()

    search = _blocking(asynchronous.Index.search)
    rerank = _blocking(asynchronous.Index.rerank)
    embed = _blocking(asynchronous.Index.embed)
    wait_for = _blocking(asynchronous.Index.wait_for)
    lsn = _blocking(asynchronous.Index.lsn)

    def _running(self) -> BlockingPortal:
        portal = self._portal if self._parent is None else self._parent._running()
        if portal is None:
            raise _closed()
        if self._inherited():
            raise used_before_fork("cdcsync.sync.Index")
        return portal

    def _inherited(self) -> bool:
        """Whether it was opened before a fork; the thread of its event loop is in the other process alone."""
        if self._parent is not None:
            return self._parent._inherited()
        return self._portal is not None and self._process != os.getpid()

    def _stop(self) -> None:
        loop, self._loop, self._portal = self._loop, None, None
        if loop is not None:
            loop.__exit__(None, None, None)


def _closed() -> UsageError:
    return UsageError("it is closed", where="cdcsync.sync.Index", hint="use it inside of its `with` block")
