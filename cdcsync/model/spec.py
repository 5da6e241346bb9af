"""A complete description of an index: its configuration together with the facts of its table and its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from cdcsync.config import Index, QualifiedName
from cdcsync.config.names import own_name
from cdcsync.config.values import Distance as Distance
from cdcsync.documents.documents import Documents
from cdcsync.documents.related import TableFacts
from cdcsync.documents.templates import Rendering
from cdcsync.model.conditions import Where
from cdcsync.model.links import Link, links_of
from cdcsync.model.rows import Row, Shape

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class IndexSpec(msgspec.Struct, frozen=True):
    """The specification of one index: its configuration with the facts of its table and its model."""

    name: str
    config: Index
    shape: Shape
    documents: Documents
    source_key_types: tuple[str, ...]
    """The key's types on the source, for comparing there."""
    key_types: tuple[str, ...]
    """The key's types in the target."""
    carried_types: tuple[str, ...]
    model: str
    dimensions: int
    distance: Distance
    fingerprint: str
    """Identifies how documents and chunks are made: when it changes, every document is chunked again."""
    row_filter: str | None = None
    """The publication's condition on the rows that it sends."""
    where: Where | None = None
    """The index's condition on the rows that it has."""
    generation: int = 1
    table_oid: int = 0
    """The table's OID on the source: a table that was dropped and created again under its name has another one."""
    facts: dict[QualifiedName, TableFacts] = {}
    """Facts about the index's table and related ones for the statements, if there are related ones."""
    oids: dict[QualifiedName, int] = {}
    """The OIDs of the tables that the index reads, if it has related ones or is of many: its own among them."""
    collations: dict[str, dict[str, str]] = {}
    """By which collations the table's columns were compared when the condition was examined, by the table's OID."""

    members: dict[QualifiedName, str | None] = {}
    """The tables of an index over many equal ones, each with the publication's condition on its rows."""
    left_out: dict[str, str] = {}
    """The tables that match as well and are unlike those, and why each is left out."""
    others: tuple[IndexSpec, ...] = ()
    """The same index with each other generation of vectors that it has, beside the one that searches use."""
    cutter: str | None = None
    """The embedder whose tokens chunks are measured in, where it is not the one that makes the vectors."""
    stem: str | None = None
    """How the names of its relations begin, if not with its own name."""

    beside: IndexSpec | None = None
    """The index with the other chunks that it has, where it has chunks of two generations."""

    @property
    def searched_as(self) -> str:
        """The name that the index is searched by: of one that stands beside another, that of the other."""
        return own_name(self.name)

    @property
    def hidden(self) -> bool:
        """Whether it stands beside the index that is searched by its name: it has neither views nor a function."""
        return self.searched_as != self.name

    @property
    def relations(self) -> str:
        """How the names of its relations in the target begin."""
        return self.stem or self.name

    @property
    def links(self) -> tuple[Link, ...]:
        """The tables whose rows take part in documents, by the ways to them."""
        return links_of(self.shape, self.documents.related, self.facts)

    @property
    def tables(self) -> tuple[QualifiedName, ...]:
        """The tables that are followed, the index's own first."""
        return tuple(dict.fromkeys((self.shape.table, *(link.table for link in self.links))))

    @property
    def single_tables(self) -> tuple[QualifiedName, ...]:
        """The tables that the publication has to send."""
        return tuple(self.members) if self.shape.many else self.tables

    @property
    def each(self) -> tuple[IndexSpec, ...]:
        """The index as one of each single table of its own: itself, or one for each of many tables, in their order."""
        if not self.shape.many:
            return (self,)
        return tuple(
            msgspec.structs.replace(
                self,
                shape=msgspec.structs.replace(self.shape, table=table, source=str(table)),
                row_filter=row_filter,
                members={},
            )
            for table, row_filter in sorted(self.members.items(), key=lambda one: str(one[0]))
        )

    @property
    def condition(self) -> str | None:
        """The condition, in SQL, that the table's rows of this index fulfil; None if it has all of them."""
        conditions = [one for one in (self.row_filter, self.where and self.where.text) if one]
        return " AND ".join(f"({one})" for one in conditions) or None

    def holds(self, row: Row) -> bool | None:
        """Say whether a row is one of this index's; None if only the source can tell."""
        return True if self.where is None else self.where.holds(self.shape.deciding_of(row))

    def render(self, row: Row) -> Rendering:
        """Return the rendering of a complete row.

        :raises DocumentError: a function of the user's fails for it.
        """
        return self.documents.render(self.shape.text_of(row))  # type: ignore[arg-type]

    @property
    def generations(self) -> tuple[IndexSpec, ...]:
        """The index with each generation of its vectors; the one that searches use comes first."""
        return (self, *self.others)

    @property
    def searchable(self) -> tuple[IndexSpec, ...]:
        """The index with each generation that a search can name, those of other chunks included."""
        return self.generations if self.beside is None else (*self.generations, *self.beside.generations)

    def alike(self, one: IndexSpec) -> tuple[IndexSpec, ...]:
        """Return the other generations whose vectors can serve as those of one, those of other chunks included."""
        place = one.name, one.generation
        return tuple(
            other for other in self.searchable if (other.name, other.generation) != place and other.converts_to(one)
        )

    def converts_to(self, other: IndexSpec) -> bool:
        """Say whether the vectors of another generation are those of this one: of the same model, and no more exact."""
        same = (self.model, self.dimensions) == (other.model, other.dimensions)
        return same and not (self.config.vector_type == "halfvec" and other.config.vector_type == "vector")

    @property
    def cut_by(self) -> str:
        """The name of the embedder whose tokens chunks are measured in."""
        return self.cutter or self.config.embedder

    @property
    def vector_type(self) -> str:
        """The type of the embedding column."""
        return f"{self.config.vector_type}({self.dimensions})"

    def unusable(self, vectors: Mapping[bytes, npt.NDArray[np.float32]]) -> dict[bytes, str]:
        """Return which of these vectors no search of this index would find once they are stored, and why."""
        from cdcsync.model.vectors import unusable  # needs numpy, which a command at a shell does without

        stored, distance = self.config.vector_type, self.distance
        return {one: fault for one, vector in vectors.items() if (fault := unusable(vector, stored, distance))}

    def usable(self, vectors: Mapping[bytes, npt.NDArray[np.float32]]) -> dict[bytes, npt.NDArray[np.float32]]:
        """Return the vectors without those that are unusable."""
        out = self.unusable(vectors)
        return {one: vector for one, vector in vectors.items() if one not in out}
