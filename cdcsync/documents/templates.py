"""Templates that turn a row into a document, and the hash that says whether the document changed.

A template is text with column names in braces: `{title}, by {author}`. NULL renders as nothing. The same
rendering exists twice: here, over values as pgoutput delivers them, and as an SQL expression, with which a server
renders its own rows so that `verify` can compare hashes without moving documents. Both must give the same text:

1. A value's text is what its type's *output function* writes; that is what pgoutput sends. A cast to `text` differs
   for some types (`true` against `t`, the trailing blanks of `char(n)`); `concat` does not, it calls output functions.
2. Settings that steer output functions (`DateStyle`, `IntervalStyle`, `TimeZone`, `extra_float_digits`,
   `bytea_output`, `xmlbinary`, `lc_monetary`) must be equal in the session that evaluates the SQL and in the
   walsender. Whoever opens those sessions sees to it.

`Documents` renders a row for one index: its document, from a template or from a function of the user's, and
what stands around each chunk of it. A function's documents cannot be said in SQL; `verify` then renders rows itself.

Source: PostgreSQL, "String Functions and Operators" (concat), "Binary String Functions" (sha256),
"Logical Replication Message Formats" (TupleData).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import msgspec

from cdcsync.config import Index
from cdcsync.config.sections import NO_FRAME
from cdcsync.documents.functions import DocumentFunction
from cdcsync.errors import ConfigError

HASH_BYTES = 16
"""How much of the SHA-256 is kept: 128 bits, where even texts crafted to collide need 2^64 tries."""

CONCAT_ARGUMENTS = 90
"""Arguments for one `concat`: PostgreSQL is built with FUNC_MAX_ARGS = 100, and longer templates are chained."""

CHUNK = "chunk"
"""The placeholder of the chunk in a `chunk_text`."""

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
            return _literal(self.literals[0])
        arguments = [_literal(self.literals[0])] if self.literals[0] else []
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            arguments.append(quote(self.columns[slot]))
            if literal:
                arguments.append(_literal(literal))
        calls = [
            f"pg_catalog.concat({', '.join(arguments[start : start + CONCAT_ARGUMENTS])})"
            for start in range(0, len(arguments), CONCAT_ARGUMENTS)
        ]
        return calls[0] if len(calls) == 1 else f"({' || '.join(calls)})"


class Rendering(msgspec.Struct, frozen=True):
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


class Frame(msgspec.Struct, frozen=True):
    """The text repeated in each chunk: `chunk_text` as written, parted at its `{chunk}`."""

    text: str
    before: Template
    after: Template

    @classmethod
    def parse(cls, text: str, *, where: str | None = None) -> Frame:
        """Read a `chunk_text`: a template in which `{chunk}` stands for the chunk.

        :raises ConfigError: it is not a template, or has not exactly one `{chunk}`.
        """
        whole = Template.parse(text, where=where)
        names = [whole.columns[slot] for slot in whole.slots]
        if names.count(CHUNK) != 1:
            raise ConfigError(
                f"{{{CHUNK}}} is there {names.count(CHUNK)} times",
                where=where,
                hint=f"say once where the chunk stands, as in {{title}}: {{{CHUNK}}}",
            )
        at = names.index(CHUNK)
        return cls(
            text,
            Template.of(text, whole.literals[: at + 1], names[:at]),
            Template.of(text, whole.literals[at + 1 :], names[at + 1 :]),
        )


class Documents(msgspec.Struct, frozen=True):
    """How one index makes documents of rows."""

    body: Template | DocumentFunction
    frame: Frame | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once; first those of the document."""
        frame = self.frame
        around = () if frame is None else (*frame.before.columns, *frame.after.columns)
        return tuple(dict.fromkeys((*self.body.columns, *around)))

    @property
    def fingerprint(self) -> str:
        """Says all that decides a row's document; under another fingerprint all are made anew."""
        body = self.body.text if isinstance(self.body, Template) else self.body.fingerprint
        return body if self.frame is None else f"{body}\0{self.frame.text}"

    @property
    def by_code(self) -> bool:
        """Whether documents are made by a function, which no server can say in SQL and which may take long."""
        return not isinstance(self.body, Template)

    def render(self, values: Sequence[str | None]) -> Rendering:
        """Render a row.

        :param values: the row's values in the order of `columns`, as the server's output functions wrote them.
        :raises DocumentError: a function fails for this row.
        """
        text = self.body.render(values[: len(self.body.columns)])
        if self.frame is None:
            return Rendering(text)
        by_name = dict(zip(self.columns, values, strict=True))
        before, after = (
            part.render([by_name[name] for name in part.columns]) for part in (self.frame.before, self.frame.after)
        )
        return Rendering(text, before, after)

    def sql(self, quote: Callable[[str], str]) -> str:
        """Return SQL of a row's document; see `Template.sql`. Not for documents made by code."""
        assert isinstance(self.body, Template)
        return self.body.sql(quote)

    def hash_sql(self, quote: Callable[[str], str]) -> str:
        """Return SQL (type `bytea`) of `Rendering.hash`. Not for documents made by code."""
        document = self.sql(quote)
        if self.frame is None:
            return sql_hash(document)
        before, after = self.frame.before.sql(quote), self.frame.after.sql(quote)
        lengths = f"pg_catalog.length({before}), ' ', pg_catalog.length({after}), ' '"
        return sql_hash(f"pg_catalog.concat({lengths}, {before}, {after}, {document})")


def make_documents(index: Index, *, where: str) -> Documents:
    """Build what makes an index's documents. A function is not imported yet.

    :param where: the config section, for errors.
    :raises ConfigError: a template cannot be read.
    """
    body: Template | DocumentFunction
    if index.documents is None:
        body = Template.parse(index.text, where=f"{where}.text")
    else:
        body = DocumentFunction(index.documents, index.document_columns, f"{where}.documents")
    if index.chunk_text == NO_FRAME:
        return Documents(body)
    return Documents(body, Frame.parse(index.chunk_text, where=f"{where}.chunk_text"))


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
            f"the brace at character {token.start() + 1} of the template has no partner",
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


def _literal(text: str) -> str:
    """Return text as an SQL string that means the same whatever `standard_conforming_strings` says."""
    escaped = text.translate(_ESCAPES)
    return f"E'{escaped}'" if "\\" in escaped else f"'{escaped}'"
