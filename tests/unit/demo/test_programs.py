"""A server's programs: found, run, and not taken for something else."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from pathlib import Path

import pytest

from cdcsync.demo.programs import Programs, embedded_bin_dir
from cdcsync.errors import SetupError


def program(directory: Path, name: str, script: str) -> Programs:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Programs(directory)


def test_the_version_is_read_from_the_server_itself() -> None:
    assert Programs(embedded_bin_dir()).version >= 15


def test_a_program_of_another_kind_is_not_a_server(tmp_path: Path) -> None:
    made = program(tmp_path, "postgres", "echo 'post office 3'")
    with pytest.raises(SetupError, match="not a PostgreSQL server") as caught:
        _ = made.version
    assert caught.value.where == str(tmp_path / "postgres")


def test_a_program_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    made = program(tmp_path, "initdb", "echo 'no room' >&2; exit 3")
    with pytest.raises(SetupError, match="initdb failed: no room"):
        made.run("initdb")


def test_a_program_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot run initdb: No such file"):
        Programs(tmp_path).run("initdb")


def test_programs_see_none_of_our_own_settings_of_libpq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    made = program(tmp_path, "show", 'echo "$PGPASSWORD|$LC_ALL|$HOME"')
    assert made.run("show") == "|C|/nonexistent\n"


def test_a_program_that_is_interrupted_ends_with_what_it_started(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    holders = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    made = program(tmp_path, "pg_basebackup", 'exec 9>"$1"; sleep 600 & echo started >&9; wait')
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        select.select([holders], [], [])
        paused = threading.Event()
        while not any(one.name == "communicate" for one in traceback.extract_stack(sys._current_frames()[main])):
            paused.wait(0.01)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            made.run("pg_basebackup", str(held))
    finally:
        interrupter.join()
        signal.signal(signal.SIGUSR1, before)
    assert os.read(holders, 100) == b"started\n"
    assert select.select([holders], [], [], 60)[0], "a process still holds it"
    assert os.read(holders, 100) == b""
    os.close(holders)
