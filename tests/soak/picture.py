"""A soak as an SVG: a panel for each thing that was measured, with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from tests.soak.series import Series

WIDTH, HEIGHT, COLUMNS = 340, 170, 3
LEFT, RIGHT, TOP, BOTTOM = 14, 14, 50, 22

STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; color: #1c2733; } text { fill: currentColor; }
.name { font-weight: 600; } .quiet { fill: #66717d; } .bad { fill: #b3261e; font-weight: 600; }
.values { stroke: #2f6fdd; fill: none; stroke-width: 1.2; } .trend { stroke: #c2571a; stroke-width: 2; }
@media (prefers-color-scheme: dark) { svg { background: #151b22; color: #e4e9ee; } .quiet { fill: #93a0ad; } }
"""


def draw(series: Sequence[Series]) -> str:
    """Return an SVG of what was measured."""
    rows = -(-len(series) // COLUMNS)
    width, height = WIDTH * min(COLUMNS, len(series)), HEIGHT * rows
    panels = "".join(
        f'<g transform="translate({WIDTH * (at % COLUMNS)} {HEIGHT * (at // COLUMNS)})">{"".join(_panel(one))}</g>'
        for at, one in enumerate(series)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img"><style>{STYLE}</style>{panels}</svg>\n'
    )


def _panel(one: Series) -> Iterator[str]:
    trend, (begin, _), (end, _) = one.trend, one.points[0], one.points[-1]
    first, last = trend.mean - trend.growth / 2, trend.mean + trend.growth / 2
    high = max(max(value for _, value in one.points), first, last, 1e-9) * 1.05

    def place(t: float, value: float) -> tuple[float, float]:
        across = LEFT + (t - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - max(0.0, value) / high * (HEIGHT - TOP - BOTTOM)

    verdict = "flat" if one.flat else "grows"
    yield f'<text class="name" x="{LEFT}" y="18">{escape(one.name)}</text>'
    yield (
        f'<text class="{"quiet" if one.flat else "bad"}" x="{LEFT}" y="34">{verdict}: mean {trend.mean:,.1f}'
        f" {escape(one.unit)}, {trend.growth:+,.1f} ± {trend.error:,.1f}</text>"
    )
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in one.points))
    yield f'<polyline class="values" points="{points}"/>'
    (x1, y1), (x2, y2) = place(begin, first), place(end, last)
    yield f'<line class="trend" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    scales = f"0 to {high:,.0f} {escape(one.unit)}, {end - begin:,.0f} s"
    yield f'<text class="quiet" x="{LEFT}" y="{HEIGHT - 6}">{scales}</text>'
