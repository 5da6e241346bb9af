"""cdcsync keeps a vector index equal to PostgreSQL tables, and searches it.

`__all__` is the public API, described in docs/api.md; everything else in the package may change between versions. A
name is imported when it is first used: importing `cdcsync` loads neither a database driver nor a model.
`__init__.pyi` gives type checkers the same names.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Index": "cdcsync.index",
    "Hits": "cdcsync.index",
    "Hit": "cdcsync.target.search",
    "Config": "cdcsync.config",
    "load_config": "cdcsync.config",
    "run_worker": "cdcsync.worker.run",
    "Embedder": "cdcsync.embedders",
    "CdcsyncError": "cdcsync.errors",
    "ConfigError": "cdcsync.errors",
    "UsageError": "cdcsync.errors",
    "SetupError": "cdcsync.errors",
    "EmbedderSetupError": "cdcsync.errors",
    "ModelChanged": "cdcsync.errors",
    "NotReached": "cdcsync.errors",
    "RunError": "cdcsync.errors",
    "Unavailable": "cdcsync.errors",
    "SourceUnavailable": "cdcsync.errors",
    "TargetUnavailable": "cdcsync.errors",
    "EmbedError": "cdcsync.errors",
    "EmbedderUnavailable": "cdcsync.errors",
    "TextRejected": "cdcsync.errors",
    "GapError": "cdcsync.errors",
    "LeaseLost": "cdcsync.errors",
}
"""The module of each public name."""

_RENAMED = {"load_config": "load", "run_worker": "run"}
"""The name in its module of a public name, if the two differ."""

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_PLACES[name]), _RENAMED.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
