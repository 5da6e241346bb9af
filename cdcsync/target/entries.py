"""A row of the table `indexes`: an index as it is registered, with what its chunks and vectors were made by.

A row is read as JSON, so that a command and a worker of different versions understand each other: a field that the
table does not have yet takes its default, and a column that this version does not know is left out. To add a fact about
an index, add a column to `DDL` and a field with a default to `Entry`.

An index is *building* until its first load has drained, *live* from then on, and *paused* while it cannot be followed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, LiteralString

import msgspec

from cdcsync.config import QualifiedName
from cdcsync.config.names import own_name
from cdcsync.model.pauses import Pause

TABLE = "indexes"

DROPPED = "dropped_indexes"

State = Literal["building", "live", "paused"]

Facts = tuple[int, str, int, str, str]
"""A generation's number, model, dimensions, vector type and distance."""

DROPPED_DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.dropped_indexes (
        name text PRIMARY KEY,
        last_generation int NOT NULL
    )
    """,
    "COMMENT ON TABLE {schema}.dropped_indexes IS"
    " 'cdcsync: the highest number that a generation of each dropped index had: no index of that name uses it again.'",
)

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.indexes (
        name text PRIMARY KEY,
        slot text NOT NULL REFERENCES {schema}.pipelines,
        source_table text NOT NULL,
        view_name text NOT NULL,
        key text[] NOT NULL,
        columns text[] NOT NULL,
        fingerprint text NOT NULL,
        generation int NOT NULL,
        model text NOT NULL,
        dimensions int NOT NULL,
        vector_type text NOT NULL,
        distance text NOT NULL,
        state text NOT NULL CHECK (state IN ('building', 'live', 'paused')),
        reason text,
        created_at timestamptz NOT NULL DEFAULT now(),
        live_at timestamptz,
        table_oid bigint
    )
    """,
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS made_of jsonb",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS sent_by jsonb",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS remedy text",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS paused_at timestamptz",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS unfollowed_at timestamptz",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS configuration jsonb",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS last_generation int",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS settings jsonb",
    "COMMENT ON COLUMN {schema}.indexes.settings IS"
    " 'Grants on the relations of the index and options of its views, for relations that are made again.'",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS left_out jsonb NOT NULL DEFAULT '{{}}'",
    "COMMENT ON COLUMN {schema}.indexes.left_out IS"
    " 'Which tables match the patterns of an index over many equal ones and are left out, and why.'",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS stem text",
    "COMMENT ON COLUMN {schema}.indexes.stem IS"
    " 'How the names of the relations that hold its chunks and vectors begin; NULL: with its own name.'",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS activation_asked_at timestamptz",
    "COMMENT ON COLUMN {schema}.indexes.activation_asked_at IS"
    " 'Of an index that stands beside another: since when it is to be the one that is searched.'",
    "ALTER TABLE {schema}.indexes ADD COLUMN IF NOT EXISTS declined jsonb",
    "COMMENT ON COLUMN {schema}.indexes.declined IS"
    " 'What chunks were made of, or were to be, when some were dropped: the worker does not make these in place.'",
    "COMMENT ON COLUMN {schema}.indexes.last_generation IS"
    " 'The highest number that a generation had, also one that was dropped: no number is used again.'",
    "COMMENT ON COLUMN {schema}.indexes.configuration IS"
    " 'The section of the configuration that the index was last loaded by.'",
    "COMMENT ON TABLE {schema}.indexes IS 'cdcsync: one row per index, with what its chunks and vectors were made by.'",
    "COMMENT ON COLUMN {schema}.indexes.reason IS 'Why the index is paused, or cannot be built now, with the remedy.'",
    "COMMENT ON COLUMN {schema}.indexes.remedy IS 'What to do so that a paused index can be followed again.'",
    "COMMENT ON COLUMN {schema}.indexes.paused_at IS 'Since when the index is paused.'",
    "COMMENT ON COLUMN {schema}.indexes.unfollowed_at IS"
    " 'Since when the index is in no configuration, so that nothing keeps it in step.'",
    "COMMENT ON COLUMN {schema}.indexes.made_of IS"
    " 'What the values are made of: the columns that are read, the files of the table and its partitions, types.'",
    "COMMENT ON COLUMN {schema}.indexes.sent_by IS"
    " 'What has the table sent: the publication and what brings the table in, each as of its last edit.'",
    "COMMENT ON COLUMN {schema}.indexes.table_oid IS"
    " 'The table''s OID on the source: another one under the same name is another table.'",
    "COMMENT ON COLUMN {schema}.indexes.generation IS"
    " 'The vectors table in use: NAME_vectors_GENERATION, with the stem in place of NAME where there is one.'",
    *DROPPED_DDL,
)
"""Needs the table `pipelines`."""


