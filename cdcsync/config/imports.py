"""Importing the functions and classes that a configuration names as `package.module:Name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cdcsync.errors import CdcsyncError


def import_named(path: str, error: type[CdcsyncError], where: str) -> Callable[..., Any] | None:
    """Return the function or class of this name; None if it is something that cannot be called.

    :raises CdcsyncError: it cannot be imported; of the class `error`.
    """
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as problem:  # whatever the module does when it is imported
        raise error(
            f"{path} cannot be imported: {type(problem).__name__}: {problem}",
            where=where,
            hint="install the module where cdcsync runs, or name its directory in PYTHONPATH",
        ) from problem
    return found if callable(found) else None
