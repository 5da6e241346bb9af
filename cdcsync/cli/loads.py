"""The first load as `run` shows it on a terminal: two bars for each index, then a line that says where to look on.

The log continues above the bars: its lines are printed by the same console (`log_stream`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, TextIO, cast

import anyio
import msgspec
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cdcsync.errors import CdcsyncError

if TYPE_CHECKING:
    from rich.console import Console

    from cdcsync.status import Status
    from cdcsync.status.model import IndexStatus

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


class Bar(msgspec.Struct, frozen=True):
    """A bar; `total` is None while it is not known, `note` says what happens after its end."""

    title: str
    done: int
    total: int | None
    note: str = ""


def bars(name: str, index: IndexStatus) -> list[Bar]:
    """Return the two bars of an index: rows read from its table, and vectors made of their texts."""
    load = index.backfill
    if load is not None and load.kind == "initial":
        rows = Bar(f"{name}: rows", load.rows_done, load.rows_total)
    else:
        # The load is over, and all rows are read; or has not begun.
        known = index.documents if index.state == "live" or index.chunks else None
        rows = Bar(f"{name}: rows", known or 0, known)
    built = index.state == "building" and load is None and 0 < index.chunks <= index.vectors
    note = "the HNSW index is being built" if built else ""
    return [rows, Bar(f"{name}: vectors", index.vectors, index.chunks or None, note)]


def log_stream(console: Console) -> TextIO:
    """Return what the log is written to, so that its lines stand above the bars."""
    return cast("TextIO", FileProxy(console, sys.stderr))


async def show_loads(worker: Worker, console: Console, host: str) -> None:
    """Show how far first loads are, until they are done; then say where the page is.

    :param host: where the page is served, with the port that the worker got.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    known: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        while True:
            try:
                status = await worker.status()
            except (CdcsyncError, TimeoutError):
                # The worker waits for the servers too, and its log says so.
                await anyio.sleep(READ_EVERY_S)
                continue
            if not worker.not_loaded():
                break
            for bar in (bar for name, index in status.indexes.items() for bar in bars(name, index)):
                if bar.title not in known:
                    known[bar.title] = progress.add_task(bar.title, total=None, note="")
                progress.update(known[bar.title], completed=bar.done, total=bar.total, note=bar.note)
            await anyio.sleep(READ_EVERY_S)
    counts = ", ".join(f"{name} ({index.documents or 0:,} rows)" for name, index in status.indexes.items())
    shown = f"[{host}]" if ":" in host else host
    console.print(f"searchable now: {counts}; http://{shown}:{worker.port}/ shows the progress", markup=False)
