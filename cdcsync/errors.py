"""Everything that can go wrong, as a tree that says what to do about it.

    CdcsyncError
    ├── ConfigError            the file, a key or a value is wrong                      operator
    │   └── UsageError         an argument of a command or function cannot be used      operator
    ├── SetupError             a server, table, slot or privilege is not as needed      operator
    │   ├── EmbedderSetupError the model or provider cannot be used as configured       operator
    │   └── ModelChanged       a query was embedded for vectors that are gone           automatic
    ├── RunError               what a running worker needs is no longer there           operator
    ├── GapError               changes were lost, or cannot be shown not to be          operator
    │   └── AnotherServer      the source is not the server that the index followed     operator
    ├── IndexFault             what keeps one index from going on, and no other         operator
    ├── LeaseLost              another worker holds this pipeline now                   never
    ├── ProtocolError          the server sent what the protocol does not allow         never
    │   └── MalformedMessage   bytes that are no message, with tag and offset           never
    ├── Unavailable            a server cannot be reached just now                      automatic
    │   ├── SourceUnavailable
    │   │   ├── DecodingFailed the source fails at a change; a gap if it does so again  automatic
    │   │   └── SpoolUnusable  no room for open transactions; read without streaming    automatic
    │   ├── TargetUnavailable
    │   │   └── NotReached     an index does not hold a position yet                    automatic
    │   └── SlotInUse          another connection is reading the slot                   automatic
    ├── TargetRewound          the target went back to an earlier state                automatic
    ├── TablesChanged          a table, or how it is sent, is not what it was           automatic
    ├── DocumentError          a row cannot be made a document, or a document chunks    operator
    └── EmbedError             texts could not be embedded
        ├── EmbedderUnavailable  the provider or model is failing as a whole            automatic
        │   └── EmbedderLoading    the model is still being loaded                      automatic
        └── TextRejected         these texts, and only these, cannot be embedded        never

Each error says *what* went wrong (`message`), *where* (`where`: a key, a table, a slot) and *the fix*
(`hint`). `retry` says whether waiting helps. An operator sees those three lines and no traceback. What a server said is
also known by its code (`sqlstate`). A mistake of ours is none of these classes: it keeps its traceback.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import ClassVar

EXIT_FAILED = 1
"""The command ran and did not succeed."""
EXIT_WRONG = 2
"""Wrong configuration, set-up or usage: nothing was changed."""


class Retry(enum.Enum):
    """Whether doing the same thing again can succeed."""

    AUTOMATIC = "automatic"
    """Wait and try again: the cause passes by itself."""
    OPERATOR = "operator"
    """Someone has to change something first; the hint says what."""
    NEVER = "never"
    """Trying again gives the same answer."""


class CdcsyncError(Exception):
    """Base of all errors that cdcsync raises on purpose.

    :param message: the fault, in one sentence without a final full stop.
    :param where: the key, table, slot, server or file concerned.
    :param hint: the fix, as an instruction.
    :param sqlstate: PostgreSQL's code of the error that a server reported, if one did.
    :ivar beside: if no host of a DSN could be used, and this is the error of one: those of the others.
    """

    retry: ClassVar[Retry] = Retry.OPERATOR
    exit_code: ClassVar[int] = EXIT_FAILED
    beside: Sequence[CdcsyncError] = ()

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, sqlstate: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint
        self.sqlstate = sqlstate

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    @property
    def with_fix(self) -> str:
        """The fault and its fix in one line, for a table that says why something waits."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(CdcsyncError):
    """A configuration file, key or value is wrong."""

    exit_code = EXIT_WRONG


class UsageError(ConfigError):
    """An argument of a command or a function cannot be used."""


class SetupError(CdcsyncError):
    """A server, table, slot, publication, privilege or index is not as it has to be."""

    exit_code = EXIT_WRONG


class EmbedderSetupError(SetupError):
    """A model or provider cannot be used as configured: a missing package or model, other dimensions."""


class ModelChanged(SetupError):
    """A query was embedded for a generation of vectors that the index does not have any more: embed it again."""

    retry = Retry.AUTOMATIC


class RunError(CdcsyncError):
    """A running worker cannot continue until someone acts; the next start resumes from what is committed.

    Examples are a full disk, a privilege that was revoked, and a row that the source cannot send.
    """

    @classmethod
    def of(cls, error: SetupError) -> RunError:
        """Return what a set-up error means once the worker has begun to change things."""
        return cls(error.message, where=error.where, hint=error.hint, sqlstate=error.sqlstate)


class GapError(CdcsyncError):
    """Changes may have been lost between the checkpoint and what the slot can still send."""


