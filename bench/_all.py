"""Runs the benches one after the other, and writes docs/benchmarks.md.

Without names come those that the goals of speed are about, at the goals' sizes as far as 20 minutes go; a run that
takes longer says so. `more` stands for the others that the page has, among them the goals' sizes that take too long.
What was found is kept in docs/benchmarks.json, each bench with the date and the machine of its run: a bench that is not
run again, or fails, keeps all that. A run is compared with the last one of the same bench on the same machine, if that
was of the same size. Of each other machine the page has the ratios of its last run, which may be of an earlier version.

A bench that ran on another machine, such as one with an accelerator, is kept by its last line:

    python bench/gpu.py | tail -n 1 | python bench/_all.py keep gpu "1 NVIDIA H200, 16 processors, 128 GiB"

Before each bench the machine has to be quiet. It is waited for, a minute at most; the page marks a bench beside which
other work ran.

    python bench/_all.py [NAME … | more | all]
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcsync.demo.programs import Programs, embedded_bin_dir

# A script imports from its own directory; a type checker and tests name files by their place in the repository.
if TYPE_CHECKING or __package__:
    from bench._quiet import BUSY, busy, quiet
    from bench.report import verdict
else:
    from _quiet import BUSY, busy, quiet
    from report import verdict

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

Found = dict[str, Any]
"""What the last line of a bench says, and what is known of its run."""

Runs = dict[str, tuple[tuple[str, ...], dict[str, str]]]
"""Scripts with arguments and environment; after a hyphen comes what tells runs of one script from each other. Each
alone, without arguments, does all that it can."""

GOALS: Runs = {
    "drain": ((), {"ROUNDS": "3"}),
    "native": (("keywords", "plain", "large"), {"LARGE_ROWS": "100000"}),
    "latency": ((), {"SECONDS": "3"}),
    "waste": ((), {}),
    "backfill": (("30000",), {}),
    "memory": (("narrow",), {"LARGE_ROWS": "200000"}),
    "scale": ((), {"SIZES": "1000,100000", "INDEXES": "1,50"}),
    "writes": (("on",), {}),
    "peers": (("--both", "backfill", "catch_up", "live"), {"SIDES": "cdcsync,pgai", "BACKFILL_ROWS": "6000"}),
    "gpu": ((), {}),
}

MORE: Runs = {
    "native-large": (("large",), {}),
    "memory-large": ((), {}),
    "backfill-large": (("50000",), {}),
    "scale-large": ((), {"SIZES": "1000,1000000", "INDEXES": "1,50"}),
    "writes-unsynced": (("off",), {}),
    "peers-settled": (("--both", "backfill", "catch_up", "live"), {"SIDES": "cdcsync_settled,pgai"}),
    "texts": ((), {}),
    "decode": ((), {}),
    "apply": ((), {}),
    "tiers": (("catch_up", "steady", "search"), {"STEADY_S": "30", "SEARCH_ROWS": "50000"}),
    "related": ((), {}),
    "fan_out": ((), {}),
    "replay": ((), {}),
    "audit": ((), {}),
    "wakeups": ((), {}),
}

RUNS = GOALS | MORE

PATIENCE_S = 900

KEPT = ("at", "arguments", "ratios", "goals", "smaller", "undecided", "figures")
"""What is kept of a run when another one takes its place."""

BUDGET_S = 20 * 60
"""For the goals, together, on two processors."""

HEAD = """\
# Benchmarks

`make bench` writes this page. A ratio is better the higher it is. Its other side is named under *against*: a peer, or
our own work under other conditions, was measured by the same script in the same run; a fixed goal is a number that the
design asks for, so such a ratio says as much of this machine as of cdcsync. Where a run was smaller than the goal asks
for, it says so beside the verdict. Each bench has the date and the machine of its own run. Each script under `bench/`
says at its top what it does, and does more when it is run alone.

Source, target, worker and writers share one machine, and every server, the peers' included, runs with `fsync = off`
unless a name says `fsync_on`: a commit waits for no disk, which a durable server's does."""


