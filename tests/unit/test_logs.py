"""Logging: one form for our own events and everyone else's, and nothing in it that a row holds."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import structlog

from cdcsync import logs


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


pytestmark = pytest.mark.usefixtures("logging_restored")


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)])
@pytest.mark.parametrize("own", [True, False], ids=["own", "a library's"])
def test_a_line_for_the_journal_begins_with_its_priority_and_no_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, priority: int, own: bool
) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        file = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino}")
        logs.configure("debug", "auto", stream)
        logger = structlog.get_logger() if own else logging.getLogger("library")
        getattr(logger, level)("happened")
        monkeypatch.setenv("JOURNAL_STREAM", f"{file.st_dev}:{file.st_ino + 1}")
        logs.configure("debug", "auto", stream)
        structlog.get_logger().warning("elsewhere")
        stream.seek(0)
        *written, elsewhere = stream.read().splitlines()
    assert [line[:3] for line in written] == ([f"<{priority}>"] if own or priority <= 4 else [])
    assert json.loads(elsewhere)["event"] == "elsewhere"
    assert all(json.loads(line[3:])["event"] == "happened" for line in written)


def test_an_event_is_a_line_of_json_that_begins_with_its_name() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    structlog.get_logger().info("batch_applied", rows=3, where="Zürich")
    (line,) = lines(stream)
    assert list(line)[:3] == ["event", "level", "timestamp"]
    assert line["event"] == "batch_applied"
    assert line["rows"] == 3
    assert line["timestamp"].endswith("Z")
    assert "Zürich" in stream.getvalue()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_name_can_neither_take_over_a_terminal_nor_look_like_another_line(format_: Any) -> None:
    stream = io.StringIO()
    logs.configure("info", format_, stream)
    hostile = "a\x1b[2Jb\x9b31mc\u202ed\n2026-01-01 [info] forged\r\x07"
    structlog.get_logger().info("index_paused", index=hostile, error="of " + hostile)
    logging.getLogger("library").warning("of %s", hostile)
    try:
        raise ValueError(hostile)
    except ValueError:
        structlog.get_logger().exception("failed", index=hostile)

    written = stream.getvalue()
    assert all(line.isprintable() for line in written.splitlines())
    assert not [line for line in written.splitlines() if line.startswith("2026-01-01")]
    assert written.count("forged") == 4
    assert "a·[2Jb·31mc·d" in written


def test_events_below_the_level_are_left_out() -> None:
    stream = io.StringIO()
    logs.configure("warning", "json", stream)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_loggers_made_before_the_configuration_follow_it() -> None:
    early = structlog.get_logger()
    early.debug  # noqa: B018 - binds it
    first, second = io.StringIO(), io.StringIO()
    logs.configure("info", "json", first)
    early.info("one")
    logs.configure("info", "json", second)
    early.info("two")
    assert [line["event"] for line in lines(first) + lines(second)] == ["one", "two"]


def test_in_an_application_without_structlog_events_go_to_the_standard_librarys_logging(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    structlog.reset_defaults()
    log = logs.get_logger()
    with caplog.at_level("INFO", logger="cdcsync"):
        log.info("lock_waits", table="a\nb")
        log.warning("table_locked", index="articles")
    assert [(one.name, one.levelname, one.getMessage()) for one in caplog.records] == [
        ("cdcsync", "INFO", r"lock_waits table='a\nb'"),
        ("cdcsync", "WARNING", "table_locked index='articles'"),
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("format_", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("console", io.StringIO(), False),
        ("json", Terminal(), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, io.StringIO) else str(value),
)
def test_the_format_is_for_people_on_a_terminal_unless_told(
    format_: logs.Format, stream: io.StringIO, is_json: bool
) -> None:
    logs.configure("info", format_, stream)
    structlog.get_logger().info("hello")
    assert stream.getvalue().startswith("{") is is_json
    assert "hello" in stream.getvalue()


def test_a_terminal_gets_colours_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured, plain = Terminal(), Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    logs.configure("info", "console", coloured)
    structlog.get_logger().info("hello")
    monkeypatch.setenv("NO_COLOR", "1")
    logs.configure("info", "console", plain)
    structlog.get_logger().info("hello")
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in plain.getvalue()


def test_what_libraries_log_has_the_same_form_and_begins_at_warning() -> None:
    stream = io.StringIO()
    logs.configure("debug", "json", stream)
    logging.getLogger("psycopg").info("row: %s", "a value")
    logging.getLogger("psycopg").warning("connection lost")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    logs.configure("info", "json", stream)
    logging.getLogger("psycopg").warning("query cancellation interrupted")
    library, warning = lines(stream)
    assert (library["event"], library["logger"]) == ("connection lost", "psycopg")
    assert warning["logger"] == "py.warnings"
    assert "old" in warning["event"]


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_traceback_shows_places_and_first_lines_and_no_values(format_: logs.Format) -> None:
    stream = io.StringIO()
    logs.configure("info", format_, stream)
    try:
        local = "a value"
        try:
            raise RuntimeError(f"duplicate key\nDETAIL: Key (name)=({local})")
        except RuntimeError as error:
            raise ExceptionGroup("tasks failed", [KeyError(local), ValueError(f"no {local}")]) from error
    except ExceptionGroup:
        structlog.get_logger().exception("it_failed")
    written = stream.getvalue()
    assert "builtins.RuntimeError: duplicate key" in written
    assert "the direct cause of" in written
    assert all(kind in written for kind in ("builtins.KeyError", "builtins.ValueError"))
    assert "test_logs.py" in written
    assert "a value" not in written


@pytest.mark.parametrize(
    ("message", "sqlstate", "shown"),
    [
        ('invalid input syntax for type integer: "secret"', "22P02", 'invalid input syntax for type integer: "…"'),
        ('value "7" is out of range for type smallint', "22003", 'value "…" is out of range for type smallint'),
        ('invalid input value for enum mood: "a "quoted" one"', "22P02", 'invalid input value for enum mood: "…"'),
        ("ungültige Eingabesyntax für Typ integer: »geheim«", "22P02", 'ungültige Eingabesyntax für Typ integer: "…"'),
        ("division by zero", "22012", "division by zero"),
        ('column "title" does not exist', "42703", 'column "title" does not exist'),
        ('connection to server at "host" failed', None, 'connection to server at "host" failed'),
    ],
)
def test_what_a_data_exception_quotes_is_left_out(message: str, sqlstate: str | None, shown: str) -> None:
    assert logs.without_quoted(message, sqlstate) == shown


class DataException(Exception):
    """As the driver raises it."""

    sqlstate = "22P02"


def test_a_traceback_shows_no_value_that_an_error_quotes() -> None:
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    try:
        raise DataException('invalid input syntax for type integer: "secret"')
    except DataException:
        structlog.get_logger().exception("broken")
    assert "secret" not in stream.getvalue()
    assert "invalid input syntax" in stream.getvalue()
