"""Bytes and words of providers: decoded or refused, and fit to be repeated."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.embedders.foreign import (
    HIDDEN,
    QUOTE_CHARACTERS,
    REASON_CHARACTERS,
    decoded,
    first_line,
    reason,
    repeatable,
)
from cdcsync.errors import EmbedError

NUMBERS = msgspec.json.Decoder(list[int])


def test_an_answer_is_decoded() -> None:
    assert decoded(b"[1, 2]", NUMBERS, "a list") == [1, 2]


@pytest.mark.parametrize("body", [b"", b"[", b'["secret"]', b"\xff\xfe", b"[" * 100_000, b"[1e999]"])
def test_an_answer_of_another_form_is_an_error_that_quotes_nothing(body: bytes) -> None:
    with pytest.raises(EmbedError) as refused:
        decoded(body, NUMBERS, "a list of numbers")
    assert refused.value.message == "the provider's answer is not a list of numbers"
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": {"message": "too long", "code": "limit"}}, "limit: too long"),
        ({"error": {"message": "too long"}}, "too long"),
        ({"error": "overloaded"}, "overloaded"),
        ({"message": "no such model"}, "no such model"),
        ({"detail": "not found"}, "not found"),
        ({"detail": [{"msg": "field required", "loc": ["input"]}]}, "field required"),
        ("plain words", "plain words"),
        ({"error": {"code": 7}}, ""),
        ([1, 2], ""),
        (None, ""),
    ],
)
def test_the_message_is_found_in_each_form_that_providers_use(answer: Any, said: str) -> None:
    assert reason(msgspec.json.encode(answer), []) == said


@pytest.mark.parametrize("body", [b"<html>504</html>", b"\xff", b'{"error"'])
def test_a_body_that_is_not_json_has_no_message(body: bytes) -> None:
    assert reason(body, []) == ""


def test_words_become_one_printable_line_of_bounded_length() -> None:
    assert repeatable("bad\r\n  input\x1b[31m\0 here") == "bad input [31m here"
    assert len(repeatable("x" * 10**6)) == REASON_CHARACTERS


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://robot:s3cr3t@hub.internal/api", "https://***@hub.internal/api"),
        ("'http://hf_token@hub.internal'", "'http://***@hub.internal'"),
        ("https://robot:s3c@r3t@hub.internal", "https://***@hub.internal"),
        ("https://hub.internal/a@b, https://x:y@z", "https://hub.internal/a@b, https://***@z"),
    ],
)
def test_the_login_in_an_address_is_never_repeated(address: str, shown: str) -> None:
    assert repeatable(f"Server error '500' for url {address}") == f"Server error '500' for url {shown}"


def test_a_library_s_advice_after_its_first_line_is_left_out() -> None:
    assert first_line(ValueError("\nno such file\nFor more information check: https://example.org")) == "no such file"


@pytest.mark.parametrize(
    ("words", "sent", "hidden"),
    [
        ("cannot embed 'the patient has a fever'", ["the patient has a fever and coughs"], True),
        ("cannot embed 'Ärger'", ["Ärger"], True),
        ("invalid key sk-1234", ["sk-1234"], True),
        ("the input is too long", ["the"], False),
        ("the input is too long", ["a text that has nothing in common"], False),
    ],
)
def test_words_that_may_quote_what_was_sent_are_hidden_as_a_whole(words: str, sent: list[str], hidden: bool) -> None:
    assert repeatable(words, sent) == (HIDDEN if hidden else words)


@given(st.text(), st.text(min_size=QUOTE_CHARACTERS))
def test_nothing_of_a_text_is_ever_repeated(words: str, text: str) -> None:
    said = repeatable(f"{words} {text} {words}", [text])
    pieces = {text[at : at + QUOTE_CHARACTERS] for at in range(len(text) - QUOTE_CHARACTERS + 1)}
    assert said.isprintable()
    assert said == HIDDEN or not any(piece in said for piece in pieces)
