"""Chunks: what every strategy promises, shown with a real tokenizer, and where code is cut."""

from __future__ import annotations

import json
import sys
import threading
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdcsync.config import Chunking
from cdcsync.documents.chunks import CHARACTERS_PER_TOKEN, WHITE_SPACE, Chunker, make_chunker
from cdcsync.documents.chunks.framing import portions
from cdcsync.documents.templates import hash_text
from cdcsync.errors import ConfigError
from tests.support.tokenizers import DOCUMENTS, MINILM, TOKENIZERS, count

Strategy = Literal["tokens", "characters", "markdown", "code", "none"]


@cache
def chunker(
    strategy: Strategy = "tokens",
    tokens: int = 20,
    overlap: int = 0,
    kind: str | None = "minilm",
    reads: int | None = None,
) -> Chunker:
    chunking = Chunking(strategy=strategy, max_tokens=tokens, overlap_tokens=overlap)
    return make_chunker(chunking, TOKENIZERS[kind]() if kind else None, reads)


@cache
def twin(strategy: Strategy) -> Chunker:
    """Another chunker of the same settings as `chunker(strategy, 20, 5)`."""
    return make_chunker(Chunking(strategy=strategy, max_tokens=20, overlap_tokens=5), MINILM, None)


def texts(chunker: Chunker, document: str) -> list[str]:
    return [chunk.text for chunk in chunker.split(document)]


def visible(text: str) -> str:
    return "".join(character for character in text if character not in WHITE_SPACE)


def words(number: int, first: int = 0) -> str:
    return " ".join(f"w{place}" for place in range(first, first + number))


@pytest.mark.proof_from(10)
@pytest.mark.parametrize("kind", list(TOKENIZERS))
@pytest.mark.parametrize("strategy", ["tokens", "characters", "markdown", "code"])
@settings(max_examples=40)
@given(document=DOCUMENTS, capacity=st.sampled_from([12, 40]))
def test_chunks_are_trimmed_within_the_capacity_and_hold_the_whole_document(
    strategy: Strategy, kind: str, document: str, capacity: int
) -> None:
    chunks = chunker(strategy, capacity, 0, kind, capacity).split(document)

    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert visible("".join(chunk.text for chunk in chunks)) == visible(document)
    for chunk in chunks:
        assert chunk.text
        assert chunk.text == chunk.text.strip(WHITE_SPACE)
        assert count(kind, chunk.text) <= capacity
        assert chunk.hash == hash_text(chunk.text)


@pytest.mark.parametrize("strategy", ["tokens", "markdown", "code"])
@settings(max_examples=100)
@given(document=DOCUMENTS)
def test_a_document_within_the_capacity_is_one_chunk_and_only_such(strategy: Strategy, document: str) -> None:
    trimmed = document.strip(WHITE_SPACE)
    chunks = texts(chunker(strategy, 30), document)

    assert (chunks == [trimmed]) == (bool(trimmed) and count("minilm", trimmed) <= 30)


@settings(max_examples=100)
@given(document=DOCUMENTS)
@pytest.mark.parametrize("strategy", ["tokens", "characters", "markdown", "code"])
def test_without_a_tokenizer_a_token_is_four_characters(strategy: Strategy, document: str) -> None:
    chunks = texts(chunker(strategy, 10, 0, None), document)

    assert visible("".join(chunks)) == visible(document)
    assert all(0 < len(text) <= 10 * CHARACTERS_PER_TOKEN for text in chunks)


@settings(max_examples=50)
@given(many=st.lists(DOCUMENTS, max_size=8))
@pytest.mark.parametrize("strategy", ["tokens", "characters", "markdown", "code", "none"])
def test_many_documents_are_cut_as_each_alone_and_always_alike(strategy: Strategy, many: list[str]) -> None:
    cutter = chunker(strategy, 20, 5)

    assert cutter.split_all(many) == [twin(strategy).split(document) for document in many]


