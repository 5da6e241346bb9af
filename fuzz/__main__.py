"""Feeds arbitrary bytes to every parser of the product: `python -m fuzz --minutes 5`, or `--target decode` for one.

Each target runs in a process of its own under libFuzzer (atheris), beginning with the inputs kept in `fuzz/corpus/`;
what it finds that is new goes to `build/fuzz/`; with `--keep`, whatever reaches more code is kept. An input that breaks
a parser is written to `build/fuzz/` and printed; `python -m fuzz --target NAME FILE` runs it again. Where atheris is
missing (some versions of Python have no wheels of it), hypothesis feeds the same targets, without knowing which code
they reach.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz.inputs import keep, kept, unpack
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--keep", action="store_true", help="keep what reaches more code than the inputs kept so far")
    parser.add_argument("input", nargs="?", type=Path, help="run this input alone")
    options = parser.parse_args()
    if options.input is not None:
        TARGETS[options.target](options.input.read_bytes())
        return 0
    names = [options.target] if options.target else sorted(TARGETS)
    seconds = max(1, round(60 * options.minutes / len(names)))
    engine = "atheris" if importlib.util.find_spec("atheris") else "hypothesis"
    if options.keep and engine != "atheris":
        parser.error("--keep needs atheris: nothing else knows which code an input reaches")
    broken = [name for name in names if not _run(engine, name, seconds)]
    for name in names if options.keep else ():
        print(f"{name:<18} {len(kept(name)):>5} inputs were kept, {_merge(name)} are now")
    print(f"{engine}: {len(names)} targets, {seconds} s each; broken: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


def _run(engine: str, name: str, seconds: int) -> bool:
    found, begun = ROOT / "build" / "fuzz" / name, ROOT / "build" / "fuzz-kept" / name
    found.mkdir(parents=True, exist_ok=True)
    unpack(name, begun)
    if engine == "atheris":
        limits = (f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=4096")
        done = _python(engine, name, *limits, f"-artifact_prefix={found}/", str(found), str(begun))
    else:
        done = _python(engine, name, str(seconds))
    stats = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line or "executed" in line]
    print(
        f"{'ok  ' if done.returncode == 0 else 'FAIL'} {name:<18} {stats[-1].split()[-1] if stats else '?':>10} inputs"
    )
    if done.returncode != 0:
        print("\n".join(done.stderr.splitlines()[-25:]))
    return done.returncode == 0


def _merge(name: str) -> int:
    """Keep the smallest inputs that reach what all inputs reach together; returns how many."""
    with tempfile.TemporaryDirectory(prefix="cdcsync-fuzz-") as directory:
        build = ROOT / "build"
        _python("atheris", name, "-merge=1", directory, str(build / "fuzz-kept" / name), str(build / "fuzz" / name))
        return keep(name, [path.read_bytes() for path in Path(directory).iterdir()])


def _python(engine: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"fuzz.with_{engine}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
