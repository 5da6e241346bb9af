"""Problems: answers that say what was wrong with a call and what to change.

Source: RFC 9457, "Problem Details for HTTP APIs".
"""

from __future__ import annotations

import math

import psycopg

from cdcsync.errors import (
    CdcsyncError,
    EmbedderLoading,
    EmbedderSetupError,
    EmbedderUnavailable,
    ModelChanged,
    SetupError,
    TextRejected,
    Unavailable,
    UsageError,
)

SEE_LOG = "the server's log says why, and what to do"
"""For what only the operator can change."""

OPERATOR = f"tell the server's operator: {SEE_LOG}"

AGAIN = "call again"


_ABOUT_VALUES = ("22", "23", "P0")
"""Classes of SQLSTATEs whose messages are about values: data exceptions, constraints, and exceptions raised in SQL."""


class Problem(Exception):
    """A call that is refused or failed.

    :param status: the HTTP status.
    :param title: the kind of problem, the same each time.
    :param detail: the fault of this call; holds nothing that identifies a person.
    :param fix: what the caller can change or do.
    :param retry_after_s: when the same call may succeed.
    """

    def __init__(self, status: int, title: str, detail: str, fix: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.detail = detail
        self.fix = fix
        self.retry_after_s = retry_after_s

    @property
    def outcome(self) -> str:
        """The kind of problem as a label of a metric."""
        if self.status == 429:
            return "limited"
        if self.status in (401, 403):
            return "refused"
        return "wrong" if self.status < 500 else "failed"

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self._wait_s(self.retry_after_s))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    @property
    def body(self) -> dict[str, object]:
        """The members of the answer."""
        return {"title": self.title, "status": self.status, "detail": self.detail, "fix": self.fix}

    def __str__(self) -> str:
        """Say all of it in sentences, for readers that do not see headers."""
        sentences = [self.detail, self.fix[0].upper() + self.fix[1:]]
        if self.retry_after_s is not None:
            sentences.append(f"Retry after {self._wait_s(self.retry_after_s)} s")
        return " ".join(one.rstrip(".") + "." for one in sentences)

    @staticmethod
    def _wait_s(seconds: float) -> int:
        return max(1, math.ceil(seconds))


def without_rows(error: CdcsyncError) -> CdcsyncError:
    """Return an error as it may be logged: a server's words about a value hold the value of a row or of a call.

    So do those of an exception that somebody raises in SQL, as in a function that a policy calls.
    """
    cause = error.__cause__
    if isinstance(cause, psycopg.Error) and (cause.sqlstate or "")[:2] in _ABOUT_VALUES:
        return type(error)(f"{type(cause).__name__} ({cause.sqlstate})", where=error.where)
    return error


def problem_of(error: CdcsyncError, *, candid: bool) -> Problem:
    """Return what an error of ours means to a caller.

    :param candid: tell what only the operator can change in detail, with names of hosts and roles.
    """
    match error:
        case UsageError():
            return Problem(422, "The call cannot be answered", error.message, error.hint or "change what it names")
        case TextRejected():
            return Problem(422, "The query cannot be embedded", error.message, "search by words (mode text)")
        case EmbedderLoading():
            return Problem(
                *(503, "The model is being loaded", "the query could not be embedded yet"),
                "search by words (mode text), or call again",
                retry_after_s=5,
            )
        case EmbedderUnavailable():
            return Problem(
                503, "The model is away", "the query could not be embedded", "search by words", retry_after_s=5
            )
        case Unavailable() if candid:
            return Problem(503, "The index is away", str(error), error.hint or AGAIN, retry_after_s=2)
        case Unavailable():
            return Problem(503, "The index is away", "the database does not answer now", AGAIN, retry_after_s=2)
        case ModelChanged():
            return Problem(
                409,
                "The model changed",
                "the index has the vectors of another model since the query was embedded",
                "embed the query again, or leave out the vector",
            )
        case EmbedderSetupError():
            return Problem(
                *(503, "The model cannot be used"),
                str(error) if candid else "the server cannot use the model of the index",
                f"search by words (mode text); {error.hint or SEE_LOG}"
                if candid
                else f"search by words (mode text), or {OPERATOR}",
            )
        case SetupError() if candid:
            return Problem(503, "The index cannot be searched", str(error), error.hint or OPERATOR)
        case SetupError():
            return Problem(503, "The index cannot be searched", "it is not set up as this server needs it", OPERATOR)
        case _:
            return failed()


def failed() -> Problem:
    """Return the answer to a call that met a fault of ours."""
    return Problem(500, "The call failed", "this should not happen", OPERATOR)
