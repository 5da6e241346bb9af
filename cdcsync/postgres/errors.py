"""What the driver's errors mean for the pipeline, for one index, and for the operator.

Source: PostgreSQL, "PostgreSQL Error Codes".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import psycopg

from cdcsync.errors import (
    AnotherServer,
    CdcsyncError,
    IndexFault,
    SetupError,
    SourceUnavailable,
    TargetUnavailable,
    Unavailable,
)
from cdcsync.logs import without_quoted
from cdcsync.postgres.refusals import REPORTED, STILL_RUNS, explain
from cdcsync.postgres.settings import Side

_DAMAGE_FIX = 'docs/operations.md, "Damaged tables", says how to continue'

_FIXES = {
    "25006": (  # read_only_sql_transaction
        "point the DSN at the primary; or, if transactions are read-only there by default, change that:"
        " `cdcsync check` says how"
    ),
    "28000": "ALTER ROLE … LOGIN for the role in the DSN, or use another role",  # invalid_authorization_specification
    "42501": "grant it; `cdcsync config roles` lists what each role needs",  # insufficient_privilege
    "53100": "free disk space on the server, or make it larger",  # disk_full
    "53200": "give the server more memory, or lower work_mem and maintenance_work_mem",  # out_of_memory
    "53300": "raise max_connections, or close some",  # too_many_connections
    "53400": "raise it: the server's log names it",  # configuration_limit_exceeded
    "55P03": "wait for that session, or end it: pg_locks names it",  # lock_not_available
    "57014": "find out who cancels it, such as a monitor that ends what takes long",  # query_canceled
    "58030": _DAMAGE_FIX,  # io_error
    "XX001": _DAMAGE_FIX,  # data_corrupted
    "XX002": "find out what damaged it, then REINDEX it",  # index_corrupted
}
"""The fix of a statement's error by its code, for the server's message about it.

28000 is for a role that lost LOGIN while its session is open: in some versions, such as PostgreSQL 16.2, each parallel
worker of the session logs in as a client does.
"""

_SHARED_MEMORY_FIX = "give the server more shared memory: /dev/shm of a container has 64 MB (docker run --shm-size)"
"""The fix if 53100 is not about a disk: parallel workers keep shared data in a file in /dev/shm."""

_FUNCTION_FIX = "correct the function, or the row, that it fails for: the server's log names the function"
"""The fix if an error that passes comes from inside a function or a trigger."""

_EARLIER_TABLES_FIX = (
    "if our tables are those of an earlier cdcsync, start `cdcsync run` of this one: it adds what they lack"
)
"""The fix if a column is missing: a command may read columns that a worker which still runs did not add."""

_DROPPED_FIX = "start `cdcsync run` again: it puts back what is missing of our tables, and loads what they lack"
"""The fix if a table of the target, or its schema, is missing: somebody dropped what is ours, or no worker ran yet."""

_TARGET_FIXES = {"42703": _EARLIER_TABLES_FIX, "42P01": _DROPPED_FIX, "3F000": _DROPPED_FIX}
"""The fixes if a column, a table or a schema is missing, where those are ours."""

_REFUSED_FIX = (
    "the server runs, and lets nobody in for this reason: correct that there or in the DSN; its log may say more"
)
"""The fix if a server refuses a connection in words that are not known."""

_PASSING_CODES = ("55P03", "25006", "57014", "25P03", "25P04")
"""The codes of errors that pass, beside those of whole classes; see `passing`."""

_STATEMENT_CODES = ("40", "53200", "53400", "55P03", "57014")
"""How the codes begin by which one statement fails while others succeed: it met a lock or another transaction, took
more memory of the source or temporary files than there may be, or was cancelled."""

_SHARED_MEMORY_FILES = ("lock.c", "predicate.c", "shmem.c")
"""Files of the server that raise 53200 if the memory is full that all sessions share, such as the table of locks."""

_ENTRY_FILES = ("nbt", "indextuple", "gin", "gist", "spg", "hash", "brin")
"""How the names of the server's files begin that raise 54000 if an entry of an index would be too long."""

_ROW_FILES = ("hio", "rewriteheap")
"""The same if a row would be, whose long values lie elsewhere already."""

_NAMES = re.compile(r"[^\w\s]|\d")
"""In what an error's context says of a function or a COPY: a quotation mark, a parenthesis, a number. What the server
adds if a parallel worker met the error, `parallel worker`, is words alone in every language."""

LOCKED_OUT = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)
"""The errors by which a statement ends because another session holds a lock on what it needs."""

REFUSALS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
"""The errors by which a server refuses a value."""


def unavailable(
    side: Side, message: str, *, where: str | None = None, hint: str | None = None, sqlstate: str | None = None
) -> SourceUnavailable | TargetUnavailable:
    """Return the error of a server that cannot be reached just now."""
    kind = SourceUnavailable if side == "source" else TargetUnavailable
    hint = hint or f"check that the {side} server runs and is reachable"
    return kind(message, where=where or side, hint=hint, sqlstate=sqlstate)


