"""A client over standard input and output: its input is relayed, and it may go away at any moment."""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
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
audit_days = 0
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


def test_input_ends_when_this_process_says_so_although_its_client_stays() -> None:
    own, (reading, client) = os.dup(0), os.pipe()
    os.dup2(reading, 0)
    try:
        with one_client() as end_input:
            end_input()
            assert os.read(0, 1) == b""
            end_input()
    finally:
        os.dup2(own, 0)
        for descriptor in (own, reading, client):
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
def connected(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server and its client, over pipes that hold less than an answer."""
    path = tmp_path / "cdcsync.toml"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a call takes as long as its deadline
        path.write_text(CONFIG.replace("127.0.0.1:1/", f"127.0.0.1:{silent.getsockname()[1]}/"))
        process = subprocess.Popen(
            [sys.executable, "-m", "cdcsync", "serve", "--stdio", "-c", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pipesize=4096,
        )
        assert process.stdin is not None
        client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        try:
            send(process.stdin, id=1, method="initialize", params=client)
            assert answered(process) == 1
            send(process.stdin, method="notifications/initialized")
            yield process
        finally:
            process.kill()
            with process:  # closes its pipes
                pass


@pytest.fixture
def serving(connected: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """A server in the middle of an answer, which is larger than the pipe that takes it."""
    assert connected.stdin is not None
    for number in range(2, 12):
        send(connected.stdin, id=number, method="tools/list", params={})
    until(lambda: waiting(connected.stdout) > 0, "an answer")
    return connected


def send(stdin: IO[bytes], **message: Any) -> None:
    stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    stdin.flush()


def answered(process: subprocess.Popen[bytes]) -> Any:
    """Return the number of the message that is answered next."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())["id"]


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
    assert unplanned(serving) == []


def unplanned(process: subprocess.Popen[bytes]) -> list[bytes]:
    """Return what an ended server said besides its log."""
    assert process.stderr is not None
    return [line for line in process.stderr.read().splitlines() if not line.startswith(b"{")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_the_server_in_order_while_its_client_stays(
    connected: subprocess.Popen[bytes], busy: bool, number: signal.Signals
) -> None:
    assert connected.stdin is not None
    if busy:
        send(connected.stdin, id=2, method="tools/call", params={"name": "list_indexes", "arguments": {}})
    send(connected.stdin, id=3, method="ping")
    assert answered(connected) == 3
    connected.send_signal(number)
    assert connected.wait(60) == 0
    assert unplanned(connected) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.proof)])
def test_a_signal_ends_the_server_although_its_client_does_not_read_an_answer(
    serving: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    serving.send_signal(number)
    assert serving.wait(60) == 0
    assert unplanned(serving) == []