def machine() -> str:
    """Say what this machine is."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} processors ({processor}), {memory_gb:.0f} GiB"


def measure(name: str) -> Found:
    """Run one script, and return what its last line says.

    Raises:
        ChildProcessError: The script failed.
        TimeoutExpired: It took longer than `PATIENCE_S`.
    """
    arguments, environment = RUNS[name]
    script = f"{name.partition('-')[0]}.py"
    busy_before, load = quiet(), os.getloadavg()[0]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        timeout=PATIENCE_S,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ChildProcessError(f"bench/{script} ended with {done.returncode}")
    seconds = time.perf_counter() - began
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found | {
        "seconds": round(seconds, 1),
        "load": round(load, 2),
        "busy_before": round(busy_before, 2),
        "busy_after": round(busy(), 2),
        "arguments": " ".join([*(f"{key}={value}" for key, value in environment.items()), *arguments]),
    }


def kept(earlier: Found | None, found: Found, run: Found) -> Found:
    """Return what is kept of a bench after it ran: this run, the one that it is compared with, and other machines'.

    :param earlier: what is kept of it so far.
    :param found: what it says now; `not_run` instead of figures if it measured nothing.
    :param run: `at`, machine and versions of this run.
    """
    if why := found.get("not_run"):
        return {**(earlier or {}), "unmeasured": f"Not run on {run['at']}: {why}."}
    runs = dict((earlier or {}).get("elsewhere", {}))
    if earlier and "at" in earlier:
        runs[earlier["machine"]] = {name: earlier.get(name, {}) for name in KEPT}
    before = runs.pop(run["machine"], None)
    if before and before["arguments"] != found["arguments"]:
        before = None
    return {**found, **run, "before": before, "elsewhere": runs}


def number(value: float) -> str:
    """Return a figure as a reader wants it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}" if abs(value) >= 1 else f"{value:,.4f}"


def written(benches: dict[str, Found]) -> str:
    """Return the page."""
    lines = [HEAD, "", took(benches), ""]
    for name, found in benches.items():
        lines += [f"## {name}", "", *section(name, found)]
    return "\n".join(lines)


def took(benches: dict[str, Found]) -> str:
    """Return what the page says of how long the benches of the goals take."""
    seconds = sum(found.get("seconds", 0.0) for name, found in benches.items() if name in GOALS)
    over = f", {seconds - BUDGET_S:,.0f} s more" if seconds > BUDGET_S else ""
    has = f"`make bench` has {BUDGET_S:,} s for them, besides its waits for a quiet machine."
    return f"The benches of the goals took {seconds:,.0f} s together{over}; {has}"


def disturbed(found: Found) -> str:
    """Return what the page says of other work beside a bench."""
    shares = [(when, found.get(f"busy_{when}", 0.0)) for when in ("before", "after")]
    others = " and ".join(f"{share:.0%} of the processors {when} it" for when, share in shares if share >= BUSY)
    return f" **The machine was not quiet:** other work took {others}." if others else ""


def noted(found: Found) -> list[str]:
    """Return what stands below the ratios: the notes of the bench, and each missed goal of which there is none."""
    notes = found.get("notes", {})
    missed = [ratio for ratio, value in found["ratios"].items() if value < found["goals"][ratio]]
    without = [f"`{ratio}`" for ratio in missed if not any(map(ratio.startswith, notes))]
    lines = [f"- `{of}`: {note}." for of, note in notes.items()]
    return lines + ([f"- Missed, and nobody has said why: {', '.join(without)}."] if without else [])


def on_another_machine(where: str, found: Found, now: Found) -> str:
    """Return the line about the last run on another machine: what is measured now, as it was there."""
    said = [
        f"`{ratio}` {number(value)}, {held(found, ratio)}"
        for ratio, value in found["ratios"].items()
        if ratio in now["ratios"]
    ]
    run = f"{found['arguments']}, {found['at']}".removeprefix(", ")
    return f"- On {where} ({run}): {'; '.join(said) or 'nothing of what is measured now'}."


def held(found: Found, ratio: str) -> str:
    """Return what a ratio is, held against its goal, and what its run lacked to the goal's size."""
    said = verdict(found["ratios"][ratio], found["goals"][ratio], found.get("undecided", {}).get(ratio))
    smaller = found.get("smaller", {}).get(ratio)
    return f"{said}; not of the goal's size: {smaller}" if smaller else said


