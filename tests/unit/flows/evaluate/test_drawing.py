"""Drawings: well-formed, with a panel for each measurement, and whatever the names hold."""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree

import msgspec
import pytest

from cdcsync.flows.evaluate.drawing import HEIGHT, WIDTH, draw
from cdcsync.flows.evaluate.judged import evaluate_judged
from cdcsync.flows.evaluate.pictures import Shape, svg
from cdcsync.target.evaluations import Evaluation, Measured
from cdcsync.target.judged_runs import Figure
from tests.support.judging import COLLECTION, HALF, PERFECT, answers, run_of

pytestmark = pytest.mark.anyio

NOTHING = answers({})

SVG = "{http://www.w3.org/2000/svg}"


def evaluation(index: str = "pets") -> Evaluation:
    measured = [
        Measured(ef_search=ef, recall=recall, mean_ms=ms, p95_ms=2 * ms, usual=ef == 40, by_hnsw=True)
        for ef, recall, ms in ((10, 0.8, 0.5), (40, 0.95, 1.0), (200, 1.0, 4.0))
    ]
    return Evaluation(index, 1, 10, 100, 20.0, 25.0, measured, datetime(2026, 1, 1, tzinfo=UTC))


def read(drawn: tuple[list[Shape], int, int]) -> ElementTree.Element:
    """Return the picture; every mark lies within it."""
    shapes, width, height = drawn
    assert height == HEIGHT
    for shape in shapes:
        assert all(0 <= x <= width and 0 <= y <= height for x, y in shape.points)
        assert shape.points == tuple(sorted(shape.points)) or shape.kind == "line"
    return ElementTree.fromstring(svg(*drawn))


def words(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_recall_has_a_point_for_each_ef_search_and_one_for_the_exact_search() -> None:
    root = read(draw(evaluation(), None))
    assert root.attrib["width"] == str(WIDTH)
    assert len(list(root.iter(f"{SVG}circle"))) == 4
    assert {"10", "40", "200", "exact", "pets: recall@10 by ef_search"} <= set(words(root))


async def test_a_judged_run_has_a_bar_for_each_mode_and_a_panel_of_weights() -> None:
    run = await evaluate_judged(
        "pets", 1, COLLECTION, {"text": HALF, "vector": PERFECT}, measures=["RR"], weights=[0.0, 0.5, 1.0]
    )
    root = read(draw(evaluation(), run))
    assert root.attrib["width"] == str(3 * WIDTH)
    assert len(list(root.iter(f"{SVG}rect"))) == len(run.modes)
    assert "pets: RR by weight of the words" in words(root)
    assert "lines: 95 % confidence" not in words(root)


async def test_an_interval_is_drawn_where_there_is_one() -> None:
    run = await run_of(vector=PERFECT)
    (mode,) = run.modes.values()
    known = msgspec.structs.replace(mode, figures={"nDCG@10": Figure(0.5, 0.4, 0.6)})
    without, with_interval = (
        read(draw(None, msgspec.structs.replace(run, modes={"vector": one}))) for one in (mode, known)
    )
    lines = [
        len(list(root.iter(f"{SVG}polyline"))) + len(list(root.iter(f"{SVG}line"))) for root in (without, with_interval)
    ]
    assert lines[1] == lines[0] + 1
    assert "lines: 95 % confidence" in words(with_interval)


async def test_figures_that_are_all_zero_are_drawn() -> None:
    run = await evaluate_judged("pets", 1, COLLECTION, {"text": NOTHING, "vector": PERFECT}, measures=["RR"])
    nothing = msgspec.structs.replace(run, modes={"text": run.modes["text"]})
    flat = msgspec.structs.replace(evaluation(), exact_mean_ms=0.0)
    flat = msgspec.structs.replace(flat, measured=[msgspec.structs.replace(flat.measured[0], mean_ms=0.0, recall=0.0)])
    assert "0.000" in words(read(draw(flat, nothing)))


def test_a_name_cannot_add_markup() -> None:
    root = read(draw(evaluation('<script>&"'), None))
    assert list(root.iter(f"{SVG}script")) == []
    assert any(text.startswith('<script>&"') for text in words(root))
