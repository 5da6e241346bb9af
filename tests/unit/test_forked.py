"""Copies of a process that has imported everything are like processes that import it themselves."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cdcsync.process.crashpoints import VARIABLE
from tests.support import forked

AWAY = """
[source]
dsn = "postgresql://127.0.0.1:1/nowhere"
[embedders.fake]
type = "hash"
[indexes.articles]
table = "articles"
text = "{title}"
embedder = "fake"
"""


def test_a_copy_says_what_the_command_says_and_ends_as_it_ends(tmp_path: Path) -> None:
    for text, arguments in ((AWAY, ("config", "show")), ("nothing like it", ("check",))):
        (tmp_path / "cdcsync.toml").write_text(text)
        own = subprocess.run(
            [sys.executable, "-m", "cdcsync", *arguments],
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        copy = forked.run(*arguments, more={}, directory=tmp_path)
        assert (copy.returncode, copy.stdout, copy.stderr) == (own.returncode, own.stdout, own.stderr)


def test_a_copy_reads_what_it_is_given_and_finds_modules_where_its_environment_says(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("class Own:\n    identity, dimensions = 'own', 8\n")
    (tmp_path / "cdcsync.toml").write_text(
        AWAY.replace('type = "hash"', 'type = "python"\nclass = "own:Own"').replace("127.0.0.1:1", "${PGPASSWORD}:1")
    )
    config = str(tmp_path / "cdcsync.toml")
    more = {"CDCSYNC_CONFIG": config, "PGPASSWORD": "localhost", "PYTHONPATH": str(tmp_path)}

    assert "localhost:1/nowhere" in forked.run("config", "show", more=more, answer="nobody asks").stdout


def test_a_copy_that_is_killed_tells_by_what(tmp_path: Path) -> None:
    (tmp_path / "cdcsync.toml").write_text(AWAY)
    with Path(os.devnull).open("wb") as nothing:
        streams = (subprocess.DEVNULL, nothing, nothing)
        process = forked.start("cdcsync", ["run"], streams, more={}, directory=tmp_path, session=True)
    assert os.getsid(process.pid) == process.pid
    assert process.poll() is None

    process.kill()

    assert (process.wait(30), process.poll(), process.returncode) == (-signal.SIGKILL,) * 3


def test_a_copy_dies_at_its_crash_point(tmp_path: Path) -> None:
    point = {VARIABLE: "publication created"}
    (tmp_path / "cdcsync.toml").write_text(AWAY)
    code = "from cdcsync.process.crashpoints import crash_point; crash_point('publication created')"
    (tmp_path / "own.py").write_text(f"{code}\nclass Own:\n    identity, dimensions = 'own', 8\n")
    own = AWAY.replace('type = "hash"', 'type = "python"\nclass = "own:Own"')
    (tmp_path / "cdcsync.toml").write_text(own)

    assert forked.run("check", more=point, directory=tmp_path).returncode == -signal.SIGKILL
    assert forked.run("check", more={}, directory=tmp_path).returncode > 0


def test_what_is_read_by_an_import_needs_a_process_of_its_own() -> None:
    with Path(os.devnull).open("wb") as nothing:
        streams = (subprocess.DEVNULL, nothing, nothing)
        process = forked.start("cdcsync", ["--help"], streams, more={"OMP_NUM_THREADS": "1"})
    assert isinstance(process, subprocess.Popen)
    assert process.wait(60) == 0


@pytest.mark.proof
def test_what_the_libraries_of_models_set_where_they_are_imported_is_read_by_no_copy() -> None:
    importlib.import_module("sentence_transformers")
    importlib.import_module("ray")
    with Path(os.devnull).open("wb") as nothing:
        process = forked.start("cdcsync", ["--help"], (subprocess.DEVNULL, nothing, nothing), more={})
    assert isinstance(process, forked.Forked)
    assert process.wait(60) == 0
