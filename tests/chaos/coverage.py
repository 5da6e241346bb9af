"""What a campaign came to: which faults fired, which crash points were hit, and what came beside what.

Each history that ends adds its outcome to a file at once, so that a campaign can be interrupted at any moment.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

OUTCOMES = "outcomes.jsonl"
"""The outcomes of a campaign, each on a line, in the order in which the histories ended."""

FAILED = "failed.txt"
"""The seeds of a campaign that have failed and were run again."""

RECORD = Path(__file__).with_name("campaign.json")
"""What the last campaign that was recorded came to, for docs/reliability.md."""

TABLE = "coverage.tsv"
"""In how many histories each fault fired beside each crash point that was hit."""


LEAST_COVERED = 0.7
"""Of so many of the texts that a campaign has embedded, a second call must have been one that is found; campaigns reach
some 0.8."""

KINDS = ("streamed", "prepared", "truncated")
"""Kinds of transactions that are rare and must come in a campaign of `WHOLE` histories."""


class Outcome(msgspec.Struct):
    """What became of a seed, with how much of it the checks could see.

    :ivar kinds: how many transactions of each kind the writer committed.
    :ivar embedded: how many texts were embedded.
    :ivar covered: of how many of these a second call would have been found.
    :ivar compared: how often the slot's position was compared with the checkpoint.
    :ivar again: whether it was run again, because it had failed.
    """

    seed: int
    seconds: float
    plan: list[str]
    fired: dict[str, int]
    hit: set[str]
    transactions: int
    problem: str | None = None
    kinds: dict[str, int] = msgspec.field(default_factory=dict)
    embedded: int = 0
    covered: int = 0
    compared: int = 0
    again: bool = False


def note(directory: Path, outcome: Outcome) -> None:
    """Add an outcome to those of a campaign."""
    with (directory / OUTCOMES).open("ab") as file:
        file.write(msgspec.json.encode(outcome) + b"\n")


def forget(directory: Path, seeds: Collection[int]) -> None:
    """Remove what these seeds came to when they were run before, but for which of them failed."""
    found = read(directory)
    with (directory / FAILED).open("a") as failed:
        failed.writelines(f"{one.seed}\n" for one in found if one.seed in seeds and one.problem)
    kept = [one for one in found if one.seed not in seeds]
    (directory / OUTCOMES).write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept))


def read(directory: Path, seeds: Collection[int] | None = None) -> list[Outcome]:
    """Return the outcomes of a campaign by seed, of these seeds alone if they are given; the last of each counts."""
    path = directory / OUTCOMES
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = {one.seed: one for one in (msgspec.json.decode(line, type=Outcome) for line in lines)}
    failed = directory / FAILED
    for seed in map(int, failed.read_text().split() if failed.exists() else ()):
        if seed in found:
            found[seed].again = True
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


def unseen(outcomes: Sequence[Outcome], *, whole: bool = False) -> list[str]:
    """Print how much the checks of a campaign could see, and return what was too little.

    :param whole: whether every kind of transaction has to have come.
    """
    embedded, covered = sum(one.embedded for one in outcomes), sum(one.covered for one in outcomes)
    kinds = sum((Counter(one.kinds) for one in outcomes), Counter[str]())
    print(
        f"{covered} of {embedded} embedded texts were seen in the target, so a second call for them would be found;"
        f" {sum(one.compared for one in outcomes)} comparisons of the slot with the checkpoint;"
        f" transactions: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
    )
    failed = []
    if any(one.problem is None for one in outcomes) and covered < LEAST_COVERED * max(1, embedded):
        failed.append(f"only {covered} of {embedded} embedded texts were seen in the target before the end")
    if whole:
        failed += [f"no transaction was {kind}" for kind in KINDS if not kinds[kind]]
    for line in failed:
        print(f"FAIL {line}")
    return failed


class Record(msgspec.Struct, frozen=True):
    """What a campaign came to: in how many of its histories each fault fired, and each crash point was hit.

    :ivar commit: the commit that it ran on, with a + if files differed from it; nothing outside a repository.
    :ivar seeds: the least and the greatest. The last five are sums of what the outcomes have.
    """

    histories: int
    transactions: int
    failures: int
    fired: dict[str, int]
    hit: dict[str, int]
    commit: str = ""
    seeds: tuple[int, int] = (0, 0)
    kinds: dict[str, int] = {}
    embedded: int = 0
    covered: int = 0
    compared: int = 0
    again: int = 0


def record(outcomes: Sequence[Outcome], path: Path = RECORD) -> None:
    """Keep what a campaign came to."""
    kept = Record(
        len(outcomes),
        sum(one.transactions for one in outcomes),
        sum(one.problem is not None for one in outcomes),
        dict(sorted(Counter(name for one in outcomes for name in one.fired).items())),
        dict(sorted(Counter(name for one in outcomes for name in one.hit).items())),
        commit(),
        (min((one.seed for one in outcomes), default=0), max((one.seed for one in outcomes), default=0)),
        dict(sorted(sum((Counter(one.kinds) for one in outcomes), Counter[str]()).items())),
        sum(one.embedded for one in outcomes),
        sum(one.covered for one in outcomes),
        sum(one.compared for one in outcomes),
        sum(one.again for one in outcomes),
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")


def commit() -> str:
    """Return the commit of this tree, with a + if files differ from it; nothing outside a repository."""
    described = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    done = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


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
