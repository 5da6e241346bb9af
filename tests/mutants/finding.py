"""Looks for a fault: runs what has to find it on a copy of the package, and reads what that says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.mutants.faults import PACKAGE, Finder, Found, Mutant

CHAOS_SEEDS = 6
"""Histories in which chaos has to find a fault that it is pointed at."""

VARYING = re.compile(r"0x[0-9a-f]+|/tmp/\S+|\b[0-9A-F]+/[0-9A-F]+\b|:\d{4,5}\b")
"""What differs from run to run: addresses, directories, positions, ports."""

SAID = 240
"""How much of a failure is kept."""


class NotFound(Exception):
    """What looked for the fault says that all is well."""


class FoundElse(Exception):
    """Something failed, but not in the words of the property; or it fails without the fault as well."""


def find(mutant: Mutant, minutes: float) -> Found:
    """Return what finding a fault took, and what was seen.

    What finds it has to pass without the fault: the same test first, or the same seeds.

    :raises NotFound: nothing fails.
    :raises FoundElse: what failed is something else.
    """
    control(mutant.found_by, mutant.fault, 1)
    with _copy() as tree:
        mutant.apply(tree / "cdcsync")
        if mutant.found_by == "tests":
            seeds, said = 0, _of_test(mutant.fault, tree)
        elif mutant.found_by == "chaos":
            seeds, said = _of_chaos(mutant.fault, CHAOS_SEEDS, tree)
        else:
            seeds, said = _of_simulation(["--minutes", str(minutes)], tree)
    if said is None:
        raise NotFound(mutant.name)
    if not re.search(mutant.words, said):
        raise FoundElse(f"says {said!r}, and not {mutant.words!r}")
    if seeds > 1:
        control(mutant.found_by, mutant.fault, seeds)
    return Found(seeds, VARYING.sub("…", said)[:SAID])


@cache
def control(finder: Finder, fault: str, seeds: int) -> None:
    """See that what is to find a fault passes without one.

    :raises FoundElse: it does not.
    """
    with _copy() as tree:
        if finder == "tests":
            said = _of_test(fault, tree)
        elif finder == "chaos":
            _, said = _of_chaos(fault, seeds, tree)
        else:
            # The seeds up to the one that failed; each takes some milliseconds.
            code = "import sys; from tests.simulation.history import run, schedule\n"
            code += f"sys.exit(next((f'{{one}}' for one in range({seeds}) if run(one, schedule(one))), 0))"
            said = _run(["-c", code], tree).stderr.strip() or None
    if said is not None:
        raise FoundElse(f"it fails without the fault, too: {said}")


def _of_test(name: str, tree: Path) -> str | None:
    """Run a test, all its cases; returns what an assertion of it says, None if it passed.

    :raises FoundElse: it neither passed nor failed by an assertion.
    """
    report = tree / "report.xml"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(PACKAGE.parent / "pyproject.toml")]
    options += ["-m", "", "-o", f"pythonpath={tree}", f"--junitxml={report}", str(PACKAGE.parent / name)]
    done = _run(["-m", "pytest", *options], tree)
    if not report.exists():
        raise FoundElse(f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return said_by_tests(report.read_text(), name)


def said_by_tests(report: str, name: str) -> str | None:
    """Return what the failure in a report in JUnit's format says, None if all its tests passed.

    :raises FoundElse: there is no test that ran, one ended by an error, or one of another name failed.
    """
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    if not [one for one in cases if one.find("skipped") is None]:
        raise FoundElse(f"no test of {name} ran")
    for one in cases:
        if (error := one.find("error")) is not None:
            raise FoundElse(f"{one.get('name')} ends by an error: {error.get('message')}")
    for one in cases:
        if (failure := one.find("failure")) is not None:
            wanted = name.partition("::")[2].partition("[")[0]
            if wanted and str(one.get("name")).partition("[")[0] != wanted:
                raise FoundElse(f"{one.get('name')} fails, and not {wanted}")
            return f"{one.get('name')}: {' '.join(str(failure.get('message')).split())}"
    return None


def _of_chaos(fault: str, seeds: int, tree: Path) -> tuple[int, str | None]:
    """Run histories until one fails; returns how many, and what that one says."""
    options = ["--only", fault, "--seeds", str(seeds), "--jobs", "1", "--until-failure"]
    done = _run(["-m", "tests.chaos", *options, "--directory", str(tree / "histories")], tree)
    if done.returncode == 0:
        return seeds, None
    return said_by_chaos(done.stdout)


def said_by_chaos(printed: str) -> tuple[int, str]:
    """Return how many histories of a campaign ran until one failed, and what that one says.

    :raises FoundElse: none failed, and yet something is wrong.
    """
    # A campaign also names the histories in which nothing was wrong.
    failure = re.search(r"^FAIL seed (\d+)", printed, re.MULTILINE)
    if failure is None:
        raise FoundElse(printed[-1000:])
    return int(failure[1]) + 1, printed[failure.start() :].splitlines()[1].strip()


def _of_simulation(options: list[str], tree: Path) -> tuple[int, str | None]:
    """Run simulated histories until one fails; returns how many, and what that one says."""
    done = _run(["-m", "tests.simulation", *options], tree)
    if done.returncode == 0:
        return 0, None
    failure = re.match(r"seed (\d+): ([^\n]*)", done.stdout)
    if failure is None:
        raise FoundElse(f"{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return int(failure[1]) + 1, failure[2]


@contextmanager
def _copy() -> Iterator[Path]:
    """Give a directory with a copy of the package, and the tests."""
    with tempfile.TemporaryDirectory(prefix="cdcsync-mutant-") as name:
        tree = Path(name)
        shutil.copytree(PACKAGE, tree / "cdcsync", ignore=shutil.ignore_patterns("__pycache__"))
        (tree / "tests").symlink_to(PACKAGE.parent / "tests")
        yield tree


def _run(arguments: list[str], tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
