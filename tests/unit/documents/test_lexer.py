"""Words of SQL: read as the server reads them, or refused."""

from __future__ import annotations

import pytest

from cdcsync.documents.lexer import Token, Unreadable, tokens


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a -- b", "a comment"),
        ("a /* b */", "a comment"),
        ("a +-- b", "a comment"),
        ("a; DROP TABLE t", "more than one statement"),
        ("a = $1", "a parameter"),
        ("a = 'b", "character 5"),
        ("a = E'b", "is not closed"),
        ('U&"now"() > a', 'U&", .* write it plainly'),
        ('u&"b" = a', 'u&", .* write it plainly'),
        ("a = U&'b'", "U&', .* write it plainly"),
        ("a = $x$b$y$", "is not closed"),
        ('"a', "character 1"),
        ("a = \\b", "character 5"),
    ],
)
def test_what_no_condition_may_hold_is_told(text: str, what: str) -> None:
    with pytest.raises(Unreadable, match=what):
        tokens(text)


def test_words_are_read_as_the_server_does() -> None:
    assert tokens("""A."b""c"<>-1.5 AND x@-y = date'2026' AND e'\\'' = $q$;$q$ [1]""") == [
        Token("name", "a"),
        Token("mark", "."),
        Token("quoted", 'b"c'),
        Token("operator", "<>"),
        Token("operator", "-"),
        Token("number", "1.5"),
        Token("name", "and"),
        Token("name", "x"),
        Token("operator", "@-"),
        Token("name", "y"),
        Token("operator", "="),
        Token("name", "date"),
        Token("string", "2026"),
        Token("name", "and"),
        Token("other", "e'\\''"),
        Token("operator", "="),
        Token("other", "$q$;$q$"),
        Token("mark", "["),
        Token("number", "1"),
        Token("mark", "]"),
    ]
