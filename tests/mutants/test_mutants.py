"""The known faults can still be put back, and the simulation finds some; `make mutants` has all of them found."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import assert_never

import pytest

from tests.chaos import commits
from tests.chaos.faults import FAULTS
from tests.mutants.__main__ import find
from tests.mutants.faults import MUTANTS, PACKAGE, Mutant, found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_a_known_fault_can_be_put_back(mutant: Mutant, tmp_path: Path) -> None:
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    shutil.copy(PACKAGE / mutant.file, path)

    mutant.apply(tmp_path)

    ast.parse(path.read_text())
    match mutant.found_by:
        case "simulation":
            assert not mutant.fault
        case "chaos":
            assert mutant.fault in {*FAULTS, *commits.points()}
        case "tests":
            file, _, test = mutant.fault.partition("::")
            assert f"def {test.partition('[')[0]}" in (PACKAGE.parent / file).read_text()
        case _:
            assert_never(mutant.found_by)


def test_what_is_recorded_is_of_known_faults_that_were_found() -> None:
    took = found()

    assert took.keys() <= {one.name for one in MUTANTS}
    assert None not in took.values()


def test_a_fault_whose_place_is_gone_cannot_be_put_back(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("nothing of it\n")

    with pytest.raises(LookupError, match=r"a\.py has 0 times"):
        Mutant("a fault", "a.py", "what was there", "").apply(tmp_path)


def test_the_simulation_finds_a_fault_that_was_put_back() -> None:
    (mutant,) = (one for one in MUTANTS if one.name == "a moved key leaves its old document behind")

    seeds, _ = find(mutant, minutes=0.5)

    assert seeds is not None
