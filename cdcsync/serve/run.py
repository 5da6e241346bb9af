"""The process: serves until it is told to stop; calls that are being answered have a second to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import anyio
import structlog

from cdcsync.config import Config
from cdcsync.errors import Unavailable
from cdcsync.http.listening import STOP_TIMEOUT_S, Bounds, serve
from cdcsync.process import collector
from cdcsync.serve.calls import STORE_S
from cdcsync.serve.http import make_app
from cdcsync.serve.identity import not_signed_in_over_stdio
from cdcsync.serve.mcp import make_mcp, mcp_route
from cdcsync.serve.service import Service
from cdcsync.serve.stdio import one_client
from cdcsync.worker.descriptors import raise_descriptor_limit
from cdcsync.worker.systemd import ServiceManager

log = structlog.get_logger()

MOST_CONNECTIONS = 4_096
"""A connection costs some kilobytes. Who may call how often is decided once a request has been read."""

READING_S = 10.0
"""How long reading a request and writing its answer may take, besides the call's own deadline."""

LEAVING_S = STORE_S + STOP_TIMEOUT_S
"""How long a signal waits for the end of a server over standard input and output: the last calls are being stored.
Less than the 10 seconds that `docker stop` waits."""


async def run(
    config: Config,
    *,
    started: Callable[[int], None] | None = None,
    prepared: Callable[[Service], None] | None = None,
    handle_signals: bool = True,
) -> None:
    """Serve HTTP and MCP until SIGTERM or SIGINT.

    :param started: called with the port once connections are accepted.
    :param prepared: called with the service before it serves.
    :param handle_signals: the process is this server's: signals end it, systemd hears when it is ready, and the
        collector is set up for it.
    :raises SetupError: the address cannot be listened on, nobody could call, or the target refuses the login.
    """
    service = Service(config)
    service.authenticator.check()
    raise_descriptor_limit()
    if prepared is not None:
        prepared(service)
    host, port = config.serve.listen_address
    mcp = make_mcp(service)
    routes = [mcp_route(mcp, config.serve)]
    manager = ServiceManager.from_environment(os.environ) if handle_signals else None

    def bound(actual: int) -> None:
        log.info("serving", host=host, port=actual, indexes=list(service.reader.indexes))
        if manager is not None:
            manager.ready()
            manager.tell(STATUS=f"searches {', '.join(service.reader.indexes)} on port {actual}")
        if started is not None:
            started(actual)

    def stopping() -> None:
        if manager is not None:
            manager.tell(STOPPING=1)

    try:
        async with mcp.session_manager.run(), anyio.create_task_group() as tasks:
            tasks.start_soon(service.recorder.run)
            tasks.start_soon(_load, service, handle_signals)
            if handle_signals:
                tasks.start_soon(_stop_on_signal, tasks.cancel_scope, stopping)
            bounds = Bounds(MOST_CONNECTIONS, config.serve.deadline_s + READING_S)
            app = make_app(service, more=routes)
            await serve(app, host, port, bounds=bounds, setting="serve.listen", parser="httptools", started=bound)
            tasks.cancel_scope.cancel()
    finally:
        if manager is not None:
            manager.close()
        await service.aclose()


async def _load(service: Service, own_process: bool) -> None:
    await _meet_target(service)
    await service.reader.load()
    if own_process:
        collector.own()
        collector.keep()


async def _meet_target(service: Service) -> None:
    """See that the target lets this server in, as far as it answers now.

    :raises SetupError: it refuses the login: a wrong password, no such role or database.
    """
    with suppress(Unavailable):  # it may come back, and /readyz says that it is away
        await service.reader.ping()


async def run_stdio(config: Config) -> None:
    """Serve MCP over standard input and output, to the one client that started this process.

    The client is answered at once, even if the target is away or refuses the login: the tools say so. Once it is gone,
    or at SIGTERM or SIGINT, in the middle of a call or not, this returns. If it has not returned `LEAVING_S` after a
    signal, the process ends: the SDK may wait in a thread for the client to read an answer.

    :raises SetupError: nobody could call.
    """
    service = Service(config, candid=True)
    service.authenticator.refused = not_signed_in_over_stdio
    service.authenticator.check()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service.recorder.run)
            tasks.start_soon(service.reader.load)
            try:
                with one_client() as end_input:

                    def stopping() -> None:
                        end_input()
                        last = threading.Timer(LEAVING_S, os._exit, [0])
                        last.daemon = True
                        last.start()

                    tasks.start_soon(_stop_on_signal, tasks.cancel_scope, stopping)
                    await make_mcp(service, stdio=True).run_stdio_async()
            except* BrokenPipeError:  # an answer was under way to a client that is gone; tools raise nothing to here
                pass
            tasks.cancel_scope.cancel()
    finally:
        await service.aclose()


async def _stop_on_signal(scope: anyio.CancelScope, stopping: Callable[[], None]) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        number = await anext(signals)
        log.info("stopping", signal=signal.Signals(number).name)
        stopping()
        scope.cancel()
