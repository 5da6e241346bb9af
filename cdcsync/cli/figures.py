"""The figures of `cdcsync evaluate`, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from cdcsync.flows.evaluate.audited import Gathered
    from cdcsync.flows.evaluate.gates import Verdict
    from cdcsync.target.evaluations import Evaluation
    from cdcsync.target.judged_runs import Figure, Run


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def print_gathered(gathered: Gathered) -> None:
    """Print what was gathered from the record, and what a person does with it."""
    from cdcsync.cli.printing import console

    lines = gathered.graded + gathered.ungraded
    out = console(wrap=True)
    out.print(
        f"{gathered.path}: {gathered.questions} questions, {lines} answers, {gathered.graded} graded", markup=False
    )
    if gathered.ungraded:
        out.print(
            "Set grade to 0 (does not answer it), 1 (answers it) or 2 (answers it well), then run this again.",
            markup=False,
        )


def print_recall(found: Evaluation, where: str | None, not_stored: str | None) -> None:
    """Print recall and milliseconds by ef_search."""
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console(wrap=True)
    condition = "" if where is None else f" where {plain(where)}"
    searches = "1 stored vector" if found.queries == 1 else f"{found.queries:,} stored vectors"
    out.print(Text(f"{found.index}, generation {found.generation}: the {found.k} nearest{condition} of {searches}"))
    table = _table("ef_search", f"recall@{found.k}", "mean ms", "p95 ms")
    table.add_column("by")
    for one in found.measured:
        by = "HNSW" if one.by_hnsw else "whole table"
        table.add_row(str(one.ef_search), f"{one.recall:.4f}", f"{one.mean_ms:.2f}", f"{one.p95_ms:.2f}", by)
    for one in found.measured:
        # They are the same unless there are fresh vectors, which are compared exactly.
        if one.settled_recall is not None and one.settled_mean_ms not in (None, one.mean_ms):
            alone = (f"{one.settled_recall:.4f}", f"{one.settled_mean_ms:.2f}")
            table.add_row(f"{one.ef_search} settled alone", *alone, "", "HNSW" if one.by_hnsw else "whole table")
    table.add_row("exact", "1.0000", f"{found.exact_mean_ms:.2f}", f"{found.exact_p95_ms:.2f}", "whole table")
    out.print(table)
    if not all(one.by_hnsw for one in found.measured):
        out.print("where it says so, the planner found it cheaper to read the whole table: nothing is missed then")
    if found.undirected:
        vectors = "1 vector is" if found.undirected == 1 else f"{found.undirected:,} vectors are"
        out.print(f"{vectors} all zeros: by cosine no search by vector finds them, searches by words do", markup=False)
    if not_stored is not None:
        out.print(f"not stored: {not_stored}", markup=False)


def print_answers(run: Run, number: int | None, not_stored: str | None, verdicts: Sequence[Verdict]) -> None:
    """Print how well each mode answers, by how much it differs from vectors, and what became of the gates."""
    from rich.text import Text

    from cdcsync.cli.printing import console, plain
    from cdcsync.flows.evaluate.intervals import FEWEST

    out = console(wrap=True)
    first, *others = run.measures
    out.print(
        Text(f"{run.index}, generation {run.generation}: {run.queries:,} judged questions of {plain(run.collection)}")
    )
    table = _table("mode", first, "over vector", *others, "ms")
    for mode, one in run.modes.items():
        gain = None if one.over_vector is None else one.over_vector[first]
        table.add_row(
            mode,
            f"{one.figures[first].mean:.4f} {_half(one.figures[first])}",
            "" if gain is None else f"{gain.mean:+.4f} {_half(gain)}",
            *(f"{one.figures[other].mean:.4f}" for other in others),
            f"{one.mean_ms:.1f}",
        )
    out.print(table)
    if any(one.figures[first].interval is None for one in run.modes.values()):
        out.print(f"too few questions to tell what is chance: an interval of 95 % takes {FEWEST}", markup=False)
    if run.weights:
        best = max(run.weights, key=lambda one: one.figures[first].mean)
        weights = _table("weight of words", first, "")
        for tried in run.weights:
            figure = tried.figures[first]
            mark = "best" if tried is best else ""
            weights.add_row(f"{tried.weight:g}", f"{figure.mean:.4f} {_half(figure)}", mark)
        out.print(weights)
    for verdict in verdicts:
        mark, style = ("✓", "green") if verdict.passed else ("✗", "bold red")
        out.print(Text.assemble((mark, style), f" {plain(verdict.text)}"))
    out.print(f"stored as run {number}" if not_stored is None else f"not stored: {not_stored}", markup=False)


def _half(figure: Figure) -> str:
    """Return half the width of the interval, if there is one; --json has both ends."""
    if figure.interval is None:
        return ""
    low, high = figure.interval
    return f"±{(high - low) / 2:.3f}"
