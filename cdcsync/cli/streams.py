"""Standard output and standard error as commands have them: full, closed, or without a reader.

What a command prints is its result, so output that is not taken ends it, with an error of its own: the same number from
the operating system may also come from a file or a server. What it says on standard error, the worker's log above all,
is about its work and not the work, which continues without it.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from cdcsync.errors import CdcsyncError


class OutputLost(CdcsyncError):
    """Output could not be written, to a full disk for instance."""


class ReaderGone(OutputLost):
    """The reader of the output has closed it, as `head` does after its lines."""


class _Stream:
    """A text stream with its own answer to a write that fails; in all else the stream that it stands for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def give_up(self) -> None:
        """Discard unwritten and all further output: at its end the interpreter would try to write it, and complain."""
        with contextlib.suppress(OSError), open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), self._stream.fileno())

    def _failed(self, error: OSError) -> None:
        raise NotImplementedError


class _Output(_Stream):
    """Standard output.

    Writing to it raises `ReaderGone` or `OutputLost`, once; what is printed after that goes nowhere.
    """

    def _failed(self, error: OSError) -> None:
        self.give_up()
        if error.errno == errno.EPIPE:
            raise ReaderGone("nobody reads the output any more") from error
        raise OutputLost(
            f"cannot write the output: {error.strerror}",
            where="standard output",
            hint="make room where it goes, or send it somewhere else",
        ) from error


class _Diagnostics(_Stream):
    """Standard error, to which writing never fails.

    A worker that ended because its log is not taken would leave the index behind for want of a line. A full disk has
    room again later, and lines come out again then. A pipe whose reader ended, such as `tee`, stays closed, and so do
    systemd's streams after its journal was stopped, of which its manual says that services should ignore it
    (systemd-journald.service); a restart into the same pipe would end the same way. Metrics and status are served as
    before and tell how the worker does.
    """

    def finish(self) -> None:
        """Leave nothing behind that cannot be written: the exit status would be the interpreter's 120, and not ours."""
        try:
            self._stream.flush()
        except OSError:
            self.give_up()

    def _failed(self, error: OSError) -> None:
        if error.errno == errno.EPIPE:
            self.give_up()


def _numbered(error: UnicodeError) -> tuple[str, int]:
    r"""Write what an encoding lacks by its number, as `\u2713`: in JSON and TOML that is still the same text."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Run a block with both streams as above.

    :raises OutputLost: from whatever prints in it.
    """
    # Or the next file or connection would take the number of one that was closed, and what a library prints go there.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 # for as long as the process lives
    codecs.register_error("numbered", _numbered)
    for stream in (sys.stdout, sys.stderr):
        # In the C locale, standard output has "surrogateescape"; any other answer is one that somebody asked for.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="numbered")
    output, diagnostics = _Output(sys.stdout), _Diagnostics(sys.stderr)
    with (
        contextlib.redirect_stdout(cast("TextIO", output)),
        contextlib.redirect_stderr(cast("TextIO", diagnostics)),
    ):
        try:
            yield
        finally:
            diagnostics.finish()
