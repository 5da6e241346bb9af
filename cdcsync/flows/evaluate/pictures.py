"""Shapes, and the two forms of a picture that they become: SVG, in light and in dark, and PNG.

An SVG is for a browser, a README or a report. A PNG, which Pillow draws, is for what shows no SVG: chats, mail, most
word processors.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable
from html import escape
from types import ModuleType
from typing import Any, Literal, assert_never

import msgspec

from cdcsync.errors import SetupError

FONT_SIZE = 13
DOT = 4
"""The radius of a dot."""

SCALE = 2
"""Pixels of a PNG for each unit: a screen of today has two."""

Style = Literal["plain", "title", "quiet", "grid", "line", "mark", "bar", "whisker", "exact"]

Anchor = Literal["start", "middle", "end"]

LIGHT: dict[Style, str] = {
    "plain": "#1c2733",
    "title": "#1c2733",
    "quiet": "#66717d",
    "grid": "#dde3e9",
    "line": "#2f6fdd",
    "mark": "#2f6fdd",
    "bar": "#9dbcf2",
    "whisker": "#1d4fae",
    "exact": "#c2571a",
}
DARK: dict[Style, str] = {
    "plain": "#e4e9ee",
    "title": "#e4e9ee",
    "quiet": "#93a0ad",
    "grid": "#2b3641",
    "bar": "#2b528f",
    "whisker": "#9dc1ff",
}
PAPER, PAPER_DARK = "#ffffff", "#151b22"
WIDTHS: dict[Style, int] = {"grid": 1, "line": 2, "whisker": 2}


class Shape(msgspec.Struct, frozen=True):
    """A part of a picture.

    :ivar points: of a line, any number; of a box, two corners; of a dot and of a text, its place.
    :ivar anchor: which part of a text is at its place; the text stands on it.
    """

    kind: Literal["line", "box", "dot", "text"]
    style: Style
    points: tuple[tuple[float, float], ...]
    text: str = ""
    anchor: Anchor = "start"

    def moved(self, across: float) -> Shape:
        """Return the shape, so far to the right."""
        return msgspec.structs.replace(self, points=tuple((x + across, y) for x, y in self.points))


def svg(shapes: Iterable[Shape], width: int, height: int) -> str:
    """Return shapes as an SVG."""

    def rules(colors: dict[Style, str]) -> str:
        return " ".join(f".{style} {{ fill: {color}; stroke: {color}; }}" for style, color in colors.items())

    widths = " ".join(f".{style} {{ stroke-width: {width}; fill: none; }}" for style, width in WIDTHS.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img"><style>svg {{ font: {FONT_SIZE}px system-ui, sans-serif; background: {PAPER}; }}'
        f" {rules(LIGHT)} @media (prefers-color-scheme: dark) {{ svg {{ background: {PAPER_DARK}; }} {rules(DARK)} }}"
        f" {widths} text, rect, circle {{ stroke: none; }} .title {{ font-weight: 600; }}</style>"
        f"{''.join(map(_element, shapes))}</svg>\n"
    )


def _element(shape: Shape) -> str:
    points = [(round(x, 1), round(y, 1)) for x, y in shape.points]
    x, y = points[0]
    match shape.kind:
        case "line":
            return f'<polyline class="{shape.style}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'
        case "box":
            right, bottom = points[1]
            size = f'width="{right - x:.1f}" height="{bottom - y:.1f}"'
            return f'<rect class="{shape.style}" x="{x}" y="{y}" {size}/>'
        case "dot":
            return f'<circle class="{shape.style}" cx="{x}" cy="{y}" r="{DOT}"/>'
        case "text":
            place = f'x="{x}" y="{y}" text-anchor="{shape.anchor}"'
            return f'<text class="{shape.style}" {place}>{escape(shape.text)}</text>'
        case _:
            assert_never(shape.kind)


def png(shapes: Iterable[Shape], width: int, height: int) -> bytes:
    """Return shapes as a PNG.

    :raises SetupError: Pillow is not installed.
    """
    pillow = pillow_parts()
    image = pillow["Image"].new("RGB", (width * SCALE, height * SCALE), PAPER)
    canvas = pillow["ImageDraw"].Draw(image)
    font = pillow["ImageFont"].load_default(FONT_SIZE * SCALE)
    for shape in shapes:
        _paint(canvas, font, shape)
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()


def pillow_parts() -> dict[str, ModuleType]:
    """Return the modules of Pillow that draw.

    :raises SetupError: it is not installed.
    """
    try:
        return {name: importlib.import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")}
    except ModuleNotFoundError as error:
        raise SetupError(
            "a PNG is drawn by Pillow, which is not installed",
            where="--plot",
            hint="pip install 'cdcsync[evaluate]', or name a file that ends in .svg",
        ) from error


def _paint(canvas: Any, font: Any, shape: Shape) -> None:
    points = [(x * SCALE, y * SCALE) for x, y in shape.points]
    (x, y), color = points[0], LIGHT[shape.style]
    match shape.kind:
        case "line":
            canvas.line(points, color, WIDTHS.get(shape.style, 1) * SCALE, joint="curve")
        case "box":
            canvas.rectangle((points[0], points[1]), color)
        case "dot":
            canvas.circle((x, y), DOT * SCALE, color)
        case "text":
            place = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            canvas.text((x, y), shape.text, color, font, anchor=place, stroke_width=shape.style == "title")
        case _:
            assert_never(shape.kind)
