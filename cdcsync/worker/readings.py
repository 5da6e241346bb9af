"""Whether the target answers, as the readings of the status tell: they are made all the time, whatever is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from cdcsync.errors import CdcsyncError, Unavailable

AWAY_S = 10.0
"""How long a server may leave a reading without an answer, or a batch unwritten, before the worker is not ready: longer
than a restart."""


class Readings:
    """The outcomes of the readings; make each within `noted`."""

    def __init__(self, used_at: Callable[[], float]) -> None:
        """Begin without any.

        :param used_at: returns when the target last answered a statement of a reading, by the event loop's clock.
        """
        self._used_at = used_at
        self._asked: float | None = None
        """When the reading began that has not been answered yet; readings that failed since then count."""
        self._failure: CdcsyncError | None = None
        """Why the last reading failed."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note how the reading in this block ends; one that is given up says nothing about the target."""
        began = self._asked
        if began is None:
            self._asked = anyio.current_time()
        try:
            yield
        except Unavailable as error:
            self._failure = error
            raise
        except CdcsyncError as error:
            self.conclude(error)
            raise
        except BaseException:
            self._asked = began
            raise
        self.conclude(None)

    def conclude(self, failure: CdcsyncError | None) -> None:
        """Note that the target has answered, or that something else than a reading has found out that it does not.

        :param failure: why nothing can be read, if that is so.
        """
        self._asked, self._failure = None, failure

    @property
    def silent(self) -> bool:
        """Whether the target has left them without an answer for longer than a restart takes."""
        # A reading of many indexes takes long, and each of its statements is answered.
        return self._asked is not None and anyio.current_time() - max(self._asked, self._used_at()) >= AWAY_S

    @property
    def answered(self) -> bool:
        """Whether the target has answered them so far."""
        return not isinstance(self._failure, Unavailable) and not self.silent

    @property
    def why_failing(self) -> str | None:
        """Why the status cannot be read, unless that is likely to pass in a moment."""
        failure = self._failure
        if failure is not None and not isinstance(failure, Unavailable):
            return f"the status cannot be read: {failure.with_fix}"
        if not self.silent:
            return None
        return f"the target does not answer: {failure.message}" if failure is not None else "the target does not answer"
