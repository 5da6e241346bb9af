"""Why an index is paused once its load has ended without success."""

from __future__ import annotations

import pytest

from cdcsync.flows.build import pause_after
from cdcsync.model.pauses import Pause
from cdcsync.model.requests import Request


def load(state: str, error: str | None = None) -> Request:
    return Request(1, "articles", "initial", False, None, state, "rows", None, 0, None, None, error=error)


@pytest.mark.parametrize("state", ["pending", "running", "paused", "done"])
def test_a_load_that_has_not_failed_pauses_nothing(state: str) -> None:
    assert pause_after(load(state)) is None


def test_a_load_that_failed_pauses_its_index_with_the_cause() -> None:
    pause = pause_after(load("failed", "the source says: not here"))
    assert isinstance(pause, Pause)
    assert str(pause).startswith("its load failed: the source says: not here")
    assert pause.remedy


def test_a_load_that_was_cancelled_names_its_remedy() -> None:
    pause = pause_after(load("cancelled"))
    assert pause is not None
    assert pause.remedy == "start the worker again to load it"
