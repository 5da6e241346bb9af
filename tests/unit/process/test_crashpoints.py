"""Crash points: they kill where they are told to, and otherwise do nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cdcsync.process.crashpoints import VARIABLE

SCRIPT = """
from cdcsync.process.crashpoints import crash_point
for number in range(1, 4):
    crash_point("another point")
    print(number, flush=True)
    crash_point("batch committed")
"""


@pytest.mark.parametrize(
    ("order", "printed", "killed"),
    [
        (None, "1\n2\n3\n", False),
        ("batch committed", "1\n", True),
        ("batch committed#2", "1\n2\n", True),
        ("batch committed#3", "1\n2\n3\n", True),
        ("batch committed#4", "1\n2\n3\n", False),
        ("a third", "1\n2\n3\n", False),
        ("batch", "1\n2\n3\n", False),
    ],
)
def test_a_process_dies_at_the_point_that_is_named(order: str | None, printed: str, killed: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    if order is not None:
        environment[VARIABLE] = order
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (printed, -signal.SIGKILL if killed else 0), done.stderr
