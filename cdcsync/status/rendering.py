"""A status for a terminal. Colour says only how something is; without it nothing is lost."""

from __future__ import annotations

from datetime import datetime

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cdcsync.status.durations import human_bytes, human_seconds
from cdcsync.status.generations import GenerationStatus
from cdcsync.status.model import BackfillStatus, Event, Freshness, IndexStatus, Progress, Status, Tone, Work
from cdcsync.target.evaluations import Recall

UNKNOWN = "–"
JUST_NOW = "just now"

_TONES: dict[Tone, str] = {"good": "green", "busy": "cyan", "warn": "yellow", "bad": "red"}
_WORK: dict[Work, str] = {"rows": "rows", "vectors": "vectors", "hnsw": "HNSW index"}
_BAR = 24
"""Characters of a bar: with the longest figures beside it, 80 columns are enough."""

_TABLES = 5
"""Tables of an index over many that are named: `--json` and the page have all."""

_EVENTS = 5
"""Events that are shown: the page has all."""

_STATE_STYLES = {"live": "green", "building": "yellow", "paused": "red", "absent": "red"}


def render_table(status: Status) -> RenderableType:
    """Return the status as what `rich` prints: the headline, the pipeline, its indexes and loads, and the problems."""
    parts = [*_head(status), _pipeline(status), "", _Indexes(status), ""]
    if bars := render_bars(status):
        parts += [bars, ""]
    return Group(*parts, *_notes(status), *_events(status))


