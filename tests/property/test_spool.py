"""The spool against a model of a server that streams: what replays is what was written and not rolled back.

The model streams as PostgreSQL does: changes wait in memory until a block of them is sent; a subtransaction that rolls
back takes with it those it has released into itself; what was not sent yet is dropped in silence, and each
subtransaction of which something was sent gets a StreamAbort of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from cdcsync.source.spool import Spool

RECORD_BYTES = 4


class Subtransaction:
    """A transaction or subtransaction; it gets its id with its first write, after those around it."""

    def __init__(self, parent: Subtransaction | None) -> None:
        self.parent = parent
        self.released: list[Subtransaction] = []
        self.xid: int | None = None

    def with_released(self) -> list[Subtransaction]:
        return [below for child in self.released for below in child.with_released()] + [self]


class Server:
    """One session's open transaction, and what has been sent of it."""

    def __init__(self, spool: Spool, xids: count[int]) -> None:
        self.spool = spool
        self.xids = xids
        self.top = self.current = Subtransaction(None)
        self.unsent: list[tuple[int, bytes]] = []
        self.sent: list[tuple[int, bytes]] = []
        self.streamed: set[int] = set()
        self.xid = self.identify(self.top)

    def identify(self, one: Subtransaction) -> int:
        if one.xid is None:
            if one.parent is not None:
                self.identify(one.parent)
            one.xid = next(self.xids)
        return one.xid

    def write(self, payload: bytes) -> None:
        self.unsent.append((self.identify(self.current), payload))

    def savepoint(self) -> None:
        self.current = Subtransaction(self.current)

    def release(self) -> None:
        if self.current.parent is not None:
            self.current.parent.released.append(self.current)
            self.current = self.current.parent

    def send(self) -> None:
        self.spool.enter(self.xid)
        for xid, payload in self.unsent:
            self.spool.append(xid, payload)
        self.spool.leave()
        self.streamed |= {xid for xid, _ in self.unsent}
        self.sent += self.unsent
        self.unsent = []

    def roll_back(self, order: Sequence[float]) -> None:
        if self.current.parent is None:
            return
        gone = [one.xid for one in self.current.with_released() if one.xid is not None]
        self.current = self.current.parent
        self.unsent = [(xid, payload) for xid, payload in self.unsent if xid not in gone]
        self.sent = [(xid, payload) for xid, payload in self.sent if xid not in gone]
        # The server sends them by rising id, the one that rolled back last. Nothing here depends on it.
        told = sorted(self.streamed.intersection(gone), key=lambda xid: order[xid % len(order)])
        for xid in told:
            self.spool.abort(self.xid, xid)

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.sent]


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from([*["write", "send", "savepoint"] * 3, *["release", "roll back"] * 2, "end"]),
        st.sampled_from([b"", b"one", b"two", b"three"]),
    ),
    min_size=80,  # left to itself, hypothesis tries mostly short lists
    max_size=80,
)


@given(STEPS, st.permutations(range(5)))
def test_what_replays_is_what_was_sent_and_not_rolled_back(
    steps: list[tuple[int, str, bytes]], order: list[float]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        spool = Spool(directory, limit_bytes=10**6)
        xids = count(1)
        servers = [Server(spool, xids) for _ in range(2)]
        for at, step, payload in steps:
            server = servers[at]
            match step:
                case "write":
                    server.write(payload)
                case "send":
                    server.send()
                case "savepoint":
                    server.savepoint()
                case "release":
                    server.release()
                case "roll back":
                    server.roll_back(order)
                case _:
                    assert list(spool.replay(server.xid)) == server.payloads
                    spool.drop(server.xid)
                    servers[at] = Server(spool, xids)

            kept = [payload for one in servers for payload in one.payloads]
            assert spool.bytes == sum(map(len, kept)) + RECORD_BYTES * len(kept)
        for server in servers:
            assert list(spool.replay(server.xid)) == server.payloads
        spool.clear()
