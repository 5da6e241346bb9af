"""What a campaign came to: which faults fired, which crash points were hit, and what came beside what.

Each history that ends adds its outcome to a file at once, so that a campaign can be interrupted at any moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

OUTCOMES = "outcomes.jsonl"
"""The outcomes of a campaign, each on a line, in the order in which the histories ended."""

RECORD = Path(__file__).with_name("campaign.json")
"""What the last campaign that was recorded came to, for docs/reliability.md."""

TABLE = "coverage.tsv"
"""In how many histories each fault fired beside each crash point that was hit."""


class Outcome(msgspec.Struct):
    """What became of a seed."""

    seed: int
    seconds: float
    plan: list[str]
    fired: dict[str, int]
    hit: set[str]
    transactions: int
    problem: str | None = None


def note(directory: Path, outcome: Outcome) -> None:
    """Add an outcome to those of a campaign."""
    with (directory / OUTCOMES).open("ab") as file:
        file.write(msgspec.json.encode(outcome) + b"\n")


def forget(directory: Path, seeds: Collection[int]) -> None:
    """Remove what these seeds came to when they were run before."""
    kept = [one for one in read(directory) if one.seed not in seeds]
    (directory / OUTCOMES).write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept))


def read(directory: Path, seeds: Collection[int] | None = None) -> list[Outcome]:
    """Return the outcomes of a campaign by seed, of these seeds alone if they are given; the last of each counts."""
    path = directory / OUTCOMES
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = {one.seed: one for one in (msgspec.json.decode(line, type=Outcome) for line in lines)}
    return [found[seed] for seed in sorted(found) if seeds is None or seed in seeds]


def report(
    outcomes: Sequence[Outcome], faults: Collection[str], points: Collection[str], *, whole: bool = False
) -> list[str]:
    """Print what fired and what was hit, each with the number of histories that were to bring it; returns failures.

    :param faults: all there are.
    :param points: all that a history can come to.
    :param whole: whether every fault and every crash point has to have come.
    """
    fired = sum((Counter(one.fired) for one in outcomes), Counter[str]())
    hit = Counter(name for one in outcomes for name in one.hit)
    planned = Counter(name for one in outcomes for name in one.plan)
    for kind, names, came, verb in (
        ("fault", {*faults, *fired}, fired, "fired"),
        ("crash point", {*points, *hit}, hit, "hit"),
    ):
        print(f"\n{kind:<45} {'planned':>8} {verb:>6}")
        for name in sorted(names):
            print(f"{name:<45} {planned[name]:>8} {came[name]:>6}")
    failed = [f"seed {one.seed}: {one.problem}" for one in outcomes if one.problem]
    if whole:
        failed += [f"never fired: {name}" for name in sorted(faults) if not fired[name]]
        failed += [f"never hit: {name}" for name in sorted(points) if not hit[name]]
    together = beside(outcomes)
    print(
        f"\n{len(outcomes)} histories, {sum(one.transactions for one in outcomes)} transactions,"
        f" {sum(fired.values())} faults fired, {sum(1 for name in faults if fired[name])} of {len(faults)} kinds;"
        f" {sum(1 for name in points if hit[name])} of {len(points)} crash points hit, beside a fault in"
        f" {len(together)} ways; {sum(one.seconds for one in outcomes):.0f} s of histories; {len(failed)} failures"
    )
    for line in failed:
        print(f"FAIL {line[:300]}")
    return failed


class Record(msgspec.Struct, frozen=True):
    """What a campaign came to: in how many of its histories each fault fired, and each crash point was hit."""

    histories: int
    transactions: int
    failures: int
    fired: dict[str, int]
    hit: dict[str, int]


def record(outcomes: Sequence[Outcome], path: Path = RECORD) -> None:
    """Keep what a campaign came to."""
    kept = Record(
        len(outcomes),
        sum(one.transactions for one in outcomes),
        sum(one.problem is not None for one in outcomes),
        dict(sorted(Counter(name for one in outcomes for name in one.fired).items())),
        dict(sorted(Counter(name for one in outcomes for name in one.hit).items())),
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")


def recorded(path: Path = RECORD) -> Record:
    """Return what the last campaign that was recorded came to."""
    return msgspec.json.decode(path.read_bytes(), type=Record)


def beside(outcomes: Sequence[Outcome]) -> Counter[tuple[str, str]]:
    """Return in how many histories each crash point was hit and each fault fired, by both."""
    return Counter(
        (point, fault) for one in outcomes for point in one.hit for fault in one.fired if fault not in one.hit
    )


def write_table(directory: Path, outcomes: Sequence[Outcome], faults: Collection[str], points: Collection[str]) -> None:
    """Write what came beside what: a line for each crash point, a column for each fault."""
    together = beside(outcomes)
    columns = sorted(faults)
    lines = ["\t".join(("crash point", *columns))]
    lines += ["\t".join((point, *(str(together[point, one]) for one in columns))) for point in sorted(points)]
    (directory / TABLE).write_text("\n".join(lines) + "\n")
