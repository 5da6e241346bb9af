"""The types that key and carried columns have in the target.

A column keeps its type where the target has it, and otherwise is text: values are copied as the source renders them, so
text holds them all. A domain becomes what it is made of, because the source may hold values that its checks refuse: of
before a check was added NOT VALID, or of another domain of that name. In another database, names of what the source has
(`regclass`) are text. An index that exists keeps the types it has, unless it is paused, which the check of a domain or
such a name may be the reason for; and it follows a column that changed its type in the source.

A type can run code: its owner may define casts at any time, which PostgreSQL then uses in whatever statement of the
worker converts a value. So a type of the target is used only if its owner is trusted there anyway.

Source: PostgreSQL, "Object Identifier Types" (to_regtype), "Operator Classes and Operator Families", CREATE CAST.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config.names import named, quote
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding
from cdcsync.source.columns import Column

FALLBACK = "text"

NAMING = frozenset(
    (
        *("regclass", "regcollation", "regconfig", "regdatabase", "regdictionary", "regnamespace", "regoper"),
        *("regoperator", "regproc", "regprocedure", "regrole", "regtype", "aclitem"),
    )
)
"""Types whose values are names of what the source's database, or its server, has: another one takes only names of its
own, and would call those something else once they are renamed."""


class _Type(msgspec.Struct, frozen=True):
    """A type of the target.

    :ivar labels: an enum's.
    :ivar strangers: the owners of the type and of the database; None if the type's owner is trusted there.
    """

    oid: int
    labels: tuple[str, ...]
    strangers: tuple[str, str] | None


class _Choice(msgspec.Struct, frozen=True):
    """A type for a column and, if it is text in place of the column's own, why, and how to have that."""

    type: str
    problem: str | None = None
    hint: str | None = None


async def choose_types(
    connection: Connection,
    schema: str,
    name: str,
    columns: Sequence[Column],
    findings: list[Finding],
    *,
    stem: str | None = None,
    paused: bool = False,
    shared: bool = False,
) -> dict[str, str]:
    """Return the type of each of an index's columns in the target, and note where it is not the source's.

    :param stem: how the names of its relations begin, if not with its own name.
    :param paused: whether the index exists and is paused.
    :param shared: whether source and target are one database.
    """
    stored = await stored_types(connection, schema, stem or name)
    # A table may have a thousand columns, of a few types.
    asked = dict.fromkeys(one for column in columns for one in (column.base_type, column.type) if one is not None)
    there = {one: await _read_type(connection, one) for one in asked}
    chosen = {}
    for column in columns:
        best = _best_type(column, there, shared=shared)
        type_ = best.type
        kept = stored.get(column.name)
        if paused and (column.base_type is not None or _names_objects(column)) and kept == column.type:
            kept = type_
        if kept is None and best.problem is not None:
            findings.append(
                Finding.warning(
                    f"indexes.{name}",
                    f"the column {quote(column.name)} is carried as text: {best.problem}",
                    best.hint,
                )
            )
        elif kept is not None and kept not in (column.type, column.base_type, type_, FALLBACK):
            findings.append(
                Finding.warning(
                    f"indexes.{name}",
                    f"the column {quote(column.name)} is {column.type} in the source and {kept} in the existing index:"
                    f" run changes the index to {type_}, which rewrites its chunks table",
                )
            )
            kept = None
        chosen[column.name] = kept or type_
    return chosen


async def stored_types(connection: Connection, schema: str, stem: str) -> dict[str, str]:
    """Return the types of the columns that an existing index has; none when there is no index of that name.

    :param stem: how the names of its relations begin.
    """
    cursor = await connection.execute(
        """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod)
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped
        """,
        [schema, f"{stem}_chunks"],
    )
    return dict(await cursor.fetchall())


async def _read_type(connection: Connection, type_: str) -> _Type | None:
    """Return a type of the target, as format_type prints it; None if it is not there.

    Trusted are superusers, the owners of the database and of the type's schema, and roles that the worker's is a member
    of.
    """
    try:
        cursor = await connection.execute(
            """
            SELECT t.oid::int8, ARRAY(SELECT enumlabel::text FROM pg_enum WHERE enumtypid = t.oid),
                   r.rolsuper OR r.oid = d.datdba OR pg_has_role(r.oid, n.nspowner, 'USAGE')
                       OR (NOT me.rolsuper AND pg_has_role(r.oid, 'USAGE')),
                   r.rolname, pg_get_userbyid(d.datdba)
            FROM pg_type AS t JOIN pg_roles AS r ON r.oid = t.typowner JOIN pg_namespace AS n ON n.oid = t.typnamespace
            JOIN pg_database AS d ON d.datname = current_database() JOIN pg_roles AS me ON me.rolname = current_user
            WHERE t.oid = to_regtype(%s)
            """,
            [type_],
        )
    except psycopg.errors.SyntaxError:
        # A type of this name that takes no modifier is another one.
        return None
    row = await cursor.fetchone()
    if row is None:
        return None
    oid, labels, trusted, owner, of_database = row
    return _Type(oid, tuple(labels), None if trusted else (owner, of_database))


def _best_type(column: Column, there: Mapping[str, _Type | None], *, shared: bool) -> _Choice:
    """Return the nearest type that the target has.

    The type of a table in the same database is the table's own: its owner is trusted as the table's is.

    :param there: the types of the target.
    """
    if _names_objects(column) and not shared:
        return _Choice(
            FALLBACK,
            f"a {column.value_type} names something in the source's database",
            "filter by the name, as the source writes it",
        )
    if column.base_type is not None and there[column.base_type] is not None:
        return _Choice(column.base_type)
    create = f"create the type {column.type} in the target before the worker first starts, or leave it as text"
    found = there[column.type]
    if found is None:
        return _Choice(FALLBACK, f"its type {column.type} does not exist in the target", create)
    if missing := sorted(set(column.labels) - set(found.labels)):
        return _Choice(FALLBACK, f"its type {column.type} lacks {named(map(repr, missing))} in the target", create)
    # In another database, somebody may have made a type with the OID of the column's.
    if found.strangers is not None and not (shared and found.oid == column.wire_type[0]):
        owner, of_database = map(quote, found.strangers)
        return _Choice(
            FALLBACK,
            f"its type {column.type} belongs to {owner} in the target, who could have it run code as the worker's role",
            f"if {owner} may do that: ALTER TYPE {column.type} OWNER TO {of_database}; before the worker first starts;"
            " or leave it as text",
        )
    return _Choice(column.type)


def _names_objects(column: Column) -> bool:
    return column.value_type.removesuffix("[]") in NAMING


async def sortable(connection: Connection, type_: str) -> bool:
    """Say whether a b-tree can hold values of a type of the target."""
    statement = sql.SQL("SELECT FROM (VALUES (NULL::{})) AS one(value) ORDER BY value").format(sql.SQL(type_))
    try:
        await connection.execute(statement)
    except psycopg.errors.UndefinedFunction:
        return False
    return True
