"""The catalogue of properties is whole, and docs/reliability.md says what it says."""

from __future__ import annotations

import msgspec

from tests.chaos import catalogue


def test_every_property_has_a_keeper_and_attackers_that_exist() -> None:
    assert catalogue.faults() == []


def test_a_property_without_an_attacker_is_a_fault() -> None:
    bare = msgspec.structs.replace(catalogue.CATALOGUE[0], attackers=())

    assert catalogue.faults((bare,)) == [f"{bare.name} has no attacker"]


def test_the_page_is_current() -> None:
    assert catalogue.PAGE.read_text() == catalogue.page(), "run: python -m tests.chaos.catalogue"
