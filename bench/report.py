"""The one place that prints what a bench found: a table for people, then one line of JSON for programs.

A ratio is a figure over another one; higher is better, and its goal says from where on it is good enough. The other
figure is a peer's in the same run, our own in the same run under other conditions, or fixed: each ratio says which. A
missed goal is a finding and not a failure: the caller still exits 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

_NONE: Mapping[str, float] = {}
_FULL: Mapping[str, str] = {}

FIXED = "a fixed goal"
"""What a ratio is against if nothing else is measured."""


def report(
    name: str,
    figures: Mapping[str, float],
    ratios: Mapping[str, float] = _NONE,
    goals: Mapping[str, float] = _NONE,
    against: str | Mapping[str, str] = "",
    smaller: Mapping[str, str] = _FULL,
    undecided: Mapping[str, str] = _FULL,
    notes: Mapping[str, str] = _FULL,
) -> None:
    """Print a bench's table and, as the last line, its JSON object.

    :param figures: what was measured; each name ends in its unit.
    :param ratios: higher is better.
    :param goals: what each ratio should at least be, under the same names.
    :param against: the other side of all ratios, or of each, under the same names: `FIXED`, or what was measured.
    :param smaller: by ratio, how far the run was below the size that the goal is set for; empty if it was not.
    :param undecided: by ratio, where it may be, if the run cannot tell on which side of the goal it is.
    :param notes: by the beginning of the names of ratios, what a reader has to know of them: why a goal is missed, what
        the clock sees. They stand on the page below the ratios.
    :raises ValueError: ratios, goals and what they are against do not have the same names, or a number is not finite.
    """
    sides = dict.fromkeys(ratios, against) if isinstance(against, str) else dict(against)
    short = {ratio: why for ratio, why in smaller.items() if why}
    unnamed = (ratios.keys() ^ goals.keys()) | (ratios.keys() ^ sides.keys())
    unnamed |= (short.keys() | undecided.keys()) - ratios.keys()
    if unnamed or not all(sides.values()):
        raise ValueError(f"a ratio lacks its goal or what it is against, or the other way round: {sorted(unnamed)}")
    said = {"bench": name, "figures": figures, "ratios": ratios, "goals": goals, "against": sides, "smaller": short}
    said |= {"undecided": undecided, "notes": {of: note for of, note in notes.items() if _is_of(ratios, of)}}
    last_line = json.dumps(said, allow_nan=False)

    width = max(map(len, [*figures, *ratios]), default=0)
    print(f"bench {name}")
    for figure, value in figures.items():
        print(f"  {figure:<{width}}  {_number(value):>14}")
    for ratio, value in ratios.items():
        size = f"; {short[ratio]}" if ratio in short else ""
        held = verdict(value, goals[ratio], undecided.get(ratio))
        print(f"  {ratio:<{width}}  {_number(value):>14}  goal {_number(goals[ratio])}: {held}{size}")
    print(last_line)


def verdict(value: float, goal: float, undecided: str | None) -> str:
    """Return what a ratio is, held against its goal."""
    return f"undecided, {undecided}" if undecided else "met" if value >= goal else "missed"


def not_run(name: str, why: str) -> None:
    """Print that a bench could not measure anything here, for people and, as the last line, for programs."""
    print(f"{name}: not run: {why}")
    print(json.dumps({"bench": name, "not_run": why}))


def of_goal(done: int, goal: int, what: str) -> str:
    """Return what a run lacks to the size that a goal is set for, or nothing."""
    return f"{done:,} of {goal:,} {what}" if done < goal else ""


def _is_of(ratios: Mapping[str, float], beginning: str) -> bool:
    return any(ratio.startswith(beginning) for ratio in ratios)


def _number(value: float) -> str:
    """Return a number with as many digits as a reader can use: whole from a hundred up, three decimals below."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3f}"
