"""Templates that turn a row into a document, and the hash that says whether the document changed.

A template is text with column names in braces: `{title}, by {author}`. NULL renders as nothing. The same
rendering exists twice: here, over values as pgoutput delivers them, and as an SQL expression, with which a server
renders its own rows so that `verify` can compare hashes without moving documents. Both must give the same text:

1. A value's text is what its type's *output function* writes; that is what pgoutput sends. A cast to `text` differs
   for some types (`true` against `t`, the trailing blanks of `char(n)`); `concat` does not, it calls output functions.
2. Settings that steer output functions (`DateStyle`, `IntervalStyle`, `TimeZone`, `extra_float_digits`,
   `bytea_output`, `xmlbinary`, `lc_monetary`) must be equal in the session that evaluates the SQL and in the
   walsender. Whoever opens those sessions sees to it.

Source: PostgreSQL, "String Functions and Operators" (concat), "Binary String Functions" (sha256),
"Logical Replication Message Formats" (TupleData).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import msgspec

from cdcsync.errors import ConfigError

HASH_BYTES = 16
"""How much of the SHA-256 is kept: 128 bits, where even texts crafted to collide need 2^64 tries."""

CONCAT_ARGUMENTS = 90
"""Arguments for one `concat`: PostgreSQL is built with FUNC_MAX_ARGS = 100, and longer templates are chained."""

_TOKEN = re.compile(
    r"""
      (?P<brace> \{\{ | \}\} )                             # a literal brace
    | \{ \s* " (?P<quoted> (?: [^"] | "" )* ) " \s* \}     # {"Any {name}"}, with "" for a quote in it
    | \{ (?P<plain> [^{}]* ) \}                            # {name}
    | (?P<stray> [{}] )
    """,
    re.VERBOSE,
)

_ESCAPES = str.maketrans({"'": "''", "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class Template(msgspec.Struct, frozen=True):
    """A parsed template: `literals[0] column literals[1] column … literals[n]`.

    Make one with `parse`. `text` is the template as written. `columns` are the names it uses, each once, in the
    order of first use. `slots[i]` says which of `columns` stands between `literals[i]` and `literals[i + 1]`.
    `layout` is the whole as a `%` format, the quickest way Python has to join a few strings.
    """

    text: str
    columns: tuple[str, ...]
    literals: tuple[str, ...]
    slots: tuple[int, ...]
    layout: str

    @classmethod
    def parse(cls, text: str, *, where: str | None = None) -> Template:
        """Read a template.

        `{name}` is a column; blanks around the name do not count. `{"name"}` is for names that hold braces or
        outer blanks, with `""` for a quote in the name. `{{` and `}}` are literal braces.

        :param where: the config key the template came from, for errors.
        :raises ConfigError: a brace has no partner, a name is empty, there is no column at all, or the text holds a
            NUL character, which PostgreSQL's text cannot.
        """
        literals = [""]
        slots: list[int] = []
        columns: dict[str, int] = {}
        end = 0
        for token in _TOKEN.finditer(text):
            literals[-1] += text[end : token.start()]
            end = token.end()
            if token["brace"]:
                literals[-1] += token["brace"][0]
                continue
            name = _column(token, where)
            slots.append(columns.setdefault(name, len(columns)))
            literals.append("")
        literals[-1] += text[end:]
        if not columns:
            raise ConfigError(
                "the template names no column",
                where=where,
                hint="put at least one column in braces, such as {title}",
            )
        if "\0" in text:
            raise ConfigError("the template holds a NUL character", where=where, hint="remove it")
        return cls.of(text, literals, [list(columns)[slot] for slot in slots])

    @classmethod
    def of(cls, text: str, literals: Sequence[str], names: Sequence[str]) -> Template:
        """Make a template of its parts: `literals[0] names[0] literals[1] …`; it may have no column at all."""
        columns = tuple(dict.fromkeys(names))
        layout = "%s".join(literal.replace("%", "%%") for literal in literals)
        return cls(text, columns, tuple(literals), tuple(columns.index(name) for name in names), layout)

    def render(self, values: Sequence[str | None]) -> str:
        """Return the document of a row.

        :param values: the row's values in the order of `columns`, as the server's output functions wrote them.
        :raises ValueError: there are not as many values as columns.
        """
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        if None in values:
            values = [value or "" for value in values]
        if len(self.slots) != len(self.columns):
            values = [values[slot] for slot in self.slots]
        return self.layout % tuple(values)

    def sql(self, quote: Callable[[str], str]) -> str:
        """Return an SQL expression that renders a row of the source table to the same text.

        It is never NULL. It holds the template's `%` as they are: double them where it becomes part of a statement
        with `%s` parameters.

        :param quote: turns a column name into SQL that reads the column: a quoted, perhaps qualified, identifier.
        """
        if not self.slots:
            return sql_text(self.literals[0])
        arguments = [sql_text(self.literals[0])] if self.literals[0] else []
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            arguments.append(quote(self.columns[slot]))
            if literal:
                arguments.append(sql_text(literal))
        calls = [
            f"pg_catalog.concat({', '.join(arguments[start : start + CONCAT_ARGUMENTS])})"
            for start in range(0, len(arguments), CONCAT_ARGUMENTS)
        ]
        return calls[0] if len(calls) == 1 else f"({' || '.join(calls)})"


class Rendering(msgspec.Struct, frozen=True, gc=False):
    """A rendered row: its document, and the text before and after each chunk; None if there is none."""

    text: str
    before: str | None = None
    after: str | None = None

    @property
    def hash(self) -> bytes:
        """Says whether anything about the row's chunks can have changed."""
        if self.before is None or self.after is None:
            return hash_text(self.text)
        # With the lengths: what moves from one part to another is a change.
        return hash_text(f"{len(self.before)} {len(self.after)} {self.before}{self.after}{self.text}")

    def around(self, chunk: str) -> str:
        """Return a chunk with what stands around it."""
        return f"{self.before or ''}{chunk}{self.after or ''}"


