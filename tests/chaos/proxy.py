"""A TCP proxy on loopback that can cut, refuse or silently withhold what passes through it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, of no seconds: closing sends a reset, as a router does that forgot a connection."""

SERVER_NOTICES_S = 60.0
"""So long a server keeps a session whose client says nothing at all: its keepalives, as the worker sets them."""


_REQUESTS = (80877103, 80877104)
"""Codes of what a client may ask before its startup message: encryption by TLS, or by GSSAPI."""


class Link:
    """One connection through the proxy, as two threads that copy bytes."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.ended_at: float | None = None
        self.sent = 0
        """Bytes that the client has sent."""
        self._proxy = proxy
        self._near, self._far = near, far
        self._head = b""
        self._startup: bytes | None = None
        """The client's startup message, once it has come."""
        self._asked: threading.Event | None = None
        """Set once the server has answered what `ask` sent."""
        self._own = b""
        proxy.links.add(self)  # before anything passes
        threading.Thread(target=self._send, daemon=True).start()
        threading.Thread(target=self._answer, daemon=True).start()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._near.recv(1 << 16):
                if self._startup is None:
                    self._look_for_startup(data)
                self._wait(data)
                self._far.sendall(data)
                self.sent += len(data)
        self._hang_up()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._far.recv(1 << 16):
                self._wait(data)
                self._near.sendall(self._without_own(data))
        self._hang_up()

    def _hang_up(self) -> None:
        """One end is gone: the other one learns of it unless nothing is forwarded."""
        self.ended_at = self.ended_at or time.monotonic()
        self.gate.wait()
        self.end()

    def _wait(self, data: bytes) -> None:
        if not self.gate.is_set():
            self._proxy.withheld += len(data)
            self.gate.wait()

    def _look_for_startup(self, data: bytes) -> None:
        self._head += data
        while len(self._head) >= 8:
            length, code = struct.unpack_from(">II", self._head)
            if code not in _REQUESTS:
                if len(self._head) >= length:
                    self._startup = self._head[:length]
                return
            self._head = self._head[length:]

    def ask(self, statement: str, patience_s: float = 30.0) -> bool:
        """Run a statement in the client's session, which must be idle, without the client's knowledge.

        :returns: whether it was run: a replication connection takes none, a session may have ended, and a connection
            that forwards nothing brings no answer; one of an earlier history may stay so for good.
        """
        if (
            not self.gate.is_set()
            or self.ended_at is not None
            or self._startup is None
            or b"\0replication\0" in self._startup
        ):
            return False
        query = statement.encode() + b"\0"
        self._asked = threading.Event()
        self._own = b""
        self._far.sendall(b"Q" + struct.pack(">I", 4 + len(query)) + query)
        return self._asked.wait(patience_s) and self.ended_at is None

    def _without_own(self, data: bytes) -> bytes:
        """Return what of an answer is the client's: nothing, until the server is ready for the next statement."""
        if self._asked is None or self._asked.is_set():
            return data
        self._own += data
        while len(self._own) >= 5 and len(self._own) > (length := struct.unpack_from(">I", self._own, 1)[0]):
            kind, self._own = self._own[:1], self._own[1 + length :]
            if kind == b"Z":
                self._asked.set()
                return self._own
        return b""

    def freeze(self) -> None:
        """Forward nothing from now on. The client hears nothing for ever; the server gives the session up in time."""
        self.gate.clear()
        giving_up = threading.Timer(SERVER_NOTICES_S, self._give_up)
        giving_up.daemon = True
        giving_up.start()

    def _give_up(self) -> None:
        if not self.gate.is_set():
            with contextlib.suppress(OSError):
                self._far.shutdown(socket.SHUT_RDWR)

    def end(self, *, reset: bool = False) -> None:
        self.ended_at = self.ended_at or time.monotonic()
        self._proxy.links.discard(self)
        self.gate.set()
        for one in (self._near, self._far):
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                one.shutdown(socket.SHUT_RDWR)
        for one in (self._near, self._far):
            with contextlib.suppress(OSError):
                one.close()


class Proxy:
    """Forwards connections to a port of this machine, which may change."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.links: set[Link] = set()
        self.withheld = 0
        """Bytes that came in while nothing was forwarded."""
        self._refusing = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.upstream), timeout=30)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            Link(self, near, far)

    def cut(self) -> int:
        """Reset every connection and return how many there were; new ones are taken at once."""
        links = list(self.links)
        for link in links:
            link.end(reset=True)
        return len(links)

    def refuse(self) -> int:
        """Cut every connection and refuse new ones until `heal`; returns how many were cut."""
        self._refusing = True
        return self.cut()

    def freeze(self) -> list[Link]:
        """Stop forwarding on the connections that are open, without closing them; returns them."""
        self.withheld = 0
        links = list(self.links)
        for link in links:
            link.freeze()
        return links

    def heal(self) -> None:
        """Take new connections. What is frozen stays frozen: a half-open connection never comes back."""
        self._refusing = False

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._listener.close()
        self.cut()
