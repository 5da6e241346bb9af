"""Names of PostgreSQL objects as a configuration file writes them.

Two spellings exist. A *plain* name (a column, a publication, the target schema) is the object's name and
nothing else: case counts and no quotes are needed. A *qualified* name (a table, a view) is written as in
SQL, because it may hold a dot: `schema.table`, `"My Schema"."Tab.le"`.

Source: PostgreSQL, "Identifiers and Key Words" and appendix "SQL Key Words".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from cdcsync.errors import ConfigError

MAX_NAMES = 8
"""How many names a message lists: what a person takes in at once."""

MAX_NAME_BYTES = 63
"""PostgreSQL keeps NAMEDATALEN - 1 bytes of a name and silently cuts the rest, so a longer one is another name."""

DEFAULT_SCHEMA = "public"
"""Where an unqualified table or view lives. The session's search_path is not asked: it differs between roles."""

BESIDE = "~other"
"""How the name of the index ends that stands beside another one, with chunks of its own; see docs/decisions/0012. No
name in a configuration has such a letter."""

WHOLE_ROW = "*"
"""Stands among the columns that a condition reads for the row as a whole, with every column that it will have."""

_RESERVED = """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation
    column concurrently constraint create cross current_catalog current_date current_role current_schema
    current_time current_timestamp current_user default deferrable desc distinct do else end except false fetch for
    foreign freeze from full grant group having ilike in initially inner intersect into is isnull join lateral
    leading left like limit localtime localtimestamp natural not notnull null offset on only or order outer overlaps
    placing primary references returning right select session_user similar some symmetric system_user table
    tablesample then to trailing true union unique user using variadic verbose when where window with
"""
RESERVED_WORDS = frozenset(_RESERVED.split())
"""Words that name a schema or table only in quotes: catcode R and T in `pg_get_keywords()` of PostgreSQL 18."""

_QUOTED = r'"(?:[^"]|"")+"'
_UNQUOTED = r"[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*"
_SPACE = " \t\n\r\f\v"
"""The characters that PostgreSQL's scanner takes for space; any other Unicode space is a letter to it."""
_QUALIFIED = re.compile(rf"(?:({_QUOTED}|{_UNQUOTED})[{_SPACE}]*\.[{_SPACE}]*)?({_QUOTED}|{_UNQUOTED})")
_NEEDS_NO_QUOTES = re.compile(r"[a-z_][a-z0-9_$]*")
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
"""PostgreSQL folds only ASCII letters when the encoding has several bytes a character."""


class QualifiedName(msgspec.Struct, frozen=True, order=True):
    """A table's or view's name with its schema, as PostgreSQL stores them: unquoted and unfolded.

    :param schema: the schema's name.
    :param name: the name within the schema.
    """

    schema: str
    name: str

    @classmethod
    def of_patterns(cls, patterns: Sequence[str]) -> Self:
        """Return the name that stands for all tables whose names match one of these patterns."""
        return cls("", ", ".join(patterns))

    @property
    def patterns(self) -> tuple[QualifiedName, ...]:
        """The patterns that it stands for, in which * is any number of letters; none for the name of one table."""
        parted = [one.partition(".") for one in self.name.split(", ")] if not self.schema else ()
        return tuple(QualifiedName(schema, table) for schema, _, table in parted)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name` or `schema.name`, each part quoted or not, by SQL's rules.

        Unquoted parts are folded to lower case; without a schema it is `public`.

        :raises ConfigError: the text is not such a name, or a part is longer than PostgreSQL keeps.
        """
        match = _QUALIFIED.fullmatch(text.strip(_SPACE))
        if match is None:
            raise ConfigError(
                f'expected a name such as articles, public.articles or "My Schema"."Tab.le", got {text!r}',
                hint="quote each part by itself, and double a quote inside a quoted part",
            )
        schema, name = match.groups()
        found = cls(DEFAULT_SCHEMA if schema is None else _unquote(schema), _unquote(name))
        for part in (found.schema, found.name):
            if fault := plain_name_fault(part):
                raise ConfigError(fault, hint="use the name that the server shows in pg_class")
        return found

    def __str__(self) -> str:
        return self.name if not self.schema else f"{quote(self.schema)}.{quote(self.name)}"


def _unquote(part: str) -> str:
    if part.startswith('"'):
        return part[1:-1].replace('""', '"')
    return part.translate(_ASCII_LOWER)


def beside_name(index: str) -> str:
    """Return the name of the index that stands beside an index."""
    return index + BESIDE


def own_name(index: str) -> str:
    """Return the name that an index is searched by: of one that stands beside another, that of the other."""
    return index.removesuffix(BESIDE)


def quote(name: str) -> str:
    """Return the name as SQL text, in quotes only where SQL would read it differently without them."""
    if _NEEDS_NO_QUOTES.fullmatch(name) and name not in RESERVED_WORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


def named(names: Iterable[str]) -> str:
    """Return names as a list to read, cut where it gets long."""
    names = list(names)
    left = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {left} more" if left > 0 else "")


def plain_name_fault(name: str) -> str | None:
    """Say what keeps the text from being a PostgreSQL name, or None when it is one."""
    if not name:
        return "expected a name, got nothing"
    if "\0" in name:
        return "a name cannot hold a zero byte"
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        return f"{name!r} is {size} bytes long; PostgreSQL keeps {MAX_NAME_BYTES} bytes of a name"
    return None
