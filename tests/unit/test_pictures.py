"""The pictures of the documentation: each is there, is shown, and something writes it."""

from __future__ import annotations

import json
import re

from tests import ROOT
from tests.support.browsers import PICTURES, SEEN, SHOWN

RECORDED = {"demo.svg", "page-light.png", "page-dark.png"}
"""What docs/record.py writes."""

DRAWN = {"soak.svg"}
"""What a run of `tests.soak` draws, kept with its record."""


def test_every_picture_is_shown_and_every_shown_picture_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8"))}
    there = {path.name for path in PICTURES.iterdir() if path != SEEN}
    assert shown == there == {*RECORDED, *DRAWN, *(f"{name}.png" for name in SHOWN)}


def test_it_is_known_what_each_picture_shows() -> None:
    assert set(json.loads(SEEN.read_text())) == set(SHOWN)
