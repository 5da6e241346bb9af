"""The one place that prints what a bench found: a table for people, then one line of JSON for programs.

A ratio is a figure over another of the same run, or over a rate that the design asks for; higher is better, and its
goal says from where on it is good enough. A missed goal is a finding and not a failure: the caller still exits 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

_NONE: Mapping[str, float] = {}


def report(
    name: str, figures: Mapping[str, float], ratios: Mapping[str, float] = _NONE, goals: Mapping[str, float] = _NONE
) -> None:
    """Print a bench's table and, as the last line, its JSON object.

    :param figures: what was measured; each name ends in its unit.
    :param ratios: higher is better.
    :param goals: what each ratio should at least be, under the same names.
    :raises ValueError: ratios and goals do not have the same names, or a number is not finite.
    """
    if ratios.keys() != goals.keys():
        raise ValueError(f"ratios without goals, or goals without ratios: {sorted(ratios.keys() ^ goals.keys())}")
    last_line = json.dumps({"bench": name, "figures": figures, "ratios": ratios, "goals": goals}, allow_nan=False)

    width = max(map(len, [*figures, *ratios]), default=0)
    print(f"bench {name}")
    for figure, value in figures.items():
        print(f"  {figure:<{width}}  {_number(value):>14}")
    for ratio, value in ratios.items():
        verdict = "met" if value >= goals[ratio] else "missed"
        print(f"  {ratio:<{width}}  {_number(value):>14}  goal {_number(goals[ratio])}: {verdict}")
    print(last_line)


def _number(value: float) -> str:
    """Return a number with as many digits as a reader can use: whole from a hundred up, three decimals below."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3f}"
