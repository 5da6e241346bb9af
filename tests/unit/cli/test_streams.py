"""Output that goes nowhere: a full disk, a reader that has seen enough, a stream that was closed from the start."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

import pytest

import cdcsync
from cdcsync import config
from cdcsync.cli import main
from tests.support.configs import NO_SERVER

FULL = Path("/dev/full")

PACKAGES = str(Path(cdcsync.__file__).parents[1])
"""Where the package is, for processes that run elsewhere: it need not be installed."""

needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture(autouse=True)
def _configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cdcsync.toml").write_text(NO_SERVER)
    monkeypatch.chdir(tmp_path)
    for name in ("CDCSYNC_CONFIG", "CDCSYNC_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def run(shell: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a shell starts it: `shell` says where "$@" gets its streams from."""
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "cdcsync", *arguments],
        env={**os.environ, "PYTHONPATH": PACKAGES},
        capture_output=True,
        text=True,
        check=False,
    )


def unread(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with a pipe as its output that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "cdcsync", *arguments],
            env={**os.environ, "PYTHONPATH": PACKAGES},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)


# What is printed by print, by rich and by typer; more and less than a buffer.
PRINTING = [["config", "show"], ["config", "schema"], ["check"], ["check", "--json"], ["--help"], ["--version"]]


@needs_full
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_output_that_cannot_be_written_is_an_error_with_its_cause(arguments: list[str]) -> None:
    done = run('exec "$@" >/dev/full', *arguments)
    assert done.returncode == 1
    what, where, fix = done.stderr.splitlines()
    assert what == f"error: cannot write the output: {os.strerror(errno.ENOSPC)}"
    assert where == "where: standard output"
    assert fix.startswith("fix:   make room")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_that_has_seen_enough_ends_the_command_quietly(arguments: list[str]) -> None:
    done = unread(*arguments)
    assert (done.returncode, done.stderr) == (141, "")


@needs_full
def test_a_failure_is_told_even_if_the_output_before_it_is_lost() -> None:
    done = run('exec "$@" >/dev/full', "status")
    assert done.returncode == 1
    assert "127.0.0.1" in done.stderr
    assert "cannot write" not in done.stderr


@needs_full
@pytest.mark.parametrize("streams", ["2>/dev/full", ">/dev/full 2>&1", "2>&-"])
def test_a_message_that_nobody_gets_leaves_the_exit_status_what_it_is(streams: str) -> None:
    assert run(f'exec "$@" {streams}', "check", "-c", "nosuch.toml").returncode == 2


@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-"])
def test_who_closes_the_output_wants_none(streams: str) -> None:
    done = run(f'exec "$@" {streams}', "config", "show")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_of_unicode_gets_the_numbers_of_what_it_lacks(encoding: str) -> None:
    done = run(f'PYTHONIOENCODING={encoding} exec "$@"', "check")
    assert done.returncode == 2
    assert r"\u2717 source (" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["config", "show"], ["check", "--json"], ["run"]], ids=" ".join)
def test_in_a_locale_that_lacks_characters_programs_read_the_same_text(tmp_path: Path, arguments: list[str]) -> None:
    text = NO_SERVER.replace("127.0.0.1:1/db", "127.0.0.1:1/größe✓")
    text += '[worker]\nstart_timeout_s = 0\nlog_format = "json"\n'
    (tmp_path / "cdcsync.toml").write_text(text, "utf-8")
    done = run('LC_ALL=C PYTHONUTF8=0 exec "$@"', *arguments)
    assert "this should not happen" not in done.stderr
    match arguments[0]:
        case "config":
            read = tomllib.loads(done.stdout)["source"]["dsn"]
        case "check":
            read = str(json.loads(done.stdout)["findings"])
        case _:
            read = str([json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")])
    assert "größe✓" in read


def test_a_full_disk_elsewhere_is_not_taken_for_lost_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(config, "load", fill)
    with pytest.raises(SystemExit):
        main(["config", "show"])
    assert "cannot write the output" not in capsys.readouterr().err


def test_the_streams_are_the_callers_again_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit):
        main(["--version"])
    assert (sys.stdout, sys.stderr) == before
