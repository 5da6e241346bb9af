"""Ends what runs at a named crash point of one module, as a kill of the process would: its session ends with it."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

import pytest

from cdcsync.process import crashpoints


class Killed(Exception):
    """Stands for the end of the process: the server rolls back what its session had not committed."""


def points(module: ModuleType) -> list[str]:
    """Return the names of a module's crash points, in the order of its lines."""
    return re.findall(r'crash_point\("(.+?)"\)', inspect.getsource(module))


def kill_at(monkeypatch: pytest.MonkeyPatch, module: ModuleType, point: str | None) -> None:
    """Have the module raise `Killed` at a point, and at no other one; None takes that back."""

    def reach(reached: str) -> None:
        if reached == point:
            crashpoints.note(reached)
            raise Killed

    monkeypatch.setattr(module, "crash_point", reach)
