"""What the garbage collector looks at in a process of ours."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from cdcsync.process import collector


@pytest.fixture(autouse=True)
def own_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    thresholds = gc.get_threshold()
    monkeypatch.setattr(collector, "_ours", False)
    monkeypatch.setattr(collector, "_kept", False)
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class Circle:
    """Only the collector can free one."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_loaded_is_not_looked_at_again_and_garbage_is_freed_before() -> None:
    Circle()
    kept = [[number] for number in range(1_000)]
    collector.own()
    collector.keep()
    assert gc.get_freeze_count() > len(kept)
    assert not any(isinstance(one, Circle) for one in gc.get_objects())
    later: list[int] = []
    looked_at = {id(one) for one in gc.get_objects()}
    assert id(kept[0]) not in looked_at
    assert id(later) in looked_at


def test_what_was_kept_and_let_go_of_is_freed_when_something_else_is_kept() -> None:
    collector.own()
    circle = Circle()
    gone = weakref.ref(circle)
    collector.keep()
    del circle
    gc.collect()
    assert gone() is not None
    collector.keep()
    assert gone() is None


def test_what_was_frozen_before_a_fork_is_not_looked_at() -> None:
    circle = Circle()
    gone = weakref.ref(circle)
    gc.freeze()
    del circle
    collector.own()
    collector.keep()
    assert gone() is not None


def test_the_collector_of_an_application_is_left_alone() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    collector.keep()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)
