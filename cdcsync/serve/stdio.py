"""Standard input that ends once nobody reads standard output, or once this process is told to stop.

The SDK reads in a thread, which cannot be stopped: a server whose answers are not taken, or that a signal ends, would
wait for another line. So it reads from a pipe. Another thread fills that, and watches both ends of the client and a
pipe of our own at the same time.

Source: POSIX, poll (POLLERR for a pipe without readers, POLLHUP for one without writers and for a socket whose peer is
closed).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator

GONE = select.POLLERR | select.POLLHUP

PART = 65_536
"""Bytes that are copied at a time: as many as a pipe holds on Linux."""


@contextlib.contextmanager
def one_client() -> Iterator[Callable[[], None]]:
    """Have descriptor 0 end in the body when its writer closes it, or when the reader of descriptor 1 is gone.

    Yields a function that ends it too; calls after the first do nothing.
    """
    source, output = os.dup(0), os.dup(1)
    reading, writing = os.pipe()
    told, telling = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    # A daemon: at the end of the process it may still wait for a client that stays.
    threading.Thread(target=relay, args=(source, writing, output, told), name="stdin", daemon=True).start()
    with open(telling, "wb", buffering=0) as held:
        try:
            yield held.close
        finally:
            os.dup2(source, 0)


def relay(source: int, sink: int, *watched: int) -> None:
    """Copy from one descriptor to another one until the source ends, or the peer of a watched one is gone.

    Then close the sink.

    :param watched: are not read or written. Files and terminals always have a peer.
    """
    poll = select.poll()
    poll.register(source, select.POLLIN)
    for descriptor in watched:
        poll.register(descriptor, 0)  # errors are told without being asked for
    with contextlib.suppress(BrokenPipeError), open(sink, "wb") as pipe:
        while True:
            ready = dict(poll.poll())
            if any(ready.get(descriptor, 0) & GONE for descriptor in watched):
                return
            if source in ready:
                data = os.read(source, PART)
                if not data:
                    return
                pipe.write(data)
                pipe.flush()