def fence(side: Side) -> str:
    """Return what to do about a former primary that answers."""
    return f"stop it, or make it a standby of the present primary; or take it out of {side}.dsn"


def passing(error: psycopg.Error) -> bool:
    """Say whether an error goes away by itself: the server or the network, not what we asked for.

    Classes 08 (connection), 53 (resources), 57P (shutdown), 40 (serialisation, deadlock), 55P03 (lock timeout), 25P03
    and 25P04 (time limits that somebody set for us after all), and errors without a code raised by libpq when the
    connection broke.
    """
    code = error.sqlstate
    if code is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return code[:2] in ("08", "53", "40") or code.startswith("57P") or code in _PASSING_CODES


def of_a_statement(error: psycopg.Error, side: Side) -> bool:
    """Say whether an error that passes came of what a statement works on: if it stays, others succeed all the same.

    A function may fail with any code: if it says that a connection broke, that was not the one to us. On the source,
    where we only read, a write that is refused is a function's, too.
    """
    if _of_the_server(error, side):
        return False
    code = error.sqlstate or ""
    return code.startswith(_STATEMENT_CODES) or (side, code) == ("source", "25006") or _from_inside(error)


def _of_the_server(error: psycopg.Error, side: Side) -> bool:
    """Say whether the server lacks what all statements need, whichever of them met that first, and inside of what.

    A disk is everybody's, and so is the table of locks. Other memory is the statement's on the source, where a document
    may have any number of related rows; but what we write to the target at once is bounded, and much the same for all
    indexes: if there is no memory for that, the server is short of it.
    """
    code = error.sqlstate
    memory = code == "53200" and (side == "target" or error.diag.source_file in _SHARED_MEMORY_FILES)
    return (code == "53100" or memory) and not chosen(error)


def _from_inside(error: psycopg.Error) -> bool:
    """Say whether an error came from inside what a statement calls, and ended no session."""
    inside = _NAMES.search(error.diag.context or "") is not None
    return inside and error.diag.severity_nonlocalized == "ERROR"


def chosen(error: psycopg.Error) -> bool:
    """Say whether the author of a function chose an error, code and words, with RAISE of PL/pgSQL."""
    return error.diag.source_function == "exec_stmt_raise"


def locked_out(error: BaseException) -> bool:
    """Say whether an error is one of `LOCKED_OUT`, or says that in our tree."""
    if isinstance(error, psycopg.Error):
        return isinstance(error, LOCKED_OUT)
    return isinstance(error, Unavailable) and error.sqlstate in ("55P03", "40P01")


def translate(error: psycopg.Error, side: Side, *, where: str | None = None) -> CdcsyncError:
    """Return the error of our tree that says what a driver's error means for the pipeline."""
    message = without_values(error)
    hint = _FIXES.get(error.sqlstate or "")
    if error.sqlstate == "55P03":
        message = "another session holds a lock"  # in place of the limit that we ourselves have set
    if error.sqlstate == "53100" and "shared memory" in message:
        hint = _SHARED_MEMORY_FIX
    if error.sqlstate in ("42501", "53200") and error.diag.message_hint:
        hint = error.diag.message_hint  # not a privilege is lacking, but a policy hides rows; or shared memory is full
    if passing(error) and not locked_out(error) and _from_inside(error) and not _of_the_server(error, side):
        hint = _FUNCTION_FIX
    if side == "target":
        hint = _TARGET_FIXES.get(error.sqlstate or "", hint)
    if passing(error):
        return unavailable(side, message, where=where, hint=hint, sqlstate=error.sqlstate)
    return SetupError(message, where=where or side, hint=hint or error.diag.message_hint, sqlstate=error.sqlstate)


def ours(error: psycopg.Error) -> bool:
    """Say whether an error is a mistake of this program, which no operator can fix: a misuse of the driver or session.

    The driver reports its misuse without a code. Classes 25 (transaction state), 26, 34 (names of statements and
    cursors), and parameters without a meaning (42P02) or type (42P18) come from the server. From inside a function they
    are a mistake of its author's.
    """
    code = error.sqlstate
    if code is None:
        return isinstance(error, psycopg.ProgrammingError | psycopg.NotSupportedError)
    return not _from_inside(error) and (
        code[:2] in ("26", "34") or code in ("25P01", "25P02", "25001", "42P02", "42P18")
    )


