"""The findings of checks.

A check never raises for a fault that it looks for: it adds a `Finding` and the next check runs, so that one run says
everything there is to fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, Self

import msgspec
import psycopg

from cdcsync.errors import CdcsyncError, Retry
from cdcsync.postgres.errors import locked_out, translate
from cdcsync.postgres.locking import Lock
from cdcsync.postgres.settings import Side

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """The finding of a check.

    :ivar level: with an "error" the pipeline cannot work; a "warning" may surprise later; "ok" is good news.
    :ivar where: the configuration's key, the table, the slot or the server concerned.
    :ivar message: one sentence without a final full stop.
    :ivar hint: the fix as an instruction, with the exact SQL where there is one.
    :ivar passes: whether an error may go away by itself, as that of a server that is starting up does.
    :ivar locked: whether it is that somebody holds a table locked, which concerns the indexes that need it alone.
    :ivar fails: whether something fails by it already, although it does not stop the pipeline.
    """

    level: Level
    where: str
    message: str
    hint: str | None = None
    passes: bool = False
    locked: bool = False
    fails: bool = False

    @classmethod
    def ok(cls, where: str, message: str) -> Self:
        """Return good news."""
        return cls("ok", where, message)

    @classmethod
    def warning(cls, where: str, message: str, hint: str | None = None) -> Self:
        """Return what does not stop the pipeline."""
        return cls("warning", where, message, hint)

    @classmethod
    def error(cls, where: str, message: str, hint: str | None) -> Self:
        """Return what stops the pipeline."""
        return cls("error", where, message, hint)

    @property
    def with_fix(self) -> str:
        """The message and its fix in one line."""
        return f"{self.message}; {self.hint}" if self.hint else self.message

    @property
    def sentence(self) -> str:
        """The message where `where` does not stand beside it: with the table or the publication that it is about."""
        said = self.where.startswith("indexes.") or self.where in self.message
        return self.message if said else f"{self.where}: {self.message}"

    @property
    def said(self) -> str:
        """The sentence and its fix in one line, where `where` does not stand beside it."""
        return f"{self.sentence}; {self.hint}" if self.hint else self.sentence

    @classmethod
    def of(cls, error: CdcsyncError, where: str) -> Self:
        """Return an error of our tree as a finding; its own place is the better known one."""
        passes, locked = error.retry is Retry.AUTOMATIC, locked_out(error)
        return cls("error", error.where or where, error.message, error.hint, passes, locked)

    @classmethod
    def of_lock(cls, where: str, lock: Lock) -> Self:
        """Return that somebody holds a table locked."""
        return cls("error", where, str(lock), lock.remedy, passes=True, locked=True)


@contextmanager
def noting(findings: list[Finding], side: Side, where: str) -> Iterator[None]:
    """Turn what goes wrong inside into a finding, once: a server that went away fails every check that follows."""
    try:
        yield
    except psycopg.Error as error:
        finding = Finding.of(translate(error, side, where=where), where)
    except CdcsyncError as error:
        finding = Finding.of(error, where)
    else:
        return
    if finding not in findings:
        findings.append(finding)


def or_ok(faults: Iterable[Finding], where: str, message: str) -> list[Finding]:
    """Return the faults, and with no error among them the good news first."""
    found = list(faults)
    if any(finding.level == "error" for finding in found):
        return found
    return [Finding.ok(where, message), *found]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was most likely meant."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
