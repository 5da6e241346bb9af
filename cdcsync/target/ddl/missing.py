"""What an index should have in the target and lacks: somebody dropped or detached it, or it became invalid.

Source: PostgreSQL, "CREATE TABLE" (UNLOGGED: it is emptied after a crash, and not replicated); "Overview of Trigger
Behavior" (a trigger before a row may change or skip it); "Rules on INSERT, UPDATE, and DELETE".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.config.differences import made_as
from cdcsync.errors import SetupError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.chunks_view import chunks_view_name
from cdcsync.target.ddl.names import FRESH, SETTLED, Names, b_tree_name


class Unsafe(msgspec.Struct, frozen=True):
    """The tables of an index that could lose, hide or change rows without anybody noticing.

    :ivar unlogged: tables that a crash of the target empties, and a failover does not take along.
    :ivar hidden: tables of which policies hide rows from the role that asks.
    :ivar altered: the triggers and rules that may have something else written than what we write, each with its table.
    """

    unlogged: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    altered: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.unlogged or self.hidden or self.altered)


class Missing(msgspec.Struct, frozen=True):
    """The missing relations of an index, and those that it may lose.

    :ivar tables: those that hold its contents: the source has to be read again.
    :ivar built: what searches need, and can be built of what is there.
    :ivar unsafe: tables that are there, and could lose rows.
    """

    tables: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    unsafe: Unsafe = Unsafe()

    def __str__(self) -> str:
        kinds = {
            "missing": (*self.tables, *self.built),
            "unlogged": self.unsafe.unlogged,
            "hidden by policies": self.unsafe.hidden,
            "changed as it is written": [f"{table} ({what.lower()})" for table, what in self.unsafe.altered],
        }
        return "; ".join(f"{kind} in the target: {', '.join(names)}" for kind, names in kinds.items() if names)

    def __bool__(self) -> bool:
        return bool(self.tables or self.built or self.unsafe)

    def refuse_unsafe(self, schema: str) -> None:
        """Fail if a table could lose, hide or change rows without anybody noticing.

        :raises SetupError: one could.
        """
        unlogged, hidden, altered = self.unsafe.unlogged, self.unsafe.hidden, self.unsafe.altered
        lost = "would be empty after a crash of the target, and on its standbys: unlogged"
        for tables, fault, changes in (
            (unlogged, lost, [(table, "SET LOGGED") for table in unlogged]),
            (
                hidden,
                "has policies that hide rows from the worker",
                [(table, "NO FORCE ROW LEVEL SECURITY") for table in hidden],
            ),
            (
                tuple(dict.fromkeys(table for table, _ in altered)),
                "has triggers or rules by which other rows could be written than the worker writes",
                [(table, f"DISABLE {what}") for table, what in altered],
            ),
        ):
            if tables:
                named = [(sql.Identifier(schema, table).as_string(), change) for table, change in changes]
                hint = "; ".join(f"ALTER TABLE {table} {change}" for table, change in named)
                raise SetupError(f"{', '.join(tables)} {fault}", where=schema, hint=hint)


async def missing_relations(
    connection: Connection, schema: str, spec: IndexSpec, *, view: QualifiedName | None = None
) -> Missing:
    """Return what is missing of an index that is loaded.

    :param view: the name that its view has, where the configuration gives it another one by now.
    """
    names, view = Names(schema, spec.relations), view or spec.config.view_name
    stem = spec.relations
    vectors = f"{stem}_vectors_{spec.generation}"
    tables = [f"{stem}_chunks", f"{stem}_backlog", vectors]
    indexes = [names.hnsw_name(spec.generation), names.near_name(spec.generation), *_of_columns(spec)]
    shown = [] if spec.hidden else [view, chunks_view_name(view)]
    if spec.config.search is not None:
        indexes.append(names.search_name)
        shown.append(QualifiedName(schema, f"{stem}_words"))
    row = await fetch_one(
        connection,
        """
        SELECT array(SELECT wanted FROM unnest(%(tables)s::text[] || CASE WHEN EXISTS (
                         SELECT FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = %(vectors)s
                             AND c.relkind = 'p') THEN %(tiers)s::text[] END) AS wanted WHERE NOT EXISTS (
                   SELECT FROM pg_class c WHERE c.relnamespace = n.oid AND c.relname = wanted)),
               array(SELECT wanted FROM unnest(%(indexes)s::text[]) AS wanted WHERE NOT EXISTS (
                   SELECT FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
                   WHERE c.relnamespace = n.oid AND c.relname = wanted AND i.indisvalid)),
               array(SELECT wanted.schema || '.' || wanted.name
                     FROM unnest(%(schemas)s::text[], %(shown)s::text[]) AS wanted(schema, name) WHERE NOT EXISTS (
                         SELECT FROM pg_class c JOIN pg_namespace v ON v.oid = c.relnamespace
                         WHERE v.nspname = wanted.schema AND c.relname = wanted.name)),
               array(SELECT tier || ' as a partition' FROM unnest(%(tiers)s::text[]) AS tier
                     JOIN pg_class p ON p.relnamespace = n.oid AND p.relname = %(vectors)s AND p.relkind = 'p'
                     JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = tier
                     WHERE NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid AND inhparent = p.oid
                         AND NOT inhdetachpending)),
               array(SELECT %(function)s::text WHERE %(function)s::text IS NOT NULL AND NOT EXISTS (
                   SELECT FROM pg_proc p WHERE p.pronamespace = n.oid AND p.proname = %(function)s))
        FROM (SELECT (SELECT oid FROM pg_namespace WHERE nspname = %(ours)s) AS oid) AS n
        """,
        {
            "tables": tables,
            "vectors": vectors,
            # Tables by themselves: somebody can drop one of them and leave the other.
            "tiers": [f"{vectors}_{tier}" for tier in (FRESH, SETTLED)],
            "indexes": indexes,
            "schemas": [one.schema for one in shown],
            "shown": [one.name for one in shown],
            "function": None if spec.hidden else f"{spec.name}_search",
            "ours": schema,
        },
    )
    absent, *built = row
    unsafe = await unsafe_tables(connection, schema, stem, [one.generation for one in spec.generations])
    return Missing(tuple(absent), tuple(name for some in built for name in some), unsafe)


def _of_columns(spec: IndexSpec) -> list[str]:
    return [b_tree_name(spec.relations, column) for column in spec.config.indexed]


def newly_asked_for(schema: str, spec: IndexSpec, stored: Mapping[str, Any]) -> set[str]:
    """Return what a loaded index lacks because its configuration asks for it only since it was changed.

    :param stored: the configuration as it was, from `as_stored`.
    """
    before = msgspec.structs.replace(spec, config=made_as(spec.config, stored, ("indexed", "search")))
    added = set(_of_columns(spec)) - set(_of_columns(before))
    if before.config.search is None:
        added |= {Names(schema, spec.relations).search_name, f"{schema}.{spec.relations}_words"}
    return added


async def unsafe_tables(
    connection: Connection, schema: str, stem: str, generations: Sequence[int] | None = None
) -> Unsafe:
    """Return which of an index's tables could lose, hide or change rows.

    A trigger that runs after a row is written, or once for a statement, lets the row be.

    :param stem: how their names begin.
    :param generations: those of its vectors that are looked at; None for all that are there.
    """
    unlogged, hidden, altered = await fetch_one(
        connection,
        r"""
        WITH ours AS (
            SELECT oid, relname, relpersistence FROM pg_class
            WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s) AND relkind IN ('r', 'p')
                AND starts_with(relname::text, %(stem)s || '_')
                AND substring(relname::text FROM length(%(stem)s) + 2)
                    ~ ('^(chunks|backlog|words|vectors_(' || %(numbers)s || ')(_fresh|_settled)?)$')),
        altering (table_oid, what) AS (
            -- Of each row, before it is written: the bits of pg_trigger.h.
            SELECT tgrelid, format('TRIGGER %%I', tgname) FROM pg_trigger
            WHERE tgtype & 3 = 3 AND tgenabled IN ('O', 'A') AND NOT tgisinternal
            UNION ALL
            SELECT ev_class, format('RULE %%I', rulename) FROM pg_rewrite WHERE ev_enabled IN ('O', 'A'))
        SELECT (SELECT array_agg(relname ORDER BY relname) FROM ours WHERE relpersistence = 'u'),
               (SELECT array_agg(relname ORDER BY relname) FROM ours WHERE row_security_active(oid)),
               (SELECT array_agg(ARRAY[relname::text, what] ORDER BY relname, what)
                FROM ours JOIN altering ON table_oid = oid)
        """,
        {"schema": schema, "stem": stem, "numbers": r"\d+" if generations is None else "|".join(map(str, generations))},
    )
    return Unsafe(
        tuple(unlogged or ()), tuple(hidden or ()), tuple((str(table), str(what)) for table, what in altered or ())
    )