@pytest.mark.parametrize("strategy", ["tokens", "characters", "markdown", "code", "none"])
@pytest.mark.parametrize("blank", ["", " \n\t", "\u3000\u2028"])
def test_white_space_alone_makes_no_chunks(strategy: Strategy, blank: str) -> None:
    assert chunker(strategy).split(blank) == []


def test_none_makes_one_chunk_of_a_document_however_long() -> None:
    document = words(5_000)
    assert texts(chunker("none", reads=254), f"  {document}\n") == [document]


@pytest.mark.parametrize("overlap", [0, 7])
@pytest.mark.parametrize("strategy", ["tokens", "markdown", "code"])
def test_neighbours_overlap_by_no_more_than_was_asked(strategy: Strategy, overlap: int) -> None:
    chunks = texts(chunker(strategy, 40, overlap), words(400))

    shared = [[word for word in after.split() if word in before.split()] for before, after in pairwise(chunks)]
    assert len(chunks) > 10
    assert all(count("minilm", " ".join(both)) <= overlap for both in shared)
    assert any(shared) == bool(overlap)


def test_the_capacity_is_never_more_than_the_model_reads() -> None:
    capped = chunker("tokens", 256, 32, reads=100)

    assert capped.capacity == 100
    assert max(count("minilm", text) for text in texts(capped, words(1_000))) <= 100


def test_the_tokenizers_own_truncation_and_padding_do_not_falsify_sizes() -> None:
    assert json.loads(MINILM)["truncation"]["max_length"] == 128

    chunks = texts(chunker("tokens", 200), words(2_000))

    assert all(150 < count("minilm", text) <= 200 for text in chunks[:-1])


def test_characters_that_make_many_tokens_are_cut_to_what_the_model_reads() -> None:
    document = "東京都庁" * 200
    limited = texts(chunker("characters", 100, 0, reads=100), document)
    unlimited = texts(chunker("characters", 100, 0), document)

    assert max(count("minilm", text) for text in limited) <= 100
    assert max(map(len, unlimited)) == 100 * CHARACTERS_PER_TOKEN


