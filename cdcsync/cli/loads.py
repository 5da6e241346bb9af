"""The first load as `run` shows it on a terminal: bars for each index, then a line that says where to look on.

The log continues above the bars: its lines are printed by the same console (`log_stream`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, TextIO, cast

import anyio
from rich.file_proxy import FileProxy
from rich.live import Live

from cdcsync.errors import CdcsyncError
from cdcsync.status import render_bars

if TYPE_CHECKING:
    from rich.console import Console

    from cdcsync.status import Status

READ_EVERY_S = 1.0
"""As often as the page reads."""


class Worker(Protocol):
    """The part of a worker that is shown."""

    port: int | None

    def not_loaded(self) -> list[str]:
        """Return which first loads have not come to their end."""
        ...

    async def status(self) -> Status:
        """Read the status."""
        ...


def log_stream(console: Console) -> TextIO:
    """Return what the log is written to, so that its lines stand above the bars."""
    return cast("TextIO", FileProxy(console, sys.stderr))


async def show_loads(worker: Worker, console: Console, host: str) -> None:
    """Show how far first loads are, until they are done; then say where the page is.

    :param host: where the page is served, with the port that the worker got.
    """
    live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    with live:
        while True:
            try:
                status = await worker.status()
            except (CdcsyncError, TimeoutError):
                # The worker waits for the servers too, and its log says so.
                await anyio.sleep(READ_EVERY_S)
                continue
            if not worker.not_loaded():
                live.update("", refresh=True)
                break
            live.update(render_bars(status) or "", refresh=True)
            await anyio.sleep(READ_EVERY_S)
    counts = ", ".join(f"{name} ({index.documents or 0:,} rows)" for name, index in status.indexes.items())
    shown = f"[{host}]" if ":" in host else host
    console.print(f"searchable now: {counts}; status page: http://{shown}:{worker.port}/", markup=False)
