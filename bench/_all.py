"""Runs the benches one after the other, and writes docs/benchmarks.md.

Without names come those that the goals of speed are about, at the goals' sizes as far as 20 minutes go. `more` stands
for the others that the page has. What was found is kept in docs/benchmarks.json, each bench with the date and the
machine of its run: a bench that is not run again, or fails, keeps all that. A run is compared with the last one of the
same bench on the same machine, if that was of the same size.

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
from typing import Any

from cdcsync.demo.programs import Programs, embedded_bin_dir

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

Found = dict[str, Any]
"""What the last line of a bench says, and what is known of its run."""

Runs = dict[str, tuple[tuple[str, ...], dict[str, str]]]
"""Scripts with arguments and environment. Each alone, without them, does all that it can."""

GOALS: Runs = {
    "drain": ((), {"ROUNDS": "3"}),
    "native": (("keywords", "plain", "large"), {}),
    "latency": ((), {"SECONDS": "3"}),
    "waste": ((), {}),
    "backfill": (("50000",), {}),
    "memory": ((), {"WIDE_ROWS": "50000"}),
    "scale": ((), {}),
    "peers": (("--both", "backfill", "catch_up", "live"), {}),
    "gpu": ((), {}),
}

MORE: Runs = {
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
    began, load = time.perf_counter(), os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        timeout=PATIENCE_S,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise ChildProcessError(f"bench/{name}.py ended with {done.returncode}")
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found | {
        "seconds": round(time.perf_counter() - began, 1),
        "load": round(load, 2),
        "arguments": " ".join([*(f"{key}={value}" for key, value in environment.items()), *arguments]),
    }


def kept(earlier: Found | None, found: Found, run: Found) -> Found:
    """Return what is kept of a bench after it ran.

    :param earlier: what is kept of it so far.
    :param found: what it says now; `not_run` instead of figures if it measured nothing.
    :param run: `at`, machine and versions of this run.
    """
    if why := found.get("not_run"):
        return {**(earlier or {}), "unmeasured": f"Not run on {run['at']}: {why}."}
    before = None
    if earlier and all(earlier.get(one) == (found | run)[one] for one in ("machine", "arguments")):
        before = {name: earlier[name] for name in ("at", "ratios", "figures")}
    return {**found, **run, "before": before}


def remembered(last: Found) -> dict[str, Found]:
    """Return the benches of an earlier run; before each had a date and a machine of its own, one was that of all."""
    all_at = {key: last[key] for key in ("at", "machine", "postgresql", "python") if key in last}
    return {name: all_at | found for name, found in last.get("benches", {}).items()}


def number(value: float) -> str:
    """Return a figure as a reader wants it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}" if abs(value) >= 1 else f"{value:,.4f}"


def written(benches: dict[str, Found]) -> str:
    """Return the page."""
    lines = [HEAD, ""]
    for name, found in benches.items():
        lines += [f"## {name}", "", *section(name, found)]
    return "\n".join(lines)


def section(name: str, found: Found) -> list[str]:
    """Return what the page says of one bench."""
    lines = [found["unmeasured"], ""] if "unmeasured" in found else []
    if "at" not in found:
        return lines
    before = found.get("before")
    compared = f" Last time: {before['at']}." if before else ""
    lines += [
        f"`bench/{name}.py` {found['arguments']}".rstrip()
        + f", {found['at']}, {found['machine']}, PostgreSQL {found['postgresql']}, Python {found['python']}:"
        f" {found['seconds']:.0f} s; load average before it {found['load']:.2f}.{compared}",
        "",
    ]
    earlier = before or {"ratios": {}, "figures": {}}
    if found["ratios"]:
        lines += ["| ratio | found | goal | | against | last time |", "|---|---|---|---|---|---|"]
    for ratio, value in found["ratios"].items():
        goal, smaller = found["goals"][ratio], found.get("smaller", {}).get(ratio)
        verdict = ("met" if value >= goal else "missed") + (f"; not of the goal's size: {smaller}" if smaller else "")
        against = found.get("against", {}).get(ratio, "")
        last_time = _maybe(earlier["ratios"].get(ratio))
        lines.append(f"| `{ratio}` | {number(value)} | {number(goal)} | {verdict} | {against} | {last_time} |")
    lines += ["", "| figure | found | last time |", "|---|---|---|"]
    for figure, value in found["figures"].items():
        lines.append(f"| `{figure}` | {number(value)} | {_maybe(earlier['figures'].get(figure))} |")
    lines.append("")
    return lines


def _maybe(value: float | None) -> str:
    return "" if value is None else number(value)


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


def main() -> None:
    """Run what is named, or what the goals are about."""
    names = asked(sys.argv[1:])
    store = DOCS / "benchmarks.json"
    last = json.loads(store.read_text()) if store.exists() else {}
    benches = remembered(last)
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
        benches = {one: benches[one] for one in RUNS if one in benches}
        (DOCS / "benchmarks.md").write_text(written(benches))
        store.write_text(json.dumps({"benches": benches}, indent=1) + "\n")
    print(f"{len(names)} benches in {(time.perf_counter() - began) / 60:.1f} minutes")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
