"""A class of the user's that embeds, named in the configuration as `package.module:Name`.

It needs three attributes: `identity`, `dimensions` and `embed(texts, *, kind)`. Everything else of the `Embedder`
protocol is used if it is there and has a default otherwise. `embed`, `open` and `aclose` may be plain or async; plain
ones run in a thread, so that they do not hold up the worker.

What the class raises becomes an error of ours without its message, which may quote a text: an exception of cdcsync's
own (`TextRejected`, `EmbedderUnavailable`) keeps its meaning, any other counts as a failure that may pass.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from cdcsync import config
from cdcsync.config.embedders import MAX_DIMENSIONS
from cdcsync.config.imports import import_named
from cdcsync.embedders.protocol import WORD, Distance, Kind, Vectors
from cdcsync.errors import CdcsyncError, EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.process.threads import Calls, Loading

CLOSING_S = 5.0
"""How long closing waits for calls of the user's class that nobody wants the result of any more."""

DISTANCES = ("cosine", "l2", "inner_product")


class PythonEmbedder:
    """Runs an embedder of the user's, and holds it to the protocol.

    :raises EmbedderSetupError: the class cannot be imported or made, or lacks something that an embedder needs.
    """

    distance: Distance

    def __init__(self, name: str, settings: config.PythonEmbedder) -> None:
        self.name = name
        self.origin = settings.class_
        self._where = f"embedders.{name}"
        self._own = self._make(settings)
        self.identity = f"python:{self._attribute('identity', str)}"
        self.dimensions: int = self._attribute("dimensions", int)
        self.concurrency: int = self._attribute("concurrency", int, 1)
        self.max_input_tokens: int | None = self._attribute("max_input_tokens", int, None)
        self.tokenizer_json: str | None = self._attribute("tokenizer_json", str, None)
        self.harmless_text: str = self._attribute("harmless_text", str, WORD)
        self.distance = self._attribute("distance", str, "cosine")
        if not 1 <= self.dimensions <= MAX_DIMENSIONS:
            raise self._faulty(f"dimensions is {self.dimensions}", f"give 1 to {MAX_DIMENSIONS:,}")
        if self.concurrency < 1:
            raise self._faulty(f"concurrency is {self.concurrency}", "give 1 or more")
        if self.distance not in DISTANCES:
            raise self._faulty(f"distance is {self.distance!r}", f"give one of {', '.join(DISTANCES)}")
        if not callable(getattr(self._own, "embed", None)):
            raise self._faulty("it has no method embed", "define embed(self, texts, *, kind)")
        # Plain functions of one embedder never run at the same time, unless it says that they may.
        self._calls = Calls(self.concurrency)
        self._loading = Loading()
        self._opened = False

    def _make(self, settings: config.PythonEmbedder) -> Any:
        made = import_named(self.origin, EmbedderSetupError, f"{self._where}.class")
        if made is None:
            raise self._faulty("it is not a class", "name a class, or a function that returns an embedder")
        try:
            return made(**settings.options)
        except CdcsyncError:
            raise
        except Exception as error:
            # An option may be a key: the message of a constructor is not for a log.
            raise EmbedderSetupError(
                f"{self.origin} failed with {_place(error)}",
                where=self._where,
                hint=f"check [{self._where}.options] against the arguments of {self.origin.partition(':')[2]}",
            ) from error

    def _faulty(self, problem: str, hint: str) -> EmbedderSetupError:
        return EmbedderSetupError(f"{self.origin}: {problem}", where=self._where, hint=hint)

    def _attribute(self, name: str, kind: type, *default: Any) -> Any:
        """Return an attribute of the user's object, of the right type; without a default it must be there."""
        value = getattr(self._own, name, *(default or (None,)))
        if default and value == default[0]:
            return value
        if not isinstance(value, kind) or isinstance(value, bool) or not value:
            raise self._faulty(
                f"{name} is {value!r}" if value is not None else f"it has no {name}",
                f"give {name} as {'a text' if kind is str else 'a whole number'}",
            )
        return value

    def fitting(self, texts: Sequence[str]) -> int:
        """Return how many of these texts one call should have: all, unless the class has an opinion."""
        own = getattr(self._own, "fitting", None)
        return len(texts) if own is None else max(1, int(own(texts)))

    async def open(self) -> None:
        """Call the class's `open`, if it has one, so that it can load what it needs. A second call does nothing.

        A cancelled call leaves a plain `open` to its thread, and the next call waits for it.

        :raises EmbedderUnavailable: it failed.
        """
        if not self._opened:
            await self._call("open")
            self._opened = True

    def _open_here(self) -> None:
        self._own.open()
        self._opened = True

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        """Return the texts' vectors, `float32[n, dimensions]`.

        :raises EmbedderUnavailable: the class fails, or is not open.
        :raises EmbedError: what it returns is not an array of numbers.
        """
        if not self._opened:
            raise EmbedderUnavailable("the embedder is not open", where=self._where)
        try:
            made = await self._call("embed", list(texts), kind=kind)
        except TextRejected as error:
            if list(texts) == [self.harmless_text] and not error.hint:
                error.hint = f"name a text that it always embeds in the attribute harmless_text of {self.origin}"
            raise
        try:
            return np.asarray(made, np.float32)
        except (TypeError, ValueError):
            raise EmbedError(
                f"{self.origin} returned {type(made).__name__}, not rows of numbers",
                where=self._where,
                hint="return a list of lists of numbers or a NumPy array, one row for each text",
            ) from None

    async def aclose(self) -> None:
        """Call the class's `aclose`, if it has one, so that it can release what it loaded.

        Plain functions never run at the same time, so it comes after the calls that still run, if they end soon.
        """
        if self._opened:
            self._opened = False
            with anyio.move_on_after(CLOSING_S):
                await self._call("aclose")
            self._calls.close()

    async def _call(self, name: str, *arguments: Any, **named: Any) -> Any:
        method: Callable[..., Any] | None = getattr(self._own, name, None)
        if method is None:
            return None
        try:
            if inspect.iscoroutinefunction(method):
                return await method(*arguments, **named)
            if name == "open":
                await self._loading.run(self._open_here)
                return None
            return await self._calls.run(lambda: method(*arguments, **named))
        except CdcsyncError:
            raise
        except Exception as error:
            raise EmbedderUnavailable(
                f"{self.origin}.{name} failed with {_place(error)}",
                where=self._where,
                hint="correct the class; raise cdcsync.TextRejected for a text that it can never embed",
            ) from error


def _place(error: Exception) -> str:
    """Return an exception's type and where it was raised, without its message, which may quote a text or a key."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"
