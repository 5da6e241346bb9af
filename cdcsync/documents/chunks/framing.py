"""Cutting documents whose chunks all repeat a line, such as the title: `chunk_text`.

What is repeated takes room in each chunk, and each row's takes another amount. A splitter is made for one capacity and
holds a tokenizer, so there are only a few of them: room is set aside in steps of an eighth of the capacity. That two
texts put together have no more tokens than both apart holds for common tokenizers and templates, but not for all: what
comes out is measured, and cut again with more room set aside where it does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import msgspec

from cdcsync.documents.chunks.sizes import CHARACTERS_PER_TOKEN, WHITE_SPACE
from cdcsync.documents.templates import Rendering

STEPS = 8
"""Into how many parts the capacity is divided for setting room aside: finer wastes less of it and takes more memory."""

PORTION_CHARACTERS = 32 * 1024
PORTION_CHUNKS = 8
"""A long text is cut in portions first, of so many characters or so many full chunks, whichever is more: the splitter
takes a time that grows with the square of a text's length, for ten million letters without structure hours. Chunks do
not overlap from one portion to the next."""

ENDS = ("\n\n", "\n", ". ", " ")
"""Where a portion may end, the best first."""

SHARE = 2
"""The repeated text may take up to 1/SHARE of the capacity; a longer line is cut."""


class Cutter:
    """Cuts trimmed texts within one capacity.

    :param surely_fits: says of a text that it fits, without measuring it; may say no of one that does.
    :param chunk_all: cuts texts.
    :param capacity: the most tokens of a chunk.
    """

    def __init__(
        self, surely_fits: Callable[[str], bool], chunk_all: Callable[[list[str]], list[list[str]]], capacity: int
    ) -> None:
        self._most_characters = max(PORTION_CHARACTERS, PORTION_CHUNKS * capacity * CHARACTERS_PER_TOKEN)
        self._surely_fits = surely_fits
        self._chunk_all = chunk_all

    def cut(self, texts: Sequence[str], most: int | None = None) -> list[list[str]]:
        """Return the chunks of each text; what fits stays whole.

        :param most: how many chunks of a text are wanted: of a long one, no more is cut than makes so many.
        """
        cut = [[text] for text in texts]
        long = [
            (place, part)
            for place, text in enumerate(texts)
            if not self._surely_fits(text)
            for part in islice(self._portions(text), most)
        ]
        for place, _ in long:
            cut[place] = []
        if long:
            for (place, _), chunks in zip(long, self._chunk_all([part for _, part in long]), strict=True):
                cut[place] += chunks
        return cut

    def _portions(self, text: str) -> Iterator[str]:
        """Yield the portions of a text, each of which makes at least one chunk."""
        return (part for part in portions(text, self._most_characters) if part.strip(WHITE_SPACE))

    def fits(self, text: str) -> bool:
        """Say whether a trimmed text fits."""
        return not text or self._surely_fits(text) or len(self.cut([text], 2)[0]) == 1


def portions(text: str, most_characters: int) -> Iterator[str]:
    """Yield a text in portions of at most so many characters.

    They end where a paragraph, a line, a sentence or a word does, if one ends in the last quarter of the portion.
    """
    start = 0
    while len(text) - start > most_characters:
        stop = start + most_characters
        for end in ENDS:
            at = text.rfind(end, stop - most_characters // 4, stop)
            if at >= 0:
                stop = at + len(end)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


class _Piece(msgspec.Struct):
    """A piece to be cut, what is to stand around its chunks, and how much room was set aside for that, in steps."""

    around: Rendering
    text: str
    steps: int


def cut_framed(
    pieces: Sequence[tuple[Rendering, str]], capacity: int, cutter: Callable[[int], Cutter], most: int | None
) -> list[list[str]]:
    """Cut pieces of documents, each chunk with what stands around it and none longer than the capacity.

    :param pieces: each with the document that it is of.
    :param cutter: makes the cutter for a number of tokens.
    :param most: how many chunks of a piece are wanted.
    """
    step = max(1, capacity // STEPS)
    whole = cutter(capacity)
    known: dict[int, tuple[Rendering, int]] = {}
    waiting: dict[int, _Piece] = {}
    done: list[list[str]] = [[] for _ in pieces]
    for place, (document, text) in enumerate(pieces):
        together = document.around(text).strip(WHITE_SPACE)
        if whole.fits(together):
            done[place] = [together]
            continue
        if id(document) not in known:
            known[id(document)] = _room(document, capacity, step, cutter)
        waiting[place] = _Piece(known[id(document)][0], text, known[id(document)][1])
    while waiting:
        for steps in {piece.steps for piece in waiting.values()}:
            places = [place for place, piece in waiting.items() if piece.steps == steps]
            room = capacity - steps * step
            cut = cutter(room).cut([waiting[place].text for place in places], most)
            for place, parts in zip(places, cut, strict=True):
                piece = waiting[place]
                chunks = [piece.around.around(part).strip(WHITE_SPACE) for part in parts]
                if all(map(whole.fits, chunks)):
                    done[place] = chunks
                elif room - step > capacity // STEPS:
                    piece.steps += 1
                    continue
                else:  # no room helps: the line is worth less than that the model reads everything
                    done[place] = [part for parts in whole.cut(chunks) for part in parts]
                del waiting[place]
    return done


def _room(document: Rendering, capacity: int, step: int, cutter: Callable[[int], Cutter]) -> tuple[Rendering, int]:
    """Return what is to stand around each chunk, cut if it is too long, and how many steps of room it takes."""
    line = document.around("").strip(WHITE_SPACE)
    for steps in range(capacity // step // SHARE + 1):
        if not line or (steps and cutter(steps * step).fits(line)):
            return document, steps
    before = cutter(capacity // SHARE).cut([line])[0][0]
    return Rendering("", f"{before}\n", ""), capacity // step // SHARE
