"""Ctrl-C in a command: once for an orderly end, twice for one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import cdcsync

PROGRAM = """
import time
import anyio
from cdcsync.stopping import interruptible

async def command(stuck):
    try:
        print("ready", flush=True)
        while stuck:
            time.sleep(1)
        await anyio.sleep_forever()
    finally:
        print("cleaned up", flush=True)

try:
    anyio.run(interruptible, command, {stuck})
except KeyboardInterrupt:
    raise SystemExit(130)
"""


def start(*, stuck: bool) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(stuck=stuck)],
        env={**os.environ, "PYTHONPATH": str(Path(cdcsync.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_first_interrupt_says_so_and_ends_in_an_orderly_way() -> None:
    with start(stuck=False) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "cleaned up\n")
    assert said.strip() == "stopping; Ctrl-C again ends at once"


def test_the_second_interrupt_ends_at_once_what_does_not_stop() -> None:
    with start(stuck=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=30)
    assert (process.returncode, output, said) == (130, "", "")