def render_bars(status: Status) -> RenderableType | None:
    """Return a bar for each part of each load in progress, with the time left; None when nothing is being loaded."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, overflow="ellipsis")
    grid.add_column(no_wrap=True)
    grid.add_column(width=_BAR)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    for name, index in status.indexes.items():
        for at, part in enumerate(index.progress):
            total = 100.0 if part.total is None else float(part.total)
            done = 0.0 if part.total is None else float(min(part.done, part.total))
            bar = ProgressBar(total=total, completed=done, width=_BAR)
            grid.add_row("" if at else name, _WORK[part.what], bar, _of(part), _left(part))
    return grid if grid.row_count else None


def _of(part: Progress) -> str:
    if part.total is None:
        return f"{part.done:,}"
    share = int(100 * min(1.0, part.done / part.total)) if part.total else 100
    return f"{share}% of {part.total:,}"


def _left(part: Progress) -> str:
    if part.total is not None and part.done >= part.total:
        return "done"
    return "" if part.eta_s is None else f"{human_seconds(part.eta_s)} left"


def _head(status: Status) -> list[RenderableType]:
    """Return how the index that is worst off is."""
    head = status.headline
    if head is None:
        return []
    of = f"{head.index}: " if head.index is not None and (len(status.indexes) > 1 or head.tone == "bad") else ""
    return [Text.assemble(("● ", _TONES[head.tone]), (of + head.words, f"bold {_TONES[head.tone]}")), ""]


def _pipeline(status: Status) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    grid.add_row("pipeline", Text(f"{status.pipeline}, publication {status.publication}"))
    worker = status.worker
    if worker.waits is not None:
        grid.add_row("worker", Text.assemble(worker.name or "", " ", ("waits, see below", "yellow")))
    elif worker.running:
        seconds = 0.0 if worker.since is None else (status.read_at - worker.since).total_seconds()
        age = f" for {human_seconds(seconds)}" if seconds >= 1 else ""
        grid.add_row("worker", Text.assemble(worker.name or "starting", " ", (f"runs{age}", "green")))
    elif worker.running is None:
        grid.add_row("worker", UNKNOWN)
    else:
        grid.add_row("worker", Text("does not run", "red"))
    if status.standby:
        grid.add_row("target", "a standby: who holds locks, and since when the worker runs, only its primary shows")
    grid.add_row("checkpoint", status.checkpoint or UNKNOWN)
    grid.add_row("lag", _lag(status))
    grid.add_row("slot", _slot(status))
    if status.page is not None:
        searchable = [name for name, index in status.indexes.items() if index.state == "live"]
        now = f"; searchable now: {', '.join(searchable)}" if searchable else ""
        grid.add_row("page", Text(f"{status.page}{now}"))
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


_FIGURES = ("documents", "chunks", "vectors", "backlog", "failed")


class _Indexes:
    """The indexes as a table, or where it would not fit, each by itself: a heading that is cut says nothing."""

    def __init__(self, status: Status) -> None:
        self._indexes = status.indexes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
            yield table
            return
        for name, index in self._indexes.items():
            yield Text.assemble((name, "bold"), "  ", (index.state, _STATE_STYLES[index.state]))
            told = [
                Text.assemble(f"{heading} ", figure) for heading, figure in zip(_FIGURES, _figures(index), strict=True)
            ]
            yield Padding(Text(", ").join(told), (0, 0, 0, 2))

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for heading in ("index", "state"):
            table.add_column(heading, no_wrap=True)
        for heading in _FIGURES:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, index in self._indexes.items():
            table.add_row(name, Text(index.state, _STATE_STYLES[index.state]), *_figures(index))
        return table


def _figures(index: IndexStatus) -> list[str | Text]:
    if index.state == "absent" or index.unreadable is not None:
        return [UNKNOWN] * 5
    about = "~" if index.estimated else ""
    return [
        UNKNOWN if index.documents is None else f"{index.documents:,}",
        f"{about}{index.chunks:,}",
        f"{about}{index.vectors:,}",
        f"{about}{index.backlog:,}",
        Text(f"{index.failed:,}", "red" if index.failed else ""),
    ]


def _rows(index: IndexStatus) -> str:
    """Say which tables an index over many is made of, and which rows it has, if not all of one table."""
    parts = []
    if index.tables:
        named = ", ".join(index.tables[:_TABLES])
        more = f" and {len(index.tables) - _TABLES:,} more" if len(index.tables) > _TABLES else ""
        parts.append(f"{len(index.tables):,} tables match {index.table}: {named}{more}")
    if index.where is not None:
        parts.append(f"rows where {' '.join(index.where.split())}")
    return "; ".join(parts)


def _fresh(index: IndexStatus) -> str:
    """Say what vectors outside of the HNSW index cost, and how fast they move into it."""
    moving = f"; {index.settle_rate:,.0f} a second move into the HNSW index" if index.settle_rate else ""
    return f"{index.fresh:,} fresh vectors add {index.fresh_scan_ms:g} ms to a search{moving}"


def _discarded(name: str, index: IndexStatus) -> str:
    """Say how many chunks have no vector because their text was discarded, and what shows which."""
    chunks = "1 chunk has" if index.discarded == 1 else f"{index.discarded:,} chunks have"
    return f"{chunks} no vector, as the text was discarded: cdcsync failures {name} list --discarded"


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


def _generation(one: GenerationStatus) -> str:
    """Say what a generation is, how far it is and how good."""
    share = min(1.0, one.vectors / one.chunks) if one.chunks else 1.0
    filled = "" if share == 1.0 else f", {share:.0%} of {one.chunks:,} chunks"
    left = "" if one.eta_s is None else f", {human_seconds(one.eta_s)} left"
    failed = f", {one.failed:,} failed" if one.failed else ""
    failed += f", {one.discarded:,} discarded" if one.discarded else ""
    recall = "" if one.recall is None else f", recall {one.recall:.3f}"
    made = f"{one.embedder or one.model}, {one.vector_type}({one.dimensions}), {one.distance}"
    return f"generation {one.generation} {one.state}: {made}{filled}{left}{failed}{recall}, {human_bytes(one.bytes)}"


def _recall(recall: Recall, now: datetime) -> str:
    how = f"ef_search {recall.ef_search}" if recall.by_hnsw else "the whole table is read"
    return f"recall@{recall.k} {recall.recall:.3f} ({how}), measured {_ago(recall.evaluated_at, now)}"


def _freshness(index: IndexStatus) -> str:
    """Say how soon changes are found, by words and by meaning, and draw the last 15 minutes."""
    parts = []
    for what, found in (("by words", index.text_freshness), ("by meaning", index.vector_freshness)):
        if found is not None and found.p50_s is not None and found.p99_s is not None:
            parts.append(
                f"{what} after {human_seconds(found.p50_s)} (p99 {human_seconds(found.p99_s)}) {_strip(found)}"
            )
    return f"changes are found {', '.join(parts)}"


def _strip(found: Freshness) -> str:
    """Draw the slots' 99th percentiles, four slots (a minute) a character, the oldest first."""
    levels = "▁▂▃▄▅▆▇█"
    worst = [max((slot[-1] for slot in found.strip[at : at + 4] if slot), default=None) for at in range(0, 60, 4)]
    top = max((one for one in worst if one is not None), default=0.0) or 1.0
    return "".join(" " if one is None else levels[min(7, int(8 * one / top))] for one in worst).lstrip()