def section(name: str, found: Found) -> list[str]:
    """Return what the page says of one bench."""
    lines = [found["unmeasured"], ""] if "unmeasured" in found else []
    if "at" not in found:
        return lines
    before = found.get("before")
    compared = f" Last time: {before['at']}." if before else ""
    run = [f"`bench/{name.partition('-')[0]}.py` {found['arguments']}".rstrip(), found["at"], found["machine"]]
    if "seconds" in found:
        run += [f"PostgreSQL {found['postgresql']}", f"Python {found['python']}: {found['seconds']:.0f} s"]
        run[-1] += f"; load average before it {found['load']:.2f}"
    lines += [", ".join(run) + "." + compared + disturbed(found), ""]
    earlier = before or {"ratios": {}, "figures": {}}
    if found["ratios"]:
        lines += ["| ratio | found | goal | | against | last time |", "|---|---|---|---|---|---|"]
    for ratio, value in found["ratios"].items():
        goal, said = found["goals"][ratio], held(found, ratio)
        against = found.get("against", {}).get(ratio, "")
        last_time = _maybe(earlier["ratios"].get(ratio))
        lines.append(f"| `{ratio}` | {number(value)} | {number(goal)} | {said} | {against} | {last_time} |")
    elsewhere = [on_another_machine(where, run_, found) for where, run_ in found.get("elsewhere", {}).items()]
    if below := [*noted(found), *elsewhere]:
        lines += ["", *below]
    lines += ["", "| figure | found | last time |", "|---|---|---|"]
    for figure, value in found["figures"].items():
        lines.append(f"| `{figure}` | {number(value)} | {_maybe(earlier['figures'].get(figure))} |")
    lines.append("")
    return lines


def _maybe(value: float | None) -> str:
    return "" if value is None else number(value)


def write(benches: dict[str, Found]) -> None:
    """Write the page, and what it is made of."""
    benches = {one: benches[one] for one in RUNS if one in benches}
    (DOCS / "benchmarks.md").write_text(written(benches))
    (DOCS / "benchmarks.json").write_text(json.dumps({"benches": benches}, indent=1) + "\n")


def asked(names: list[str]) -> list[str]:
    """Return the benches that the arguments stand for.

    Raises:
        SystemExit: There is none of a name.
    """
    groups = {"more": list(MORE), "all": list(RUNS)}
    chosen = [one for name in names for one in groups.get(name, [name])] or list(GOALS)
    if unknown := set(chosen) - RUNS.keys():
        raise SystemExit(f"no bench is called {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}, more and all")
    return chosen


def brought(line: str) -> Found:
    """Return what the last line of a bench says that ran elsewhere, whose time and load are not known."""
    found: Found = json.loads(line)
    return found | {"arguments": ""}


def main() -> None:
    """Run what is named, or what the goals are about; or keep what ran elsewhere."""
    store = DOCS / "benchmarks.json"
    last = json.loads(store.read_text()) if store.exists() else {}
    benches: dict[str, Found] = last.get("benches", {})
    if sys.argv[1:2] == ["keep"]:
        if len(sys.argv) != 4:
            raise SystemExit("keep needs a bench and the machine on which it ran, and reads its last line")
        (name,), where = asked(sys.argv[2:3]), sys.argv[3]
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        run = {"at": at, "machine": where}
        write(benches | {name: kept(benches.get(name), brought(sys.stdin.readlines()[-1]), run)})
        return
    names = asked(sys.argv[1:])
    this = {
        "machine": machine(),
        "postgresql": str(Programs(embedded_bin_dir()).version),
        "python": platform.python_version(),
    }
    failed: list[str] = []
    began = time.perf_counter()
    for name in names:
        at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        try:
            found = measure(name)
        except (ChildProcessError, subprocess.TimeoutExpired) as error:
            failed.append(str(error))
            found = {"not_run": "it failed"}
        benches[name] = kept(benches.get(name), found, {"at": at, **this})
        write(benches)
    print(f"{len(names)} benches in {(time.perf_counter() - began) / 60:.1f} minutes. {took(benches)}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