def hash_text(text: str) -> bytes:
    """Return the hash of a document or chunk: the first `HASH_BYTES` of the SHA-256 of its UTF-8 bytes.

    Cryptographic, because texts come from users: with a weaker hash someone could craft a text that takes over
    another's vector. A server computes the same, see `sql_hash`.
    """
    return hashlib.sha256(text.encode()).digest()[:HASH_BYTES]


def sql_hash(expression: str) -> str:
    """Return SQL (type `bytea`) that computes `hash_text` of a text expression; PostgreSQL 11 or later.

    :param expression: SQL of type `text`, such as `Template.sql` gives.
    """
    return f"pg_catalog.substring(pg_catalog.sha256(pg_catalog.convert_to({expression}, 'UTF8')), 1, {HASH_BYTES})"


def _column(token: re.Match[str], where: str | None) -> str:
    """Return the column that a token names."""
    if token["stray"] or (token["plain"] or "").lstrip().startswith('"'):
        raise ConfigError(
            f"the brace at character {token.start() + 1} of the template is not matched by another",
            where=where,
            hint='write {{ or }} for a literal brace, and {"name"} for a column name that holds braces',
        )
    name = token["plain"].strip() if token["quoted"] is None else token["quoted"].replace('""', '"')
    if not name:
        raise ConfigError(
            f"the braces at character {token.start() + 1} of the template hold no column name",
            where=where,
            hint="name a column between the braces, or write {{}} for literal braces",
        )
    return name


def sql_text(text: str) -> str:
    """Return text as an SQL string that means the same whatever `standard_conforming_strings` says."""
    escaped = text.translate(_ESCAPES)
    return f"E'{escaped}'" if "\\" in escaped else f"'{escaped}'"
