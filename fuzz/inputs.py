"""The inputs that are kept of each target: those that reach code which no smaller one of them reaches.

They are lines of base64 in `fuzz/corpus/NAME.txt`. Fuzzing begins with them, and every run of the tests feeds them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"

KEPT_BYTES = 256
"""Larger inputs are not kept: what they reach, a smaller one will reach some day."""

KEPT_INPUTS = 400
"""The smallest of each target are kept."""


def kept(name: str) -> list[bytes]:
    """Return the inputs of a target, the smallest first."""
    path = CORPUS / f"{name}.txt"
    return [base64.b64decode(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def keep(name: str, inputs: Iterable[bytes]) -> int:
    """Keep the small ones of these inputs of a target, and no others; returns how many."""
    small = sorted({one for one in inputs if len(one) <= KEPT_BYTES}, key=lambda one: (len(one), one))[:KEPT_INPUTS]
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.txt").write_text("".join(base64.b64encode(one).decode() + "\n" for one in small))
    return len(small)


def unpack(name: str, directory: Path) -> None:
    """Write each input of a target to a file of its own, as libFuzzer reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    for one in kept(name):
        (directory / hashlib.sha256(one).hexdigest()[:16]).write_bytes(one)
