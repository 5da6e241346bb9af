"""Shapes as SVG and as PNG: the same places and colours, in both."""

from __future__ import annotations

import io
import sys
from xml.etree import ElementTree

import pytest
from PIL import Image

from cdcsync.errors import SetupError
from cdcsync.flows.evaluate.pictures import LIGHT, PAPER, SCALE, Shape, png, svg

SVG = "{http://www.w3.org/2000/svg}"

SHAPES = [
    Shape("line", "line", ((10, 10), (90, 10))),
    Shape("box", "bar", ((20, 20), (60, 40))),
    Shape("dot", "exact", ((80, 30),)),
    Shape("text", "title", ((10, 60),), "recall <&>"),
]


def color(image: Image.Image, x: float, y: float) -> str:
    """Return the colour of a place."""
    pixel = image.getpixel((int(x * SCALE), int(y * SCALE)))
    assert isinstance(pixel, tuple)
    return "#" + "".join(f"{part:02x}" for part in pixel)


def test_an_svg_has_an_element_for_each_shape_and_its_text_cannot_add_markup() -> None:
    root = ElementTree.fromstring(svg(SHAPES, 100, 80))
    assert [one.tag.removeprefix(SVG) for one in root] == ["style", "polyline", "rect", "circle", "text"]
    assert root[-1].text == "recall <&>"
    assert (root[2].attrib["width"], root[2].attrib["height"]) == ("40.0", "20.0")


def test_a_png_has_the_shapes_where_they_belong() -> None:
    image = Image.open(io.BytesIO(png(SHAPES, 100, 80)))
    assert (image.format, image.size) == ("PNG", (100 * SCALE, 80 * SCALE))
    assert [color(image, *place) for place in ((50, 10), (40, 30), (80, 30), (95, 75))] == [
        LIGHT["line"],
        LIGHT["bar"],
        LIGHT["exact"],
        PAPER,
    ]
    written = image.crop((10 * SCALE, 48 * SCALE, 90 * SCALE, 62 * SCALE)).getcolors()
    assert written is not None
    assert len(written) > 1


def test_a_png_without_pillow_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.ImageDraw", None)
    with pytest.raises(SetupError) as refused:
        png(SHAPES, 100, 80)
    assert "cdcsync[evaluate]" in str(refused.value.hint)