def _events(status: Status) -> list[RenderableType]:
    """Return the latest events, with since when."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for event in status.events[:_EVENTS]:
        of = "" if event.index is None else f"{event.index}: "
        # A problem says at length what to do, and stands above.
        words = event.words if len(event.words) <= 100 else f"{event.words[:99]}…"
        grid.add_row(Text(_when(event, status.read_at), _TONES[event.tone]), Text(f"{of}{words}"))
    return ["", Text("events", "bold"), grid] if grid.row_count else []


def _when(event: Event, now: datetime) -> str:
    ago = _ago(event.since, now)
    if event.until is None:
        return ago if ago == JUST_NOW else f"for {ago.removesuffix(' ago')}"
    took = (event.until - event.since).total_seconds()
    return ago if took < 1 else f"{ago}, for {human_seconds(took)}"


def _ago(then: datetime, now: datetime) -> str:
    seconds = (now - then).total_seconds()
    return f"{human_seconds(seconds)} ago" if seconds >= 1 else JUST_NOW


def _but_for(undecided: int) -> str:
    """Return what a proof does not hold for, as the end of a sentence."""
    if not undecided:
        return ""
    return f", but for {undecided:,} document{'s' * (undecided > 1)} that changed each time the audit looked"


def _notes(status: Status) -> list[RenderableType]:
    """Return what needs a sentence: the backfills that are open, how well searches find, and the problems."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, index in status.indexes.items():
        if index.related_tables:
            tables = ", ".join([*filter(None, [index.table]), *index.related_tables])
            grid.add_row("›", Text(f"{name}: made of the tables {tables}"))
        if rows := _rows(index):
            grid.add_row("›", Text(f"{name}: {rows}"))
        if index.backfill is not None and not any(part.what == "rows" for part in index.progress):
            grid.add_row("›", Text(f"{name}: {_backfill(index.backfill)}"))
        if index.text_freshness is not None or index.vector_freshness is not None:
            grid.add_row("›", Text(f"{name}: {_freshness(index)}"))
        if index.proven_equal_at is not None:
            age = _ago(index.proven_equal_at, status.read_at)
            grid.add_row("›", Text(f"{name}: proven equal to the source {age}{_but_for(index.undecided)}"))
        if index.discarded:
            grid.add_row("›", Text(f"{name}: {_discarded(name, index)}"))
        if index.fresh_scan_ms is not None:
            grid.add_row("›", Text(f"{name}: {_fresh(index)}"))
        if index.recall is not None:
            grid.add_row("›", Text(f"{name}: {_recall(index.recall, status.read_at)}"))
        for one in index.generations:
            grid.add_row("›", Text(f"{name}: {_generation(one)}"))
    for problem in status.problems:
        grid.add_row(Text("!", "bold red"), Text(problem))
    return [grid] if grid.row_count else []
