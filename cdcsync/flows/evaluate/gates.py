"""Gates: does an evaluation reach what was asked of it? A failed one makes `cdcsync evaluate` exit with status 1.

--min "nDCG@10=0.40"           the mean of the index's own search
--min "text nDCG@10=0.32"      of another mode
--against LAST                 no mode is worse than in an earlier run, as far as the paired interval can tell; a gate
                               that has too few questions for an interval passes, and says so
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.collection import Collection, read_collection
from cdcsync.flows.evaluate.intervals import FEWEST, difference
from cdcsync.flows.evaluate.judged import MEASURES, parse_measures
from cdcsync.target.judged_runs import MODES, Figure, JudgedMode, Run

LONGEST_RUN = 18
"""Digits of a run's number: all numbers that are as long fit into a bigint of PostgreSQL."""

_FLOOR = re.compile(r"(?:(\w+)\s+)?(\S+?)\s*=\s*(\d*\.?\d+)")


class Floor(msgspec.Struct, frozen=True):
    """The least that a mean may be; `mode` None is the index's own search."""

    mode: JudgedMode | None
    measure: str
    least: float


class Verdict(NamedTuple):
    """The result of one gate."""

    passed: bool
    text: str


class Questions(NamedTuple):
    """Judged questions, with what is asked of the answers.

    :ivar measures: those of the floors are among them.
    """

    collection: Collection
    floors: list[Floor]
    measures: list[str]


def read_questions(directory: Path, least: Sequence[str], measures: Sequence[str] = ()) -> Questions:
    """Read a collection and the arguments about it; what is wrong with them is told before a model is loaded.

    :param measures: those that are asked for; the usual ones if none is.
    :raises UsageError: an argument or the collection is malformed.
    """
    floors = [parse_floor(text) for text in least]
    wanted = list(dict.fromkeys([*(measures or MEASURES), *(floor.measure for floor in floors)]))
    parsed = [str(measure) for measure in parse_measures(wanted)]
    return Questions(read_collection(directory), floors, parsed)


def parse_floor(text: str) -> Floor:
    """Read a `--min`.

    :raises UsageError: it is none.
    """
    match = _FLOOR.fullmatch(text.strip())
    mode = match and match[1]
    if match is None or (mode is not None and mode not in MODES):
        raise UsageError(
            f"{text!r} is not a minimum",
            where="--min",
            hint=f'write it as "nDCG@10=0.40", or with a mode ({", ".join(MODES)}) as "text nDCG@10=0.32"',
        )
    (measure,) = parse_measures([match[2]])
    return Floor(cast("JudgedMode | None", mode), str(measure), float(match[3]))


def parse_weights(text: str) -> list[float]:
    """Read a `--weights`: FROM:TO:STEP, both ends included.

    :raises UsageError: it is none.
    """
    try:
        start, end, step = (float(part) for part in text.split(":"))
    except ValueError:
        start, end, step = 0.0, -1.0, 0.0
    if not (0 <= start <= end <= 1 and 0.01 <= step < inf):
        raise UsageError(
            f"{text!r} is not a range of weights", where="--weights", hint="write FROM:TO:STEP within 0 and 1: 0:1:0.1"
        )
    return [round(start + step * at, 6) for at in range(int((end - start) / step + 1e-9) + 1)]


def parse_run(text: str | None) -> int | None:
    """Read an `--against`: a run's number; None is the last one.

    :raises UsageError: it is none.
    """
    if text is None or text == "LAST":
        return None
    if not text.isdecimal():
        raise UsageError(f"{text!r} is not a run", where="--against", hint="give LAST, or a run's number")
    if len(text) > LONGEST_RUN:
        raise UsageError(
            f"there is no run {text[:LONGEST_RUN]}…", where="--against", hint="give LAST, or a run's number"
        )
    return int(text)


def judge(run: Run, floors: Sequence[Floor], earlier: Run | None) -> list[Verdict]:
    """Return what becomes of each gate.

    :param earlier: the run that no mode may be worse than.
    :raises UsageError: a floor is for a mode that the index does not have, or the runs have no question in common.
    """
    verdicts = []
    for floor in floors:
        mode = floor.mode or run.own_mode
        if mode not in run.modes:
            raise UsageError(f"the index has no {mode} search", where=f"index {run.index}", hint="leave out that --min")
        reached = run.modes[mode].figures[floor.measure].mean
        text = f"{mode} {floor.measure} is {reached:.4f}, and has to be at least {floor.least:g}"
        verdicts.append(Verdict(reached >= floor.least, text))
    if earlier is not None:
        measure = run.measures[0]
        for mode, gain in gains(run, earlier, measure).items():
            text = f"{mode} {measure} differs by {gain.mean:+.4f}"
            since = f"from the run of {earlier.evaluated_at:%Y-%m-%d %H:%M}"
            if gain.interval is None:
                verdicts.append(Verdict(True, f"{text} {since}: too few questions to tell, it takes {FEWEST}"))
            else:
                low, high = gain.interval
                verdicts.append(Verdict(high >= 0, f"{text} [{low:+.4f}, {high:+.4f}] {since}"))
    return verdicts


def gains(run: Run, earlier: Run, measure: str) -> dict[JudgedMode, Figure]:
    """Return how much better each mode that both runs have is now, over the questions that both have."""
    found: dict[JudgedMode, Figure] = {}
    for mode in run.modes.keys() & earlier.modes.keys():
        now = run.modes[mode].scores[measure]
        then = earlier.modes[mode].scores.get(measure, {})
        if both := [query for query in now if query in then]:
            found[mode] = difference([now[query] for query in both], [then[query] for query in both])
    if not found:
        raise UsageError(
            f"the earlier run has no {measure} of these questions", where="--against", hint="name another run"
        )
    return {mode: found[mode] for mode in MODES if mode in found}
