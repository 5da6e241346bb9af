"""The known faults can still be put back, and the simulation finds some; `make mutants` has all of them found."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import assert_never

import msgspec
import pytest

from tests.chaos import commits
from tests.chaos.faults import FAULTS
from tests.mutants.__main__ import record
from tests.mutants.faults import MUTANTS, PACKAGE, UNEQUAL, Found, Mutant, found
from tests.mutants.finding import FoundElse, control, find, said_by_chaos, said_by_tests


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_a_known_fault_can_be_put_back(mutant: Mutant, tmp_path: Path) -> None:
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(PACKAGE / mutant.file, path)

    mutant.apply(tmp_path)

    ast.parse(path.read_text())
    match mutant.found_by:
        case "simulation":
            assert not mutant.fault
            assert mutant.words.startswith("^Wrong: ")
        case "chaos":
            assert mutant.fault in {*FAULTS, *commits.points()}
            assert mutant.words.startswith("^Broken: ")
        case "tests":
            file, _, test = mutant.fault.partition("::")
            assert mutant.words != UNEQUAL
            assert f"def {test.partition('[')[0]}" in (PACKAGE.parent / file).read_text()
        case _:
            assert_never(mutant.found_by)


def test_each_known_fault_is_recorded_as_found_in_the_words_of_its_property() -> None:
    by_name = {one.name: one for one in MUTANTS}

    assert found().found.keys() == by_name.keys(), "run `make mutants ARGS=--record`"
    for name, seen in found().found.items():
        assert re.search(by_name[name].words, seen.said), name


def test_a_record_is_of_one_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    record({"one": Found(3, "Wrong: this"), "another": Found(0, "that")}, path)
    record({"another": Found(0, "that again")}, path)

    assert found(path).found == {"another": Found(0, "that again")}


def test_a_fault_whose_place_is_gone_cannot_be_put_back(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("nothing of it\n")

    with pytest.raises(LookupError, match=r"a\.py has 0 times"):
        Mutant("a fault", "no loss", "a.py", "what was there", "").apply(tmp_path)


MOVED = next(one for one in MUTANTS if one.name == "a moved key leaves its old document behind")


def test_the_simulation_finds_a_fault_that_was_put_back() -> None:
    seen = find(MOVED, minutes=0.5)

    assert re.search(UNEQUAL, seen.said)


def test_a_failure_in_other_words_does_not_count() -> None:
    broken = msgspec.structs.replace(MOVED, new="            raise TimeoutError('no answer')\n")

    with pytest.raises(FoundElse, match="TimeoutError: no answer"):
        find(broken, minutes=0.5)


def test_what_fails_without_the_fault_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_fails.py").write_text("def test_it():\n    assert 1 == 2\n")

    with pytest.raises(FoundElse, match="fails without the fault, too: test_it: assert 1 == 2"):
        find(msgspec.structs.replace(MOVED, found_by="tests", fault=f"{tmp_path}/test_fails.py::test_it"), 0.5)


def test_what_does_not_run_finds_nothing() -> None:
    with pytest.raises(FoundElse, match=r"no test of|pytest ended with"):
        control("tests", "tests/mutants/none_such.py", 1)


REPORT = '<testsuites><testsuite><testcase name="test_it[a]"/>{}</testsuite></testsuites>'


def test_of_a_test_only_a_failure_of_its_own_counts() -> None:
    failed = REPORT.format('<testcase name="test_it[b]"><failure message="assert 1\n == 2"/></testcase>')
    assert said_by_tests(failed, "tests/a.py::test_it") == "test_it[b]: assert 1 == 2"
    assert said_by_tests(REPORT.format(""), "tests/a.py::test_it") is None
    with pytest.raises(FoundElse, match="and not test_other"):
        said_by_tests(failed, "tests/a.py::test_other")
    with pytest.raises(FoundElse, match="ends by an error: no server"):
        said_by_tests(
            REPORT.format('<testcase name="x"><error message="no server"/></testcase>'), "tests/a.py::test_it"
        )
    with pytest.raises(FoundElse, match="no test of"):
        said_by_tests("<testsuites><testsuite/></testsuites>", "tests/a.py::test_it")


def test_of_a_campaign_the_first_failure_counts() -> None:
    printed = "FAIL seed 2     1.0 s, 3 transactions; kill -9\n     Broken: notes: 2 chunks twice\n     /tmp/seed2\n"
    assert said_by_chaos(f"ok   seed 1 ...\n{printed}") == (3, "Broken: notes: 2 chunks twice")
    with pytest.raises(FoundElse):
        said_by_chaos("Traceback: no server")
