"""The process's log: one event a line on standard error, JSON for collectors or in colour for people.

Our own modules log events with names: by `structlog.get_logger()` or, where commands import them that log nothing, by
`get_logger` below. What others write to the standard library's logging or to `warnings` comes out in the same form, but
only from warning on: what libraries say below that can hold the values of cells. For the same reason tracebacks come
without local variables, and of an exception's message only the first line is shown: PostgreSQL puts the rows concerned
into the lines below it. What it quotes in the first line of a data exception is a value too, and is left out. So is
the whole message of Python's own exceptions about a value, which libraries raise with what a client has sent.

A line for systemd's journal begins with its priority, which the journal takes off: `journalctl -p warning` finds it.

Names of tables and columns are somebody else's, and may hold characters that a terminal acts on or that look like
another line of the log: they become dots, and only a traceback has lines.

Source: systemd, sd-daemon(3); systemd.exec(5), $JOURNAL_STREAM.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TextIO

from cdcsync.process.terminals import harmless

if TYPE_CHECKING:
    from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

_LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""The journal's numbers of the levels."""

_QUOTED = re.compile(r'["“„«»].*["”“»«]')
"""From the first quotation mark to the last: a value may hold some itself. Servers speak other languages as well."""

ABOUT_A_VALUE = (ValueError, LookupError)
"""Exceptions whose message is about a value, which it may hold: no word of it is shown."""

_FIRST = ("event", "level", "timestamp", "logger")
"""The keys that every line begins with: what happened, then how bad it is and when."""


def configure(level: Level = "info", format_: Format = "auto", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream`, standard error by default; a later call replaces an earlier one.

    :param level: the least severity of our own events; of other libraries' it is at least warning.
    :param format_: "auto" is console on a terminal and json elsewhere. Times are UTC in ISO 8601.
    """
    import structlog

    stream = stream or sys.stderr
    on_terminal = stream.isatty()
    console = format_ == "console" or (format_ == "auto" and on_terminal)
    renderer: Processor = (
        # NO_COLOR counts when it is set to anything but nothing (no-color.org).
        structlog.dev.ConsoleRenderer(
            colors=on_terminal and not os.environ.get("NO_COLOR"), exception_formatter=structlog.dev.plain_traceback
        )
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    )
    if _to_journal(stream):
        renderer = _with_priority(renderer)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_format_exception),
        _harmless,
    ]
    structlog.configure(
        processors=[*shared, _ordered, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        # Not cached: loggers are made at import, before the configuration is known.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _ordered, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(_LEVELS[level], logging.WARNING), force=True)
    logging.captureWarnings(capture=True)
    # The driver warns whenever a wait for a server is given up, which we do on purpose: at the end of a worker, and
    # when a table has changed. What else it says is in our errors.
    logging.getLogger("psycopg").setLevel(logging.NOTSET if level == "debug" else logging.CRITICAL)


def _to_journal(stream: TextIO) -> bool:
    """Say whether what is written to a stream goes straight to systemd's journal."""
    try:
        file = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream in memory
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def _with_priority(renderer: Processor) -> Processor:
    def render(logger: WrappedLogger, method: str, event: EventDict) -> str:
        return f"<{_PRIORITIES.get(str(event.get('level')), 6)}>{renderer(logger, method, event)!s}"

    return render


def get_logger() -> Any:
    """Return a logger that imports structlog with its first event: that takes as long as a short command.

    In an application that uses the package, and not structlog, events go to the logger `cdcsync` of the standard
    library's logging: structlog's own default is standard output, which may be the application's answer.
    """
    return _Logger()


class _Logger:
    def __getattr__(self, name: str) -> Any:
        import structlog

        return getattr(structlog.get_logger(), name) if structlog.is_configured() else partial(_tell, name)


def _tell(level: str, event: str, **facts: object) -> None:
    text = " ".join([event, *(f"{name}={fact!r}" for name, fact in facts.items())])
    getattr(logging.getLogger("cdcsync"), level)("%s", harmless(text))


class Told:
    """The last error of something that is done again and again: one that repeats is logged once."""

    def __init__(self) -> None:
        self._last: str | None = None

    def anew(self, error: Exception) -> bool:
        """Say whether this is another error than the last one, and remember it."""
        last, self._last = self._last, repr(error)
        return last != self._last

    def over(self) -> None:
        """Note that it succeeded, so that its next error is another one."""
        self._last = None


def without_quoted(message: str, sqlstate: str | None) -> str:
    """Return a server's message without what it quotes, where that is the value of a cell.

    Source: PostgreSQL, "PostgreSQL Error Codes", class 22, data exception.
    """
    return _QUOTED.sub('"…"', message) if sqlstate is not None and sqlstate.startswith("22") else message


def _harmless(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {
        key: harmless(value, lines=key == "exception") if isinstance(value, str) else value
        for key, value in event.items()
    }


def _ordered(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Put the keys that every line has in front."""
    first = {key: event[key] for key in _FIRST if key in event}
    return {**first, **event}


def _format_exception(exc_info: ExcInfo) -> str:
    """Return a traceback without values: places, kinds, and the first line of each message."""
    return "\n".join(_exception_lines(exc_info[1]))


def _exception_lines(error: BaseException) -> Iterator[str]:
    if error.__cause__ is not None:
        yield from _exception_lines(error.__cause__)
        yield "the direct cause of:"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}'
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    message = without_quoted(str(error).partition("\n")[0], getattr(error, "sqlstate", None))
    yield kind if isinstance(error, ABOUT_A_VALUE) else f"{kind}: {message}"
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _exception_lines(one)
