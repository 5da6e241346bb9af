"""Standard input that ends once nobody reads standard output: the client is gone, whichever of both it closed.

The SDK reads in a thread, which cannot be stopped: a server whose answers are not taken would wait for another line. So
it reads from a pipe. Another thread fills that, and sees both ends of the client at a time.

Source: POSIX, poll (POLLERR for a pipe without readers, POLLHUP for a socket whose peer is closed).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterator

GONE = select.POLLERR | select.POLLHUP

PART = 65_536
"""Bytes that are copied at a time: as many as a pipe holds on Linux."""


@contextlib.contextmanager
def one_client() -> Iterator[None]:
    """Have descriptor 0 end in the body when its writer closes it, or when the reader of descriptor 1 is gone."""
    source, output = os.dup(0), os.dup(1)
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    # A daemon: at the end of the process it may still wait for a client that stays.
    threading.Thread(target=relay, args=(source, writing, output), name="stdin", daemon=True).start()
    try:
        yield
    finally:
        os.dup2(source, 0)


def relay(source: int, sink: int, output: int) -> None:
    """Copy from one descriptor to another one until the source ends, or nobody reads a third one; then close the sink.

    :param output: is only watched. Files and terminals always have a reader.
    """
    poll = select.poll()
    poll.register(source, select.POLLIN)
    poll.register(output, 0)  # errors are told without being asked for
    with contextlib.suppress(BrokenPipeError), open(sink, "wb") as pipe:
        while True:
            ready = dict(poll.poll())
            if ready.get(output, 0) & GONE:
                return
            if source in ready:
                data = os.read(source, PART)
                if not data:
                    return
                pipe.write(data)
                pipe.flush()
