"""A judged collection that ships with the demo: the first line of a docstring should find the entry that it is from.

Such questions are easier than people's, since their words are in the text. They need no judge, fit whatever Python
runs the demo, and show what `cdcsync evaluate --judged` tells of an index.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdcsync.demo.corpus import Entry
from cdcsync.flows.evaluate.collection import Collection

QUESTIONS = 60
"""A few seconds of searching, and intervals that are narrow enough to read."""

MIN_WORDS = 4
"""Shorter first lines ("Return self.") could be of any entry."""


def summaries(entries: Sequence[Entry]) -> Collection:
    """Return questions about some entries, evenly spread; a first line that several entries share is left out."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        line = entry.doc.partition("\n")[0].strip()
        if len(line.split()) >= MIN_WORDS:
            found.setdefault(line, []).append(f"{entry.module},{entry.name}")
    unique = [(line, keys[0]) for line, keys in found.items() if len(keys) == 1]
    chosen = unique[:: max(1, len(unique) // QUESTIONS)][:QUESTIONS]
    return Collection(
        "first lines of docstrings",
        {str(number): line for number, (line, _) in enumerate(chosen, 1)},
        {str(number): {key: 1} for number, (_, key) in enumerate(chosen, 1)},
    )
