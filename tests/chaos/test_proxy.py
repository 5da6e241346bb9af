"""The proxy of the histories: what a half-open connection looks like from either end."""

from __future__ import annotations

import socket

import pytest

from tests.chaos import proxy as proxies


def test_a_server_gives_up_a_half_open_session_whose_client_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "SERVER_NOTICES_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        proxy = proxies.Proxy(upstream.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            server, _ = upstream.accept()
            with server:
                client.sendall(b"a question")
                assert server.recv(16) == b"a question"
                (link,) = proxy.freeze()
                client.sendall(b"another")
                assert server.recv(16) == b""  # the end, and nothing of what was asked meanwhile
                client.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    client.recv(16)
                link.end()
        proxy.close()
