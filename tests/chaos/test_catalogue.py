"""The catalogue of properties is whole, and docs/reliability.md says what it says."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.chaos import catalogue
from tests.chaos.faults import FAULTS
from tests.mutants.faults import MUTANTS

FIRST = catalogue.CATALOGUE[0]


def test_every_property_has_a_keeper_and_attackers_that_exist_and_run() -> None:
    assert catalogue.faults() == []


def test_every_fault_attacks_a_property() -> None:
    assert catalogue.idle() == []


def test_a_property_that_only_proofs_attack_is_a_fault() -> None:
    proof = next(name for name, one in catalogue.tests().items() if one.proof)
    bare = msgspec.structs.replace(FIRST, name="bare", named=(proof, "kill -9"), unbroken="nobody knows")

    assert catalogue.faults((bare,)) == ["bare has no attacker among the tests of `make test`"]


def test_a_property_needs_a_known_fault_or_a_reason() -> None:
    bare = msgspec.structs.replace(FIRST, name="bare")

    assert catalogue.faults((bare,)) == [
        "bare needs a known fault that breaks it, or the reason why there is none, and not both"
    ]


def test_a_fault_without_a_property_is_told_of() -> None:
    broken = {one.breaks for one in MUTANTS} - {FIRST.name}

    found = catalogue.idle((FIRST,))

    assert {*FAULTS} - {*FIRST.named} <= {*found}
    assert {one.name for one in MUTANTS if one.breaks in broken} <= {*found}


def test_a_test_is_a_proof_by_a_mark_of_its_own_or_of_its_file_and_not_by_one_of_its_later_cases(
    tmp_path: Path,
) -> None:
    path = tmp_path / "test_it.py"
    tests = "@pytest.mark.proof\ndef test_a(): ...\n@pytest.mark.proof_from(1)\ndef test_b(): ...\n"
    path.write_text(tests)
    assert {name: one.proof for name, one in catalogue.tests_of(path).items()} == {"test_a": True, "test_b": False}
    path.write_text(f"pytestmark = [pytest.mark.proof]\n{tests}")
    assert {one.proof for one in catalogue.tests_of(path).values()} == {True}


def test_the_page_is_current() -> None:
    assert catalogue.PAGE.read_text() == catalogue.page(), "run: python -m tests.chaos.catalogue"
