"""What a worker does about a gap."""

from __future__ import annotations

import pytest

from cdcsync.config import Config, parse
from cdcsync.errors import AnotherServer, GapError
from cdcsync.flows.setup.gaps import heals
from tests.support.configs import configuration


def config(on_gap: str) -> Config:
    text = configuration("postgresql://localhost/shop", source_lines=f'on_gap = "{on_gap}"')
    return parse(text, {}, where="the test's configuration")


@pytest.mark.parametrize("on_gap", ["stop", "resync"])
def test_only_an_approval_makes_the_worker_follow_another_server(on_gap: str) -> None:
    for approved in (False, True):
        assert heals(AnotherServer("it is", server="7/1", approved=approved), config(on_gap)) is approved


def test_the_configuration_says_whether_lost_changes_are_read_again() -> None:
    assert heals(GapError("the slot is gone"), config("resync"))
    assert not heals(GapError("the slot is gone"), config("stop"))
