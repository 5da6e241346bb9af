"""How local models on processors share them: calls at a time, and texts of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MOST_CALLS = 8
"""Calls that run at a time on processors, each on threads of its own. Threads that share one call wait for each other
in busy loops, many times a call: measured with MiniLM, the same texts took two threads that share calls 14 s of
processor time, and 6 s with a call each. Beyond this number, Python's own lock would be what calls wait for."""

PASS_TOKENS = 1_024
"""Tokens of one forward pass on a processor, padding counted: what it computes with then stays in its caches. Measured
with MiniLM on documentation, in processor time for the same texts: 2.2 s, with twice as many tokens 2.5 s, and by
passes of 8, 16 and 32 texts sorted by characters 2.3, 2.7 and 3.5 s."""


def passes(lengths: Sequence[int], most_texts: int, most_tokens: int | None) -> Iterator[list[int]]:
    """Yield the places of the texts of each forward pass: texts of about the same length, the longest first.

    :param most_tokens: of one pass, padding counted; a text that alone has more is a pass of its own.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        texts = most_texts if most_tokens is None else min(most_texts, most_tokens // max(1, lengths[order[start]]))
        yield order[start : start + max(1, texts)]
        start += max(1, texts)
