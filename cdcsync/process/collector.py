"""Python's garbage collector in a process that is ours alone.

Reference counts free nearly everything at once. What only the collector can free are circles, of exceptions and tasks
mostly. To find them it looks at all objects, and modules and models are some hundred thousand that stay for ever: 45 ms
each time, in which nothing else runs, and an eighth of the worker's time while it caught up. So what is loaded by
then is frozen, which the collector does not look at again.

An application that runs the worker or a search inside its own process keeps its collector as it is.

Source: Python, "gc" (freeze, set_threshold).
"""

from __future__ import annotations

import gc

THRESHOLDS = (20_000, 20, 10)
"""A batch of 5,000 rows, or a search, makes some thousand objects, and hardly any that only the collector can free."""

_ours = _kept = False


def own() -> None:
    """Say that this process is ours; `keep` then has an effect."""
    global _ours
    _ours = True
    gc.set_threshold(*THRESHOLDS)


def keep() -> None:
    """Note that what is loaded by now stays; say it again when more was loaded, or some of it was let go of.

    What was frozen before the first time, as one does before a fork, is let be.
    """
    global _kept
    if _ours:
        if _kept:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        _kept = True