class AnotherServer(GapError):
    """The source is not the server that the index has followed, nor one that was promoted in its place.

    :ivar server: the server that it is, as an approval names it.
    :ivar approved: whether somebody has approved that the index follows it from now on.
    """

    def __init__(
        self, message: str, *, server: str, approved: bool, where: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.server = server
        self.approved = approved


SHOWN_CHARACTERS = 60
"""So much of a key's value is shown: enough to find it by."""


class IndexFault(CdcsyncError):
    """Something of one index keeps it from going on: its tables, a row or value, or its tables in the target.

    That index is paused until it is mended; the others continue.

    :param index: the index concerned.
    :param passing: the stream has moved past the cause, so that another look at the table may end the pause at once,
        however often that happens.
    :ivar key: the key of a row that is the cause, where one is; a table that no longer forbids it may have NULL there.
    """

    def __init__(
        self, message: str, *, index: str, where: str | None = None, hint: str | None = None, passing: bool = False
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.index = index
        self.passing = passing
        self.key: tuple[str | None, ...] | None = None

    @property
    def row(self) -> str | None:
        """The key, cut to what is needed to find the row: for the index's reason, not for a log."""
        if self.key is None:
            return None
        parts = ["NULL" if part is None else part for part in self.key]
        return ", ".join(part if len(part) <= SHOWN_CHARACTERS else f"{part[:SHOWN_CHARACTERS]}…" for part in parts)


class LeaseLost(CdcsyncError):
    """Another worker, or a command, has taken over this pipeline; this one must not write any more."""

    retry = Retry.NEVER


class ProtocolError(CdcsyncError):
    """The server sent something that the replication protocol does not allow here."""

    retry = Retry.NEVER


class MalformedMessage(ProtocolError):
    """Bytes that are not a message of the protocol.

    :param tag: the message's first byte as a character, `""` when there was none.
    :param offset: how far into the message the fault was noticed, in bytes.
    """

    def __init__(self, tag: str, offset: int, problem: str = "malformed message") -> None:
        super().__init__(f"{problem} (tag {tag!r}, byte {offset})")
        self.tag = tag
        self.offset = offset
        self.problem = problem


class Unavailable(CdcsyncError):
    """A server cannot be reached now, or is shutting down; waiting helps.

    :ivar index: the index that a statement was for, where statements for other indexes may succeed meanwhile: somebody
        holds its tables locked, or what it asks for takes more memory than there is.
    """

    retry = Retry.AUTOMATIC
    index: str | None = None


class SourceUnavailable(Unavailable):
    """The source server cannot be reached now."""


class DecodingFailed(SourceUnavailable):
    """The source failed while it decoded what follows our position: if it fails there again, nobody gets past it."""


class SpoolUnusable(SourceUnavailable):
    """Open transactions cannot be kept on this machine: the source is asked to keep them itself."""


class TargetUnavailable(Unavailable):
    """The target server cannot be reached now."""


class NotReached(TargetUnavailable):
    """The index does not hold yet what its source had committed up to a position."""


class SlotInUse(Unavailable):
    """Another connection is reading the replication slot."""


class TargetRewound(CdcsyncError):
    """The target is not as this worker last committed it: the worker begins anew, and looks for a gap."""

    retry = Retry.AUTOMATIC


class TablesChanged(CdcsyncError):
    """The tables of an index have to be examined again: the worker starts again with the present tables."""

    retry = Retry.AUTOMATIC


class DocumentError(CdcsyncError):
    """A row cannot be made a document, or a document chunks. The row is left out of the index, with the reason."""


class EmbedError(CdcsyncError):
    """Texts could not be embedded."""


class EmbedderUnavailable(EmbedError):
    """The embedder as a whole fails now: outage, rate limit, not loaded yet.

    :param retry_after_s: how long the provider asked us to wait, in seconds, when it said so.
    """

    retry = Retry.AUTOMATIC

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.retry_after_s = retry_after_s


class EmbedderLoading(EmbedderUnavailable):
    """A model is still being loaded, which continues; calls do without it until then."""


class TextRejected(EmbedError):
    """The embedder will never embed one of these texts, which is too long or not allowed, for example.

    Raise it in an embedder of your own, so that only this text is given up.
    """

    retry = Retry.NEVER


def leading(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error of a task group that says why everything ended.

    An error that needs an operator explains an error that a retry would fix, and a surprise explains both.
    """
    flat: list[BaseException] = []

    def flatten(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                flatten(part)
        else:
            flat.append(error)

    flatten(group)
    return min(
        flat, key=lambda error: 0 if not isinstance(error, CdcsyncError) else 1 + (error.retry is Retry.AUTOMATIC)
    )