@pytest.mark.parametrize(
    ("tokens", "reads", "overlap", "hint"),
    [
        (32, None, 32, "set overlap_tokens below 32"),
        (256, 30, 31, "set overlap_tokens below 30: the model reads 30 tokens"),
        (32, None, -1, "set overlap_tokens below 32"),
    ],
)
def test_an_overlap_that_does_not_fit_is_a_config_error(
    tokens: int, reads: int | None, overlap: int, hint: str
) -> None:
    with pytest.raises(ConfigError, match=f"at most {min(tokens, reads or tokens)} tokens cannot overlap") as caught:
        make_chunker(Chunking(max_tokens=tokens, overlap_tokens=overlap), MINILM, reads, where="indexes.a.chunking")

    assert caught.value.where == "indexes.a.chunking.overlap_tokens"
    assert caught.value.hint == hint


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"model": {"type": "Nonesuch"}}'])
def test_a_tokenizer_that_cannot_be_read_is_a_config_error(broken: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        make_chunker(Chunking(), broken, None)


def test_the_fingerprint_tells_apart_whatever_changes_chunks() -> None:
    settings: list[tuple[dict[str, Any], str | None, int | None]] = [
        ({}, MINILM, None),
        ({}, MINILM, 100),
        ({}, TOKENIZERS["bpe"](), None),
        ({}, None, None),
        ({"max_tokens": 255}, MINILM, None),
        ({"overlap_tokens": 0}, MINILM, None),
        ({"strategy": "markdown"}, MINILM, None),
        ({"strategy": "code"}, MINILM, None),
        ({"strategy": "characters"}, MINILM, None),
        ({"strategy": "characters"}, MINILM, 254),
        ({"strategy": "none"}, MINILM, None),
    ]
    prints = [make_chunker(Chunking(**options), tokenizer, reads).fingerprint for options, tokenizer, reads in settings]

    assert len(set(prints)) == len(prints)
    assert prints == [
        make_chunker(Chunking(**options), tokenizer, reads).fingerprint for options, tokenizer, reads in settings
    ]


def test_the_fingerprint_ignores_truncation_and_padding() -> None:
    plain = json.dumps(json.loads(MINILM) | {"truncation": None, "padding": None}, indent=1)

    assert make_chunker(Chunking(), plain, None).fingerprint == make_chunker(Chunking(), MINILM, None).fingerprint


def test_markdown_is_cut_at_headings() -> None:
    document = f"# One\n\n{words(20)}\n\n# Two\n\n{words(20, 50)}\n\n# Three\n\n{words(20, 80)}"

    assert [text.split("\n")[0] for text in texts(chunker("markdown", 70), document)] == ["# One", "# Two", "# Three"]


PYTHON = """\
import os


def first(value):
    total = 0

    for item in value:
        total += item

    return total


def second(value):
    if value:
        return 1

    else:
        return 2


class Third:
    def method(self):
        return os.sep
"""


def test_code_is_cut_before_outermost_blocks() -> None:
    chunks = texts(chunker("code", 25), PYTHON)

    assert [text.splitlines()[0] for text in chunks] == ["import os", "def second(value):", "class Third:"]
    assert chunks[1] == "def second(value):\n    if value:\n        return 1\n\n    else:\n        return 2"


def test_code_without_blank_lines_is_cut_where_indentation_falls() -> None:
    code = "\n".join(
        f"class C{n}:\n    def m():\n        return {n}\n    def n():\n        return -{n}" for n in range(4)
    )

    assert [text.splitlines()[0] for text in texts(chunker("code", 28), code)] == [f"class C{n}:" for n in range(4)]
    assert [text.splitlines()[0] for text in texts(chunker("code", 14), code)][:3] == [
        "class C0:",
        "def n():",
        "class C1:",
    ]


def test_code_keeps_a_closing_bracket_with_its_block() -> None:
    code = "\r\n\r\n".join(f"int f{n}(int a)\r\n{{\r\n    return a + {n};\r\n\r\n}}" for n in range(6))

    chunks = texts(chunker("code", 20), code)

    assert len(chunks) == 6
    assert all(text.startswith("int f") and text.endswith("}") for text in chunks)


def test_code_is_kept_as_it_was_written() -> None:
    code = "\n".join(f"def f{n}():\n\treturn {n}   \n   \n\n" for n in range(40))

    assert all(text in code for text in texts(chunker("code", 30, 10), code))


def test_the_gil_is_free_while_documents_are_cut() -> None:
    """Threads are kept from taking turns by themselves: this one wakes only if the splitter lets go."""
    cutter, document = chunker("tokens", 100), words(5_000)
    started, done = threading.Event(), threading.Event()

    def cut() -> None:
        started.set()
        cutter.split(document)
        done.set()

    thread = threading.Thread(target=cut)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1_000)
    try:
        thread.start()
        started.wait()
        was_done = done.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()

    assert not was_done


@pytest.mark.parametrize("unit", ["x", "one sentence here. ", "a\n", "word "])
@pytest.mark.parametrize("strategy", ["tokens", "characters", "markdown"])
def test_a_huge_text_reaches_the_splitter_in_portions_and_loses_nothing(strategy: Strategy, unit: str) -> None:
    text = unit * (300_000 // len(unit))
    chunker = make_chunker(Chunking(strategy=strategy, max_tokens=64, overlap_tokens=0), None, None)

    chunks = [chunk.text for chunk in chunker.split(text)]

    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert max(map(len, chunks)) <= 64 * CHARACTERS_PER_TOKEN


@given(st.text(alphabet="ab .\n", max_size=400), st.integers(4, 60))
def test_portions_are_the_text_and_none_is_longer_than_asked(text: str, most: int) -> None:
    cut = list(portions(text, most))

    assert "".join(cut) == text
    assert all(0 < len(one) <= most for one in cut if text)