class Entry(msgspec.Struct, frozen=True):
    """An index as it is registered; the fields are the columns of its row."""

    name: str
    slot: str
    source_table: str
    view_name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    fingerprint: str
    generation: int
    model: str
    dimensions: int
    vector_type: str
    distance: str
    state: State
    created_at: datetime
    reason: str | None = None
    remedy: str | None = None
    paused_at: datetime | None = None
    unfollowed_at: datetime | None = None
    live_at: datetime | None = None
    table_oid: int | None = None
    made_of: dict[str, Any] | None = None
    sent_by: dict[str, Any] | None = None
    configuration: dict[str, Any] | None = None
    last_generation: int | None = None
    settings: dict[str, Any] | None = None
    left_out: dict[str, str] = {}
    stem: str | None = None
    activation_asked_at: datetime | None = None
    declined: list[dict[str, Any]] | None = None

    @property
    def hidden(self) -> bool:
        """Whether it stands beside another index; see `IndexSpec.hidden`."""
        return own_name(self.name) != self.name

    @property
    def relations(self) -> str:
        """How the names of its relations begin; see `IndexSpec.relations`."""
        return self.stem or self.name

    @property
    def view(self) -> QualifiedName:
        """The name of its view."""
        return QualifiedName.parse(self.view_name)

    @property
    def leaves(self) -> frozenset[str]:
        """The OIDs of its table's partitions, or of its many tables."""
        return frozenset(self._table_values.get("leaves", ()))

    @property
    def _table_values(self) -> dict[str, Any]:
        return {} if self.made_of is None else self.made_of["tables"].get(self.source_table, {})

    @property
    def where(self) -> str | None:
        """The condition on the table's rows that the index was read under."""
        return self._table_values.get("where")

    @property
    def conditions(self) -> frozenset[str]:
        """The conditions on its rows and on related rows that it was loaded by."""
        found, sections = set(), [self.configuration or {}]
        while sections:
            section = sections.pop()
            found.add(section.get("where"))
            sections += (section.get("related") or {}).values()
        return frozenset(filter(None, found))

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that it is made of, its own first."""
        related = self.made_of["tables"] if self.made_of is not None else ()
        return tuple(dict.fromkeys((self.source_table, *related)))

    @property
    def oids(self) -> dict[str, int]:
        """The OIDs that these tables had when they were last looked at."""
        read = self.made_of["tables"] if self.made_of is not None else {}
        own = {} if self.table_oid is None else {self.source_table: self.table_oid}
        return {name: values["oid"] for name, values in read.items()} | own

    @property
    def numbers(self) -> dict[tuple[str, str], tuple[int, int]]:
        """The columns that it has read, by table and name: the table's OID, and the column's number there."""
        read = self.made_of["tables"] if self.made_of is not None else {}
        return {
            (table, column): (values["oid"], facts[0])
            for table, values in read.items()
            for column, facts in values["columns"].items()
        }

    @property
    def members(self) -> tuple[str, ...]:
        """The tables that an index over many equal tables is made of."""
        return tuple(sorted(self.sent_by["tables"])) if self.sent_by is not None else ()

    @property
    def pause(self) -> Pause | None:
        """Why the index is paused, if it is."""
        if self.state != "paused":
            return None
        reason = self.reason or "no reason is stored"
        if self.remedy:
            reason = reason.removesuffix(f"; {self.remedy}")
        return Pause(reason, self.remedy, self.paused_at)
