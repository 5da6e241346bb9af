"""Measurements as an SVG that a browser, a README or a report can show, in light and in dark.

recall against latency     a point for each ef_search, and the exact search
modes                      a bar for each mode of search, with its interval
weights                    hybrid search by weight of the words
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from cdcsync.target.evaluations import Evaluation
from cdcsync.target.judged_runs import Run

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 48, 48
"""The margins around a panel's plot, for its title and the labels of its axes."""

STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; color: #1c2733; }
.title { font-weight: 600; } .quiet { fill: #66717d; } text { fill: currentColor; }
.grid { stroke: #dde3e9; } .line { stroke: #2f6fdd; fill: none; stroke-width: 2; } .mark { fill: #2f6fdd; }
.bar { fill: #9dbcf2; } .whisker { stroke: #1d4fae; stroke-width: 2; } .exact { fill: #c2571a; }
@media (prefers-color-scheme: dark) {
svg { background: #151b22; color: #e4e9ee; } .quiet { fill: #93a0ad; } .grid { stroke: #2b3641; }
.bar { fill: #2b528f; } .whisker { stroke: #9dc1ff; } }
"""

Scale = Callable[[float], float]


def draw(evaluation: Evaluation | None, run: Run | None) -> str:
    """Return an SVG of what was measured: a panel beside the other."""
    panels = []
    if evaluation is not None:
        panels.append(_recall(evaluation))
    if run is not None:
        panels.append(_modes(run))
        if run.weights:
            panels.append(_weights(run))
    width = WIDTH * len(panels)
    drawn = "".join(f'<g transform="translate({WIDTH * at} 0)">{"".join(panel)}</g>' for at, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}"'
        f' role="img"><style>{STYLE}</style>{drawn}</svg>\n'
    )


def _recall(found: Evaluation) -> Iterator[str]:
    points = [(one.mean_ms, one.recall, str(one.ef_search)) for one in found.measured]
    exact = (found.exact_mean_ms, 1.0, "exact")
    lowest = min(recall for _, recall, _ in points)
    across, up = _scales((0, 1.1 * max(ms for ms, *_ in [*points, exact])), (max(0, lowest - 0.05), 1))
    yield from _axes(
        f"{found.index}: recall@{found.k} by ef_search", "milliseconds of a search", (0, across), (lowest, up), points
    )
    yield from _line([(across(ms), up(recall)) for ms, recall, _ in points])
    for ms, recall, label in [*points, exact]:
        kind = "exact" if label == "exact" else "mark"
        yield f'<circle class="{kind}" cx="{across(ms):.1f}" cy="{up(recall):.1f}" r="4"/>'
        yield _text(across(ms), up(recall) + 18, f"{label}", "middle", "quiet")


def _modes(run: Run) -> Iterator[str]:
    measure = run.measures[0]
    most = max(one.figures[measure].high for one in run.modes.values()) or 1
    across, _ = _scales((0, most), (0, 1))
    yield _text(16, 26, f"{run.index}: {measure}, {run.queries} questions of {run.collection}", "start", "title")
    room = (HEIGHT - TOP - BOTTOM) / len(run.modes)
    for at, (mode, one) in enumerate(run.modes.items()):
        figure, middle = one.figures[measure], TOP + room * (at + 0.5)
        half = min(16, room / 3)
        yield _text(LEFT - 8, middle + 4, mode, "end")
        yield (
            f'<rect class="bar" x="{LEFT}" y="{middle - half:.1f}" width="{across(figure.mean) - LEFT:.1f}"'
            f' height="{2 * half:.1f}"/>'
            f'<line class="whisker" x1="{across(figure.low):.1f}" x2="{across(figure.high):.1f}" y1="{middle:.1f}"'
            f' y2="{middle:.1f}"/>'
        )
        yield _text(LEFT + 6, middle + 4, f"{figure.mean:.3f}", "start")
        yield _text(WIDTH - RIGHT, middle - half - 4, f"{one.mean_ms:.1f} ms", "end", "quiet")
    yield _text(LEFT, HEIGHT - 16, "lines: 95 % confidence", "start", "quiet")


def _weights(run: Run) -> Iterator[str]:
    measure = run.measures[0]
    points = [(one.weight, one.figures[measure].mean, "") for one in run.weights]
    means = [mean for _, mean, _ in points]
    across, up = _scales((0, 1), (min(means) - 0.01, max(means) + 0.01))
    yield from _axes(f"{run.index}: {measure} by weight of the words", "weight", (0, across), (min(means), up), points)
    yield from _line([(across(weight), up(mean)) for weight, mean, _ in points])
    for weight, mean, _ in points:
        yield f'<circle class="mark" cx="{across(weight):.1f}" cy="{up(mean):.1f}" r="3"/>'


def _scales(across: tuple[float, float], up: tuple[float, float]) -> tuple[Scale, Scale]:
    """Return where a value lies, to the right and upwards."""

    def scale(ends: tuple[float, float], start: float, end: float) -> Scale:
        low, high = ends
        return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)

    return scale(across, LEFT, WIDTH - RIGHT), scale(up, HEIGHT - BOTTOM, TOP)


def _axes(
    title: str,
    label: str,
    across: tuple[float, Scale],
    up: tuple[float, Scale],
    points: Sequence[tuple[float, float, str]],
) -> Iterator[str]:
    yield _text(16, 26, title, "start", "title")
    yield _text(WIDTH - RIGHT, HEIGHT - 10, label, "end", "quiet")
    for value in sorted({up[0], max(high for _, high, _ in points)}):
        y = up[1](value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(LEFT - 8, y + 4, f"{value:.3f}", "end", "quiet")
    for value in (across[0], max(far for far, _, _ in points)):
        yield _text(across[1](value), HEIGHT - BOTTOM + 20, f"{value:.3g}", "middle", "quiet")


def _line(points: Sequence[tuple[float, float]]) -> Iterator[str]:
    yield f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
