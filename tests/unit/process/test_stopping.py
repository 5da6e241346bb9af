"""Ctrl-C in a command: once for an orderly end, twice for one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cdcsync

PROGRAM = """
import time
import anyio
from cdcsync.process.stopping import interruptible

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


TO_ANOTHER_THREAD = """
import signal, threading, time
import anyio
from cdcsync.process.stopping import interruptible

def interrupt():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

async def command():
    {before}
    threading.Thread(target=interrupt).start()
    await anyio.sleep_forever()

anyio.run(interruptible, command)
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("pass", "stopping; Ctrl-C again ends at once"),
        ("with anyio.open_signal_receiver(signal.SIGINT): pass", "KeyboardInterrupt"),
    ],
    ids=["at first", "after another handler"],
)
def test_an_interrupt_that_does_not_reach_the_loop_s_wait_ends_it_too(before: str, said: str) -> None:
    """As if it had come between the last look for signals and the wait, which a test cannot hit."""
    done = subprocess.run(
        [sys.executable, "-c", TO_ANOTHER_THREAD.format(before=before)],
        env={**os.environ, "PYTHONPATH": str(Path(cdcsync.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert said in done.stderr
    assert "KeyboardInterrupt" in done.stderr


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


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGTERM]])
@pytest.mark.parametrize("moment", ["while it imports", "while it waits for a server"])
def test_before_its_start_a_worker_that_is_told_to_stop_says_so_and_ends_well_and_a_reload_ends_nothing(
    tmp_path: Path, moment: str, signals: list[signal.Signals]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/nothing"
        configuration = tmp_path / "cdcsync.toml"
        configuration.write_text(
            f'[source]\ndsn = "{dsn}"\n[target]\ndsn = "{dsn}"\n[embedders.fake]\ntype = "hash"\n'
            '[indexes.a]\ntable = "public.a"\ntext = "{b}"\nembedder = "fake"\n'
        )
        options = ["-X", "importtime"] if moment == "while it imports" else []
        with subprocess.Popen(
            [sys.executable, *options, "-m", "cdcsync", "run", "-c", str(configuration)],
            env={**os.environ, "PYTHONPATH": str(Path(cdcsync.__file__).parents[1])},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # without a terminal, with which it would end at SIGHUP
        ) as process:
            assert process.stderr is not None
            with contextlib.ExitStack() as stack:
                if options:
                    while "cdcsync.cli.streams" not in process.stderr.readline():
                        pass
                else:
                    stack.enter_context(silent.accept()[0])
                for one in signals:
                    process.send_signal(one)
                said = process.stderr.read()
                assert process.wait(timeout=30) == 0
    assert "told to stop before the start" in said
