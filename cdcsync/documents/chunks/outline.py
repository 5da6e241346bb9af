"""Cutting code between its blocks, with no knowledge of the language."""

from __future__ import annotations

import re
from bisect import bisect_right

from semantic_text_splitter import TextSplitter

from cdcsync.documents.chunks.sizes import WHITE_SPACE

CODE_RULES = 1
"""Version of the ranks in `Outline`. Part of the fingerprint: raise it with any change there."""

DEEPEST_LEVEL = 3
"""Indentation levels at which blank lines in code are told apart; deeper ones all count as this one."""

_LINE = re.compile(r"[^\r\n]+")
_CONTINUATION = re.compile(r"[)\]}]|\{\s*$|(?:end|else|elif|elsif|except|catch|finally|then|do|done|fi|esac)\b")
"""Lines that belong to the line before them: a closing bracket, a lone opening one, the next branch of a statement."""


class CodeSplitter:
    """Cuts code between its blocks, with no knowledge of the language.

    Text splitters prefer a break of many newlines to one of few. So the code is rewritten with one newline where a
    cut is worst and seven where it is best (`Outline`), cut, and the cuts are carried back to the code as it is.

    :param plain: says what fits without a cut.
    :param ranked: cuts the rewritten code.
    """

    def __init__(self, plain: TextSplitter, ranked: TextSplitter) -> None:
        self._plain = plain
        self._ranked = ranked

    def chunk_all(self, texts: list[str], /) -> list[list[str]]:
        """Cut trimmed texts; what fits stays whole."""
        pieces = self._plain.chunk_all(texts)
        long = [place for place, parts in enumerate(pieces) if len(parts) > 1]
        outlines = [Outline(texts[place]) for place in long]
        cuts = self._ranked.chunk_all_indices([outline.text for outline in outlines])
        for place, outline, parts in zip(long, outlines, cuts, strict=True):
            pieces[place] = [outline.original(start, start + len(part)) for start, part in parts]
        return pieces


class Outline:
    """Code with the rank of each line break written as its number of newlines (`text`).

    From best to worst: a blank line before an outermost line (7), before deeper ones (6, 5, 4); a line with fewer
    levels of indentation than the one before, or an outermost line after another (3, 2); any other line (1), as
    are lines that continue a statement, wherever they stand.
    """

    def __init__(self, code: str) -> None:
        lines = [(m.start(), m.group()) for m in _LINE.finditer(code) if m.group().strip(WHITE_SPACE)]
        widths = [_indentation(line) for _, line in lines]
        level_of = {width: level for level, width in enumerate(sorted(set(widths)))}
        self._code = code
        self._starts: list[int] = []
        self._origins: list[int] = []
        text: list[str] = []
        length = before = end = 0
        for (origin, line), width in zip(lines, widths, strict=True):
            level = min(level_of[width], DEEPEST_LEVEL)
            if text:
                blank = code.count("\n", end, origin) > 1 or code.count("\r", end, origin) > 1
                text.append("\n" * _rank(line, level, before, blank=blank))
                length += len(text[-1])
            self._starts.append(length)
            self._origins.append(origin)
            text.append(line)
            length += len(line)
            before, end = level, origin + len(line)
        self.text = "".join(text)

    def original(self, start: int, end: int) -> str:
        """Return the code from which `text[start:end]` was made; both ends lie within lines."""
        return self._code[self._origin(start) : self._origin(end - 1) + 1]

    def _origin(self, place: int) -> int:
        line = bisect_right(self._starts, place) - 1
        return self._origins[line] + place - self._starts[line]


def _indentation(line: str) -> int:
    """Return the width of a line's leading blanks, tabs to every fourth column."""
    columns = line.expandtabs(4)
    return len(columns) - len(columns.lstrip(" "))


def _rank(line: str, level: int, before: int, *, blank: bool) -> int:
    """Return how good a place the break before `line` is to cut: 1 (worst) to 7."""
    if _CONTINUATION.match(line.lstrip(" \t")):
        return 1
    if blank:
        return 4 + DEEPEST_LEVEL - level
    if level < before:
        return 3 if level == 0 else 2
    return 2 if level == 0 else 1
