"""A TCP proxy on loopback that can cut, refuse or silently withhold what passes through it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, of no seconds: closing sends a reset, as a router does that forgot a connection."""


class Link:
    """One connection through the proxy, as two threads that copy bytes."""

    def __init__(self, proxy: Proxy, near: socket.socket, far: socket.socket) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.ended_at: float | None = None
        self._proxy = proxy
        self._sockets = (near, far)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not self.gate.is_set():
                    self._proxy.withheld += len(data)
                    self.gate.wait()
                sink.sendall(data)
        self.end()

    def end(self, *, reset: bool = False) -> None:
        if self.ended_at is None:
            self.ended_at = time.monotonic()
        self._proxy.links.discard(self)
        self.gate.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                one.shutdown(socket.SHUT_RDWR)
        for one in self._sockets:
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
            self.links.add(Link(self, near, far))

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
            link.gate.clear()
        return links

    def heal(self) -> None:
        """Take new connections. What is frozen stays frozen: a half-open connection never comes back."""
        self._refusing = False

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._listener.close()
        self.cut()
