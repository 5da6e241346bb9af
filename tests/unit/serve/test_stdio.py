"""A client over standard input and output: its input is relayed, and it may go away at any moment."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from cdcsync.serve.stdio import PART, one_client, relay
from tests.support.workers import until

CONFIG = """
[source]
dsn = "postgresql://127.0.0.1:1/shop"

[embedders.hash]
type = "hash"

[indexes.articles]
table = "articles"
text = "{body}"
embedder = "hash"

[serve]
anonymous = true
"""


class Relayed:
    """A relay between two pipes, and what it watches: the end of a pipe or of a socket."""

    def __init__(self, output: int) -> None:
        source, self.client = os.pipe()
        self.server, sink = os.pipe()
        self.thread = threading.Thread(target=relay, args=(source, sink, output))
        self.thread.start()

    def rest(self) -> bytes:
        """Return what came, once it has ended."""
        with open(self.server, "rb") as pipe:
            came = pipe.read()
        self.thread.join()
        return came


def a_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    return writing, reading


def a_socket() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def test_input_comes_whole_and_ends_with_its_writer(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output:
        relayed = Relayed(output.fileno())
        sent = os.urandom(3 * PART + 1)

        def send() -> None:
            with open(relayed.client, "wb") as pipe:
                pipe.write(sent)

        sender = threading.Thread(target=send)
        sender.start()
        assert relayed.rest() == sent
        sender.join()


@pytest.mark.parametrize("channel", [a_pipe, a_socket])
def test_input_ends_when_nobody_reads_the_output(channel: Callable[[], tuple[int, int]]) -> None:
    output, reader = channel()
    relayed = Relayed(output)
    os.write(relayed.client, b"a line\n")
    with open(relayed.server, "rb", closefd=False) as pipe:
        assert pipe.readline() == b"a line\n"
    os.close(reader)
    assert relayed.rest() == b""
    for descriptor in (output, relayed.client):
        os.close(descriptor)


def test_standard_input_is_the_process_s_own_again_afterwards() -> None:
    def what() -> tuple[int, int]:
        found = os.fstat(0)
        return found.st_dev, found.st_ino

    before = what()
    with one_client():
        assert what() != before
    assert what() == before


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the middle of an answer, which is larger than the pipe that takes it."""
    path = tmp_path / "cdcsync.toml"
    path.write_text(CONFIG)
    process = subprocess.Popen(
        [sys.executable, "-m", "cdcsync", "serve", "--stdio", "-c", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    try:
        send(process.stdin, id=1, method="initialize", params=client)
        assert json.loads(process.stdout.readline())["id"] == 1
        send(process.stdin, method="notifications/initialized")
        for number in range(2, 12):
            send(process.stdin, id=number, method="tools/list", params={})
        until(lambda: waiting(process.stdout) > 0, "an answer")
        yield process
    finally:
        process.kill()
        with process:  # closes its pipes
            pass


def send(stdin: IO[bytes], **message: Any) -> None:
    stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    stdin.flush()


def waiting(pipe: IO[bytes] | None) -> int:
    """Return how many bytes wait to be read."""
    assert pipe is not None
    found = array.array("i", [0])
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, found)
    return found[0]


@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stdin"], ["stdin", "stdout"]], ids=" then ".join)
def test_a_client_that_goes_away_in_the_middle_of_an_answer_ends_the_server_without_an_error(
    serving: subprocess.Popen[bytes], closed: list[str]
) -> None:
    for name in closed:
        getattr(serving, name).close()
    assert serving.wait(60) == 0
    assert serving.stderr is not None
    assert [line for line in serving.stderr.read().splitlines() if not line.startswith(b"{")] == []
