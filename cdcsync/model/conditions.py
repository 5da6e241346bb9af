"""Conditions in SQL that say which rows an index has: what they name, and those that a row's own values decide.

PostgreSQL decides every condition. For the few forms below its answer follows from the text of the values alone, so
that the worker need not ask:

    column IS [NOT] NULL                            any type that is not a row type
    column, NOT column, column IS [NOT] TRUE | FALSE | UNKNOWN      boolean
    column = | <> | != constant                     text, varchar and integers
    column IS [NOT] DISTINCT FROM constant
    column [NOT] IN (constant, …)
    … AND …, and parentheses around each

A condition of any other form is left to the server, which reads the row again by its key.

Source: PostgreSQL, "Comparison Functions and Operators", "Boolean Type".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from cdcsync.config.names import WHOLE_ROW
from cdcsync.documents.lexer import ROW, Kind, Token, named_columns, reads_row
from cdcsync.pgoutput.messages import UNCHANGED, Value

ColumnKind = Literal["text", "integer", "boolean", "plain", "row"]
"""How a condition can compare a column's values: `text` values are equal if their bytes are, of `plain` ones it only
tells whether they are NULL, and a `row` can be NULL in each of its parts."""

WORDS_WITH_A_VALUE = frozenset(
    (
        "current_catalog",
        "current_date",
        "current_role",
        "current_schema",
        "current_time",
        "current_timestamp",
        "current_user",
        "default",
        "false",
        "localtime",
        "localtimestamp",
        "null",
        "session_user",
        "system_user",
        "true",
        "user",
    )
)
"""Words that name a column only if they are quoted, because they have a value themselves."""


class Term(msgspec.Struct, frozen=True):
    """A part of a condition that one value decides: whether it is among `values`, or NULL.

    :ivar column: the place of the value among `Where.deciding`.
    :ivar inside: whether the term holds for values that are among `values`, or for the others.
    :ivar null: whether it holds for NULL.
    """

    column: int
    values: frozenset[str]
    inside: bool
    null: bool

    def holds(self, value: Value) -> bool | None:
        """Say whether the term holds for a value; None if that value has to be read again."""
        if value is None:
            return self.null
        if value is UNCHANGED:
            # What TOAST holds is not NULL.
            return None if self.values else not self.inside
        return (value in self.values) == self.inside


class Where(msgspec.Struct, frozen=True):
    """Which rows an index has.

    :ivar text: the condition as it is configured.
    :ivar columns: the columns that it may read.
    :ivar deciding: the columns whose values decide it here.
    :ivar terms: what has to hold for them, all of it; None if only the server can decide it.
    """

    text: str
    columns: tuple[str, ...] = ()
    deciding: tuple[str, ...] = ()
    terms: tuple[Term, ...] | None = None

    def holds(self, values: Sequence[Value]) -> bool | None:
        """Say whether a row is one of the index's; None if only the server can tell.

        :param values: those of the columns `deciding`.
        """
        if self.terms is None:
            return None
        outcomes = [term.holds(values[term.column]) for term in self.terms]
        return False if False in outcomes else None if None in outcomes else True


def columns_read(words: Sequence[Token], columns: Mapping[str, object]) -> tuple[str, ...]:
    """Return the columns that a condition may read: those that it names, and the whole row if it names that."""
    return (*named_columns(words, columns), *([WHOLE_ROW] if reads_row(words, ROW) else []))


def understood(text: str, words: Sequence[Token], columns: Mapping[str, ColumnKind], *, utf8: bool) -> Where:
    """Return a condition that the server has accepted, with how it is decided here if it can be.

    :param columns: the columns whose values the stream brings.
    :param utf8: whether the server's encoding is UTF-8. In another one, two characters may become the same.
    """
    where = Where(text, columns_read(words, columns))
    try:
        terms = _Reader(words, columns, utf8=utf8).conjunction()
    except _ServersChoice:
        return where
    deciding = tuple(dict.fromkeys(column for column, _ in terms))
    placed = tuple(msgspec.structs.replace(term, column=deciding.index(column)) for column, term in terms)
    return msgspec.structs.replace(where, deciding=deciding, terms=placed)


class _ServersChoice(Exception):
    """The condition has a form that only the server decides."""


_INTEGER = re.compile(r"[0-9]{1,19}")
_WORD_VALUES = {"true": "t", "false": "f"}


class _Reader:
    """Reads a condition's words from left to right."""

    def __init__(self, words: Sequence[Token], columns: Mapping[str, ColumnKind], *, utf8: bool) -> None:
        self._words = words
        self._columns = columns
        self._utf8 = utf8
        self._at = 0

    def conjunction(self) -> list[tuple[str, Term]]:
        terms = self._terms()
        if self._at < len(self._words):
            raise _ServersChoice
        return terms

    def _terms(self) -> list[tuple[str, Term]]:
        terms = self._term()
        while self._taken("name", "and"):
            terms += self._term()
        return terms

    def _term(self) -> list[tuple[str, Term]]:
        if self._taken("mark", "("):
            terms = self._terms()
            self._expect("mark", ")")
            return terms
        if self._taken("name", "not"):
            column, kind = self._column()
            self._end_of_term()
            return [(column, _boolean(kind, "f", inside=True, null=False))]
        column, kind = self._column()
        return [(column, self._test(kind))]

    def _end_of_term(self) -> None:
        """See to it that nothing binds closer to what was read than an AND does."""
        word = self._peek()
        if word is not None and word not in (Token("name", "and"), Token("mark", ")")):
            raise _ServersChoice

    def _test(self, kind: ColumnKind) -> Term:
        if self._taken("name", "is"):
            term = self._is(kind)
        elif self._taken("operator", "="):
            term = Term(0, frozenset([self._constant(kind)]), inside=True, null=False)
        elif self._taken("operator", "<>") or self._taken("operator", "!="):
            term = Term(0, frozenset([self._constant(kind)]), inside=False, null=False)
        elif self._taken("name", "in"):
            term = Term(0, self._constants(kind), inside=True, null=False)
        elif self._taken("name", "not"):
            self._expect("name", "in")
            term = Term(0, self._constants(kind), inside=False, null=False)
        else:
            term = _boolean(kind, "t", inside=True, null=False)
        self._end_of_term()
        return term

    def _is(self, kind: ColumnKind) -> Term:
        negated = self._taken("name", "not")
        if self._taken("name", "distinct"):
            self._expect("name", "from")
            return Term(0, frozenset([self._constant(kind)]), inside=negated, null=not negated)
        if self._taken("name", "null"):
            if kind == "row":
                raise _ServersChoice
            return Term(0, frozenset(), inside=not negated, null=not negated)
        if self._taken("name", "unknown"):
            _boolean(kind, "", inside=True, null=True)
            return Term(0, frozenset(), inside=not negated, null=not negated)
        for word, value in _WORD_VALUES.items():
            if self._taken("name", word):
                return _boolean(kind, value, inside=not negated, null=negated)
        raise _ServersChoice

    def _constants(self, kind: ColumnKind) -> frozenset[str]:
        self._expect("mark", "(")
        values = {self._constant(kind)}
        while self._taken("mark", ","):
            values.add(self._constant(kind))
        self._expect("mark", ")")
        return frozenset(values)

    def _constant(self, kind: ColumnKind) -> str:
        """Return the constant that comes next, as the column's output function writes it."""
        minus = kind == "integer" and self._taken("operator", "-")
        word = self._peek()
        self._at += 1
        match kind, word:
            case "text", Token(kind="string", text=text) if self._utf8 or text.isascii():
                return text
            case "integer", Token(kind="number", text=text) if _INTEGER.fullmatch(text):
                return str(-int(text) if minus else int(text))
            case "boolean", Token(kind="name", text="true" | "false" as text):
                return _WORD_VALUES[text]
            case _:
                raise _ServersChoice

    def _column(self) -> tuple[str, ColumnKind]:
        word = self._peek()
        self._at += 1
        if word is None or word.text not in self._columns:
            raise _ServersChoice
        if word.kind != "quoted" and (word.kind != "name" or not word.text.isascii()):
            raise _ServersChoice
        if word.kind == "name" and word.text in WORDS_WITH_A_VALUE:
            raise _ServersChoice
        return word.text, self._columns[word.text]

    def _peek(self) -> Token | None:
        return self._words[self._at] if self._at < len(self._words) else None

    def _taken(self, kind: Kind, text: str) -> bool:
        if self._peek() == Token(kind, text):
            self._at += 1
            return True
        return False

    def _expect(self, kind: Kind, text: str) -> None:
        if not self._taken(kind, text):
            raise _ServersChoice


def _boolean(kind: ColumnKind, value: str, *, inside: bool, null: bool) -> Term:
    if kind != "boolean":
        raise _ServersChoice
    return Term(0, frozenset([value]), inside=inside, null=null)
