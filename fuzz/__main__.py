"""Feeds arbitrary bytes to every parser of the product: `python -m fuzz --minutes 5`, or `--target decode` for one.

Each target runs in a process of its own under libFuzzer (atheris), beginning with the inputs kept in `fuzz/corpus/`;
what it finds there that is new goes to `build/fuzz/`. An input that breaks a parser is written beside them and printed;
`python -m fuzz --target NAME FILE` runs it again. Where atheris is not installed (there are no wheels for some versions
of Python), hypothesis feeds the same targets, without knowing which code they reach.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[1]
CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("input", nargs="?", type=Path, help="run this input alone")
    options = parser.parse_args()
    if options.input is not None:
        TARGETS[options.target](options.input.read_bytes())
        return 0
    names = [options.target] if options.target else sorted(TARGETS)
    seconds = max(1, round(60 * options.minutes / len(names)))
    engine = "atheris" if importlib.util.find_spec("atheris") else "hypothesis"
    broken = [name for name in names if not _run(engine, name, seconds)]
    print(f"{engine}: {len(names)} targets, {seconds} s each; broken: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


def _run(engine: str, name: str, seconds: int) -> bool:
    found = ROOT / "build" / "fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    kept = CORPUS / name
    arguments = [f"-max_total_time={seconds}", f"-artifact_prefix={found}/", "-print_final_stats=1", "-max_len=4096"]
    command = [sys.executable, "-m", f"fuzz.with_{engine}", name, str(seconds)]
    if engine == "atheris":
        command = [*command[:3], name, *arguments, str(found), *([str(kept)] if kept.is_dir() else [])]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    stats = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line or "executed" in line]
    print(
        f"{'ok  ' if done.returncode == 0 else 'FAIL'} {name:<18} {stats[-1].split()[-1] if stats else '?':>10} inputs"
    )
    if done.returncode != 0:
        print("\n".join(done.stderr.splitlines()[-25:]))
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
