"""A status for a terminal. Colour says only how something is; without it nothing is lost."""

from __future__ import annotations

from datetime import datetime

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cdcsync.status.model import BackfillStatus, IndexStatus, Status
from cdcsync.target.evaluations import Recall

UNKNOWN = "–"

_STATE_STYLES = {"live": "green", "building": "yellow", "paused": "red", "absent": "red"}


def render_table(status: Status) -> RenderableType:
    """Return the status as what `rich` prints: the pipeline, a table of its indexes, and the problems."""
    return Group(_pipeline(status), "", _indexes(status), "", *_notes(status))


def human_bytes(count: int) -> str:
    """Return a size in the unit that PostgreSQL would choose, 1024 to the next: `912 bytes`, `3.4 MB`."""
    if count < 1024:
        return f"{count} bytes"
    size, unit = count / 1024, "kB"
    for larger in ("MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a duration by its two largest units: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds else "0 s"
    left = round(seconds)
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min {left % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _pipeline(status: Status) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    grid.add_row("pipeline", Text(f"{status.pipeline}, publication {status.publication}"))
    worker = status.worker
    if worker.running:
        age = "" if worker.since is None else f" for {human_seconds((status.read_at - worker.since).total_seconds())}"
        grid.add_row("worker", Text.assemble(worker.name or "starting", " ", (f"runs{age}", "green")))
    else:
        grid.add_row("worker", Text("does not run", "red"))
    grid.add_row("checkpoint", status.checkpoint or UNKNOWN)
    grid.add_row("lag", _lag(status))
    grid.add_row("slot", _slot(status))
    return grid


def _lag(status: Status) -> Text:
    if status.lag_bytes is None:
        return Text(UNKNOWN)
    size = f"{human_bytes(status.lag_bytes)} of WAL"
    if status.caught_up:
        return Text.assemble(("caught up", "green"), f" to within {size}" if status.lag_bytes else "")
    behind = "" if status.lag_seconds is None else f"{human_seconds(status.lag_seconds)}, "
    return Text.assemble((f"{behind}{size}", "yellow"))


def _slot(status: Status) -> Text:
    slot = status.slot
    if slot is None:
        return Text(UNKNOWN)
    good = slot.wal_status in ("reserved", "extended")
    retained = UNKNOWN if slot.retained_bytes is None else human_bytes(slot.retained_bytes)
    if slot.safe_bytes is not None:
        safe = f"{human_bytes(max(0, slot.safe_bytes))} until it is lost"
    else:
        safe = "no limit" if good else ""
    words = [f"retains {retained}", *([safe] if safe else []), "being read" if slot.active else "not being read"]
    return Text.assemble((slot.wal_status or UNKNOWN, "green" if good else "red"), ", ", ", ".join(words))


def _indexes(status: Status) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("index", "state"):
        table.add_column(heading)
    for heading in ("documents", "chunks", "vectors", "backlog", "failed"):
        table.add_column(heading, justify="right")
    for name, index in status.indexes.items():
        table.add_row(name, Text(index.state, _STATE_STYLES[index.state]), *_figures(index))
    return table


def _figures(index: IndexStatus) -> list[str | Text]:
    if index.state == "absent":
        return [UNKNOWN] * 5
    about = "~" if index.estimated else ""
    return [
        UNKNOWN if index.documents is None else f"{index.documents:,}",
        f"{about}{index.chunks:,}",
        f"{about}{index.vectors:,}",
        f"{about}{index.backlog:,}",
        Text(f"{index.failed:,}", "red" if index.failed else ""),
    ]


def _fresh(index: IndexStatus) -> str:
    """Say what vectors outside of the HNSW index cost, and how fast they move into it."""
    moving = f"; {index.settle_rate:,.0f} a second move into the HNSW index" if index.settle_rate else ""
    return f"{index.fresh:,} fresh vectors add {index.fresh_scan_ms:g} ms to a search{moving}"


def _backfill(backfill: BackfillStatus) -> str:
    if backfill.phase == "orphans":
        return f"{backfill.kind} {backfill.state}: looking for rows that are gone from the source"
    done = f"{backfill.rows_done:,} rows"
    if backfill.rows_total:
        share = min(1.0, backfill.rows_done / backfill.rows_total)
        done = f"{share:.0%} of {backfill.rows_total:,} rows"
    rate = "" if backfill.rate is None else f", {backfill.rate:,.0f} rows/s"
    eta = "" if backfill.eta_s is None else f", {human_seconds(backfill.eta_s)} left"
    return f"{backfill.kind} {backfill.state}: {done}{rate}{eta}"


def _recall(recall: Recall, now: datetime) -> str:
    age = human_seconds(max(0.0, (now - recall.evaluated_at).total_seconds()))
    how = f"ef_search {recall.ef_search}" if recall.by_hnsw else "the whole table is read"
    return f"recall@{recall.k} {recall.recall:.3f} ({how}), measured {age} ago"


def _notes(status: Status) -> list[RenderableType]:
    """Return what needs a sentence: the backfills that are open, how well searches find, and the problems."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, index in status.indexes.items():
        if index.backfill is not None:
            grid.add_row("›", Text(f"{name}: {_backfill(index.backfill)}"))
        if index.proven_equal_at is not None:
            age = human_seconds(max(0.0, (status.read_at - index.proven_equal_at).total_seconds()))
            grid.add_row("›", Text(f"{name}: proven equal to the source {age} ago"))
        if index.fresh_scan_ms is not None:
            grid.add_row("›", Text(f"{name}: {_fresh(index)}"))
        if index.recall is not None:
            grid.add_row("›", Text(f"{name}: {_recall(index.recall, status.read_at)}"))
    for problem in status.problems:
        grid.add_row(Text("!", "bold red"), Text(problem))
    return [grid] if grid.row_count else []
