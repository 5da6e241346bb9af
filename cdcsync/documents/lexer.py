"""The words of a piece of SQL that a configuration holds, and what it may read by them.

Source: PostgreSQL, "Lexical Structure"; src/backend/parser/scan.l.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

Kind = Literal["name", "quoted", "string", "number", "operator", "mark", "other"]


class Token(msgspec.Struct, frozen=True):
    """A word of SQL.

    :ivar text: a name as the server stores it, a string's content, or else the characters as they stand.
    """

    kind: Kind
    text: str


_LETTER = "A-Za-z_\u0080-\U0010ffff"
_TOKEN = re.compile(
    rf"""
      (?P<blank> [\ \t\n\r\f\v]+ )
    | (?P<comment> -- | /\* )
    | (?P<coded> [uU]& ['"] )
    | (?P<other> [eEbBxXnN]' | \$[0-9] | \$ (?: [{_LETTER}][{_LETTER}0-9]* )? \$ )
    | ' (?P<string> (?: [^'] | '' )* ) '
    | " (?P<quoted> (?: [^"] | "" )+ ) "
    | (?P<number> [0-9] [0-9A-Za-z_]* (?: \. [0-9]* )? | \. [0-9]+ )
    | (?P<name> [{_LETTER}] [{_LETTER}0-9$]* )
    | (?P<mark> [()\[\],.;:] )
    | (?P<operator> [-+*/<>=~!@\#%^&|`?]+ )
    """,
    re.VERBOSE,
)
_ONLY_OPERATORS = frozenset("~!@#%^&|`?")

ROW = "t"
"""What the table is called in the statements that ask a condition."""


class Unreadable(Exception):
    """A text holds what no condition may, or what this lexer does not know; the argument says what."""


def tokens(text: str) -> list[Token]:
    """Return the words of a condition.

    Strings with escapes, of bits or between dollar signs are one token of the kind `other`, and so is all that follows
    them: such a condition is for the server, and the names in it are looked for in what remains.

    :raises Unreadable: it holds a comment, several statements, a parameter or `U&`, or something is not closed.
    """
    found: list[Token] = []
    at = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise Unreadable(f"it cannot be read from character {at + 1} on")
        at = token.end()
        kind = str(token.lastgroup)
        match kind:
            case "blank":
                continue
            case "comment":
                raise Unreadable("it holds a comment")
            case "coded":
                raise Unreadable(f"it holds {token['coded']}, and what that spells is not looked up: write it plainly")
            case "string":
                found.append(Token("string", token["string"].replace("''", "'")))
            case "quoted":
                found.append(Token("quoted", token["quoted"].replace('""', '"')))
            case "name":
                found.append(Token("name", _folded(token["name"])))
            case "other":
                at = _end_of_other(text, token)
                found.append(Token("other", text[token.start() : at]))
            case "operator":
                found += [Token("operator", one) for one in _operators(token["operator"])]
            case "mark":
                if token["mark"] == ";":
                    raise Unreadable("it holds more than one statement")
                found.append(Token("mark", token["mark"]))
            case _:
                found.append(Token("number", token[0]))
    return found


def _folded(name: str) -> str:
    """Return a name without quotes as the server stores it; with letters beyond ASCII that depends on the server."""
    return name.translate({at: at + 32 for at in range(65, 91)})


def _operators(text: str) -> Iterator[str]:
    """Part a run of signs as the server does: an operator ends in + or - only if it has certain other signs."""
    if "--" in text or "/*" in text:
        raise Unreadable("it holds a comment")
    rest = len(text)
    if not _ONLY_OPERATORS & set(text):
        while rest > 1 and text[rest - 1] in "+-":
            rest -= 1
    yield text[:rest]
    yield from text[rest:]


def _end_of_other(text: str, token: re.Match[str]) -> int:
    opening = token["other"]
    if opening.startswith("$"):
        if opening[-1] != "$":
            raise Unreadable("it holds a parameter")
        end = text.find(opening, token.end())
        length = len(opening)
    else:
        escapes = r"(?:[^'\\]|\\.|'')*" if opening[0] in "eE" else rf"(?:[^{opening[-1]}]|{opening[-1] * 2})*"
        closing = re.compile(escapes + opening[-1], re.DOTALL).match(text, token.end())
        end, length = (-1, 0) if closing is None else (closing.end(), 0)
    if end < 0:
        raise Unreadable("a string is not closed")
    return end + length


def names(words: Sequence[Token]) -> list[str]:
    """Return the words that may be names, keywords among them."""
    return [word.text for word in words if word.kind in ("name", "quoted")]


def named_columns(words: Sequence[Token], columns: Mapping[str, object]) -> tuple[str, ...]:
    """Return the columns that a condition may name: those whose names it holds."""
    return tuple(dict.fromkeys(name for name in names(words) if name in columns))


def reads_row(words: Sequence[Token], called: str) -> bool:
    """Say whether a piece of SQL may read a row as a whole, by what the statement calls its table: `t` or `t.*`."""
    return any(part is None or part == Token("operator", "*") for part in parts_of_row(words, called))


def parts_of_row(words: Sequence[Token], called: str = ROW) -> Iterator[Token | None]:
    """Yield what is read by what the statement calls the table: the `part` of `t.part`, or None for `t` alone."""
    dot = Token("mark", ".")
    for at, word in enumerate(words):
        if word.text == called and word.kind in ("name", "quoted") and (at == 0 or words[at - 1] != dot):
            yield words[at + 2] if words[at + 1 : at + 2] == [dot] and at + 2 < len(words) else None