def fault_of(index: str, error: psycopg.Error, side: Side, *, where: str | None = None) -> IndexFault:
    """Return the error of a statement for one index as the reason why that index, and only that one, is paused.

    The server's words about a value hold the value, so of those only the kind of error is passed on; those about a size
    hold none.
    """
    where = where or f"index {index}"
    if not isinstance(error, REFUSALS):
        hint = error.diag.message_hint or f"correct that in the {side}; the index is tried again from time to time"
        return IndexFault(f"the {side} says: {without_values(error)}", index=index, where=where, hint=hint)
    what = f"the {side} refuses a value: {type(error).__name__} ({error.sqlstate})"
    hint = "compare the types of the table's key and carried columns with those of the chunks table"
    if isinstance(error, psycopg.errors.ProgramLimitExceeded) and not chosen(error):
        file = error.diag.source_file or ""
        if file.startswith(_ENTRY_FILES):
            # A value of more than 8 kB after compression is refused before the server says for which index.
            what += f", too long for the index {error.diag.constraint_name or 'of a key or column'}"
        elif file.startswith(_ROW_FILES):
            what += ", in a row too wide for a page"
        # The server's words about a limit hold sizes, and the names of types and indexes.
        what += f": {without_values(error)}"
        hint = 'docs/operations.md, "What is followed, and what pauses", says what the limits are, and what to do'
    return IndexFault(what, index=index, where=where, hint=hint)


@contextmanager
def speaking_of(side: Side, *, where: str | None = None, index: str | None = None) -> Iterator[None]:
    """Turn driver errors raised inside into errors of our tree.

    Every statement that is for one index goes through here with its name, so that what goes wrong with it stops that
    index alone.

    :param index: the index that the statements inside are for.
    :raises SourceUnavailable, TargetUnavailable: waiting may help.
    :raises IndexFault: it will not, and `index` has to be paused.
    :raises SetupError: it will not.
    :raises psycopg.Error: it is a mistake of ours.
    """
    try:
        yield
    except psycopg.Error as error:
        if ours(error):
            raise
        if index is not None and not passing(error):
            raise fault_of(index, error, side, where=where) from error
        said = translate(error, side, where=where)
        if isinstance(said, Unavailable) and of_a_statement(error, side):
            said.index = index
        raise said from error


def without_values(error: psycopg.Error) -> str:
    """Return the server's primary message without the value of a cell that it may quote: fit to be logged and stored.

    Data exceptions quote what they are about: `invalid input syntax for type integer: "…"`.
    """
    return without_quoted(first_line(error), error.sqlstate)


def first_line(error: psycopg.Error) -> str:
    """Return the server's primary message, or libpq's words in one line."""
    text = error.diag.message_primary or str(error)
    return " ".join(text.split()) or type(error).__name__


class Attempt(msgspec.Struct, frozen=True):
    """A host of a DSN at one of its addresses, and why no session could be opened there.

    :ivar host: with the port, as it is told; the error's message names it if there are several.
    :ivar inside: whether the host let us in: it is not the server that was wanted, or cannot be used.
    """

    host: str
    address: str
    error: CdcsyncError
    inside: bool = False


def none_of(attempts: Sequence[Attempt]) -> CdcsyncError:
    """Return what it means that no host could be used: the error of one, which tells in its message of the others.

    It is an error of the set-up only if all hosts refuse for good. A host does if it did so at any of its addresses,
    because a server need not listen on all.
    """
    said: dict[str, Attempt] = {}
    for one in attempts:
        known = said.get(one.host, one)
        said[one.host] = min(known, one, key=lambda it: isinstance(it.error, Unavailable))
    waits = [one for one in said.values() if isinstance(one.error, Unavailable)]
    lasting = [one for one in said.values() if isinstance(one.error, AnotherServer)] or list(said.values())
    chosen = min(waits, key=_rank) if waits else lasting[0]
    error = chosen.error
    others = [
        one.error.message if one.host != chosen.host else f"{one.address}: {one.error.message}"
        for one in attempts
        if one.error.message != error.message
    ]
    error.message = "; ".join([error.message, *dict.fromkeys(others)])
    error.beside = tuple(one.error for one in attempts if one.error is not error)
    return error


def _rank(attempt: Attempt) -> tuple[bool, bool, bool]:
    """Order the hosts: first one that serves those who are in, last one whose state the DSN does not ask for."""
    error = attempt.error
    return error.sqlstate not in STILL_RUNS, not attempt.inside, "target_session_attrs" in error.message


def refused(words: str, side: Side, where: str, *, host: str | None = None) -> CdcsyncError:
    """Return what a failed attempt to connect means: by its words, because libpq passes on no code.

    :param host: the host, if it is one of several.
    """
    refusal = explain(words, host=host)
    if refusal is None:
        hint = _REFUSED_FIX if REPORTED in words else None
        return unavailable(side, " ".join(words.split()), where=where, hint=hint)
    if refusal.lasting:
        return SetupError(refusal.message, where=where, hint=refusal.hint, sqlstate=refusal.sqlstate)
    return unavailable(side, refusal.message, where=where, hint=refusal.hint, sqlstate=refusal.sqlstate)
