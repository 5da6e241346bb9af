"""An embedder of one's own: the mean of word vectors that are read from a file.

The file has a word and its numbers on each line, as GloVe and fastText publish them; fastText's files begin with a line
that says how many of both there are:

    [embedders.words]
    type = "python"
    class = "word_vectors:WordVectors"
    options = { path = "/srv/models/glove.6B.100d.txt" }

Python finds the module where it is installed, or in a directory that PYTHONPATH names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdcsync import TextRejected


class WordVectors:
    """Embeds a text as the mean of the vectors of its words."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.dimensions = next(self._lines()).count(" ")
        # What the worker tries an embedder with: by default "word", which a file may lack.
        words = (line.split(" ")[0] for line in self._lines())
        self.harmless_text = next(word for word in words if re.fullmatch(r"\w+", word) and word == word.lower())
        with self._path.open("rb") as file:
            self.identity = f"word-vectors:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}

    def open(self) -> None:
        """Read the file: the worker calls this once, before the first text."""
        for line in self._lines():
            word, *numbers = line.rsplit(" ", self.dimensions)
            self._vectors[word] = np.array(numbers, np.float32)

    def _lines(self) -> Iterator[str]:
        """Yield each line that has a word, which may hold any character but a line feed."""
        with self._path.open(encoding="utf-8", newline="\n") as file:
            for at, line in enumerate(file):
                if at > 0 or not re.fullmatch(r"\d+ \d+\s*", line):
                    yield line.rstrip()

    def embed(self, texts: Sequence[str], *, kind: str) -> list[npt.NDArray[np.float32]]:
        """Return the mean vector of each text's known words."""
        return [self._mean(re.findall(r"\w+", text.lower())) for text in texts]

    def _mean(self, words: list[str]) -> npt.NDArray[np.float32]:
        known = [self._vectors[word] for word in words if word in self._vectors]
        if not known:
            raise TextRejected("none of its words is in the file")
        mean: npt.NDArray[np.float32] = np.mean(known, axis=0)
        return mean

    def aclose(self) -> None:
        """Let go of the vectors."""
        self._vectors.clear()
