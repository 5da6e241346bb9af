"""Growth is found, and what only comes and goes is not taken for it."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree

import pytest

from tests.soak.picture import draw
from tests.soak.series import FEWEST, Series, fit


def made(values: list[float], **allowance: float) -> Series:
    series = Series("files", "files", **allowance)
    for at, value in enumerate(values):
        series.add(10.0 * at, value)
    return series


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_flat_and_the_same_noise_on_a_slope_is_not(seed: int) -> None:
    chance = random.Random(seed)
    noise = [100 + chance.gauss(0, 5) for _ in range(200)]
    assert made(noise).flat
    assert not made([one + 0.2 * at for at, one in enumerate(noise)]).flat


@pytest.mark.parametrize("seed", range(5))
def test_what_wanders_is_not_taken_for_growth(seed: int) -> None:
    """Memory stays where it is for a while: its measurements are worth fewer than they are."""
    chance, value, values = random.Random(seed), 100.0, []
    for _ in range(200):
        value += 0.1 * (100 - value) + chance.gauss(0, 3)
        values.append(value)
    assert made(values).flat


def test_a_sawtooth_is_flat_and_a_sawtooth_whose_feet_rise_is_not() -> None:
    teeth = [float(at % 20) for at in range(200)]
    assert made(teeth, allowed=1).flat
    assert not made([tooth + at / 4 for at, tooth in enumerate(teeth)], allowed=1).flat


def test_one_more_at_a_time_is_growth_and_one_more_in_all_is_allowed() -> None:
    assert not made([10 + at // 10 for at in range(100)], allowed=1).flat
    assert made([10.0] * 50 + [11.0] * 50, allowed=2).flat


def test_a_line_is_found_exactly() -> None:
    trend = fit([(float(at), 3.0 + 2 * at) for at in range(20)])
    assert trend.growth == pytest.approx(38)
    assert trend.error == pytest.approx(0, abs=1e-6)


def test_too_little_says_nothing() -> None:
    with pytest.raises(ValueError, match="at least"):
        fit([(float(at), 1.0) for at in range(FEWEST - 1)])
    with pytest.raises(ValueError, match="one moment"):
        fit([(1.0, 1.0)] * FEWEST)


def test_the_picture_has_a_panel_and_a_verdict_for_each() -> None:
    drawn = draw([made([1.0] * 50), made([float(at) for at in range(50)])])
    words = "".join(ElementTree.fromstring(drawn).itertext())
    assert "flat: mean 1.0 files" in words
    assert "grows: mean 24.5 files, +49.0" in words
