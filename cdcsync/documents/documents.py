"""The document of a row in one index, and the line around each of its chunks.

The document comes from a template or from a function of the user's; rows of related tables are computed columns of the
row, see `related`. A function's documents cannot be said in SQL; `verify` then renders rows itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from cdcsync.config import Index
from cdcsync.config.sections import NO_FRAME
from cdcsync.documents.functions import DocumentFunction
from cdcsync.documents.related import LISTED, RelatedRows, computed_columns, make_related
from cdcsync.documents.templates import Rendering, Template, sql_hash
from cdcsync.errors import ConfigError

CHUNK = "chunk"
"""The placeholder of the chunk in a `chunk_text`."""


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
                f"{{{CHUNK}}} is used {names.count(CHUNK)} times",
                where=where,
                hint=f"use it once, in the place of the chunk, as in {{title}}: {{{CHUNK}}}",
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
    related: tuple[RelatedRows, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, each once; first those of the document."""
        frame = self.frame
        around = () if frame is None else (*frame.before.columns, *frame.after.columns)
        return tuple(dict.fromkeys((*self.body.columns, *around)))

    @property
    def computed(self) -> frozenset[str]:
        """The names of columns that are made of related rows."""
        return frozenset(computed_columns(self.related))

    @property
    def joined(self) -> tuple[str, ...]:
        """The columns of the index's table by which related rows are found."""
        return tuple(dict.fromkeys(theirs for one in self.related for _, theirs in one.steps[0].on))

    @property
    def fingerprint(self) -> str:
        """Says all that decides a row's document; under another fingerprint all are made anew."""
        body = self.body.text if isinstance(self.body, Template) else self.body.fingerprint
        parts = [body, *(() if self.frame is None else (self.frame.text,)), *(one.definition for one in self.related)]
        return "\0".join(parts)

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
        listed = {name + LISTED: name for name in index.document_columns if name in index.related}
        columns = tuple(name + LISTED if name in index.related else name for name in index.document_columns)
        body = DocumentFunction(index.documents, columns, f"{where}.documents", listed=listed)
    frame = None if index.chunk_text == NO_FRAME else Frame.parse(index.chunk_text, where=f"{where}.chunk_text")
    around = () if frame is None else (*frame.before.columns, *frame.after.columns)
    used = (*(body.columns if isinstance(body, Template) else ()), *around, *index.columns)
    related = make_related(index.related, used, index.document_columns, where=where)
    return Documents(body, frame, related)
