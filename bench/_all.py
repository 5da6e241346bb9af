"""Runs the benches one after the other, each small enough that all take 20 minutes, and writes docs/benchmarks.md.

What was found is kept in docs/benchmarks.json; a run on the same machine is compared with the last one.

    python bench/_all.py [NAME …]
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

RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "decode": ((), {}),
    "drain": ((), {"ROUNDS": "3"}),
    "apply": ((), {}),
    "native": (("keywords", "plain"), {"UPDATES": "20000"}),
    "latency": ((), {"SECONDS": "8"}),
    "tiers": (("catch_up", "steady", "search"), {"STEADY_S": "30", "SEARCH_ROWS": "50000"}),
    "waste": ((), {}),
    "backfill": (("100000",), {}),
    "related": ((), {}),
    "fan_out": ((), {}),
    "replay": ((), {}),
    "audit": ((), {}),
    "memory": ((), {"LARGE_ROWS": "300000"}),
    "scale": (("rows", "indexes", "tables"), {"MOST_ROWS": "100000"}),
}
"""The scripts with arguments and environment. Each alone, without them, does all that it can."""

PATIENCE_S = 600


def machine() -> str:
    """Say what this machine is."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} processors ({processor}), {memory_gb:.0f} GiB"


def measure(name: str) -> dict[str, Any]:
    """Run one script, and return what its last line says.

    Raises:
        ChildProcessError: The script failed.
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
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {
        "seconds": round(time.perf_counter() - began, 1),
        "load": round(load, 2),
        "arguments": " ".join([*(f"{key}={value}" for key, value in environment.items()), *arguments]),
    }


def number(value: float) -> str:
    """Return a figure as a reader wants it."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.2f}" if abs(value) >= 1 else f"{value:,.4f}"


def written(run: dict[str, Any], last: dict[str, Any]) -> str:
    """Return the page."""
    compared = last.get("machine") == run["machine"]
    lines = [
        "# Benchmarks",
        "",
        "`make bench` writes this page. Both sides of every ratio were measured in the same run; a ratio is better the",
        "higher it is. Each script under `bench/` says at its top what it does, and does more when it is run alone.",
        "",
        f"{run['machine']}, PostgreSQL {run['postgresql']}, Python {run['python']}, {run['at']}.",
        "",
        f"Compared with the run of {last['at']} on the same machine."
        if compared
        else "There is no earlier run to compare with.",
        "",
    ]
    for name, found in run["benches"].items():
        before = last.get("benches", {}).get(name, {}) if compared else {}
        lines += [
            f"## {name}",
            "",
            f"`bench/{name}.py` {found['arguments']}".rstrip()
            + f": {found['seconds']:.0f} s; load average before it {found['load']:.2f}.",
            "",
            "| ratio | found | goal | | last time |",
            "|---|---|---|---|---|",
        ]
        for ratio, value in found["ratios"].items():
            goal, earlier = found["goals"][ratio], before.get("ratios", {}).get(ratio)
            verdict = "met" if value >= goal else "missed"
            lines.append(f"| `{ratio}` | {number(value)} | {number(goal)} | {verdict} | {_maybe(earlier)} |")
        lines += ["", "| figure | found | last time |", "|---|---|---|"]
        for figure, value in found["figures"].items():
            lines.append(f"| `{figure}` | {number(value)} | {_maybe(before.get('figures', {}).get(figure))} |")
        lines.append("")
    return "\n".join(lines)


def _maybe(value: float | None) -> str:
    return "" if value is None else number(value)


def main() -> None:
    """Run what is named, or all."""
    names = sys.argv[1:] or list(RUNS)
    if unknown := set(names) - RUNS.keys():
        raise SystemExit(f"no bench is called {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    store = DOCS / "benchmarks.json"
    last = json.loads(store.read_text()) if store.exists() else {}
    version = Programs(embedded_bin_dir()).version
    run: dict[str, Any] = {
        "machine": machine(),
        "postgresql": str(version),
        "python": platform.python_version(),
        "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "benches": {},
    }
    # What is not measured now stays as it was.
    benches = dict(last["benches"]) if last.get("machine") == run["machine"] else {}
    failed: list[str] = []
    for name in names:
        try:
            benches[name] = measure(name)
        except (ChildProcessError, subprocess.TimeoutExpired) as error:
            failed.append(str(error))
            continue
        run["benches"] = {one: benches[one] for one in RUNS if one in benches}
        (DOCS / "benchmarks.md").write_text(written(run, last))
        store.write_text(json.dumps(run, indent=1) + "\n")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
