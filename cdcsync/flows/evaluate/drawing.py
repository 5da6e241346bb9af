"""Measurements as a picture: what is drawn, and where.

recall against latency     a point for each ef_search, and the exact search
modes                      a bar for each mode of search, with its interval if there is one
weights                    hybrid search by weight of the words
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cdcsync.flows.evaluate.pictures import Anchor, Shape, Style
from cdcsync.target.evaluations import Evaluation
from cdcsync.target.judged_runs import Run

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 48, 48
"""The margins around a panel's plot, for its title and the labels of its axes."""

Scale = Callable[[float], float]


def draw(evaluation: Evaluation | None, run: Run | None) -> tuple[list[Shape], int, int]:
    """Return the shapes of what was measured, a panel beside the other, and the picture's width and height."""
    panels: list[Iterator[Shape]] = []
    if evaluation is not None:
        panels.append(_recall(evaluation))
    if run is not None:
        panels.append(_modes(run))
        if run.weights:
            panels.append(_weights(run))
    shapes = [shape.moved(WIDTH * at) for at, panel in enumerate(panels) for shape in panel]
    return shapes, WIDTH * len(panels), HEIGHT


def _recall(found: Evaluation) -> Iterator[Shape]:
    points = [(one.mean_ms, one.recall, str(one.ef_search)) for one in found.measured]
    exact = (found.exact_mean_ms, 1.0, "exact")
    lowest = min(recall for _, recall, _ in points)
    across, up = _scales((0, 1.1 * max(ms for ms, *_ in [*points, exact])), (max(0, lowest - 0.05), 1))
    yield from _axes(
        f"{found.index}: recall@{found.k} by ef_search", "milliseconds of a search", (0, across), (lowest, up), points
    )
    yield Shape("line", "line", tuple((across(ms), up(recall)) for ms, recall, _ in points))
    for ms, recall, label in [*points, exact]:
        yield Shape("dot", "exact" if label == "exact" else "mark", ((across(ms), up(recall)),))
        yield _text(across(ms), up(recall) + 18, f"{label}", "middle", "quiet")


def _modes(run: Run) -> Iterator[Shape]:
    measure = run.measures[0]
    figures = [one.figures[measure] for one in run.modes.values()]
    most = max(max(figure.interval or (figure.mean,)) for figure in figures) or 1
    across, _ = _scales((0, most), (0, 1))
    yield _text(16, 26, f"{run.index}: {measure}, {run.queries} questions of {run.collection}", "start", "title")
    room = (HEIGHT - TOP - BOTTOM) / len(run.modes)
    for at, (mode, one) in enumerate(run.modes.items()):
        figure, middle = one.figures[measure], TOP + room * (at + 0.5)
        half = min(16, room / 3)
        yield _text(LEFT - 8, middle + 4, mode, "end")
        yield Shape("box", "bar", ((LEFT, middle - half), (across(figure.mean), middle + half)))
        if figure.interval is not None:
            low, high = figure.interval
            yield Shape("line", "whisker", ((across(low), middle), (across(high), middle)))
        yield _text(LEFT + 6, middle + 4, f"{figure.mean:.3f}", "start")
        yield _text(WIDTH - RIGHT, middle - half - 4, f"{one.mean_ms:.1f} ms", "end", "quiet")
    if any(figure.interval is not None for figure in figures):
        yield _text(LEFT, HEIGHT - 16, "lines: 95 % confidence", "start", "quiet")


def _weights(run: Run) -> Iterator[Shape]:
    measure = run.measures[0]
    points = [(one.weight, one.figures[measure].mean, "") for one in run.weights]
    means = [mean for _, mean, _ in points]
    across, up = _scales((0, 1), (min(means) - 0.01, max(means) + 0.01))
    yield from _axes(f"{run.index}: {measure} by weight of the words", "weight", (0, across), (min(means), up), points)
    yield Shape("line", "line", tuple((across(weight), up(mean)) for weight, mean, _ in points))
    for weight, mean, _ in points:
        yield Shape("dot", "mark", ((across(weight), up(mean)),))


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
) -> Iterator[Shape]:
    yield _text(16, 26, title, "start", "title")
    yield _text(WIDTH - RIGHT, HEIGHT - 10, label, "end", "quiet")
    for value in sorted({up[0], max(high for _, high, _ in points)}):
        y = up[1](value)
        yield Shape("line", "grid", ((LEFT, y), (WIDTH - RIGHT, y)))
        yield _text(LEFT - 8, y + 4, f"{value:.3f}", "end", "quiet")
    for value in (across[0], max(far for far, _, _ in points)):
        yield _text(across[1](value), HEIGHT - BOTTOM + 20, f"{value:.3g}", "middle", "quiet")


def _text(x: float, y: float, text: str, anchor: Anchor, style: Style = "plain") -> Shape:
    return Shape("text", style, ((x, y),), text, anchor)
