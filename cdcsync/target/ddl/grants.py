"""An operator's settings on an index's relations, grants and options of views, which outlive the relation.

A relation may be dropped and made again by us, because a column of it changes, or by somebody's hand. `settings_kept`
notices which relations of an index are others after a change than before it, and gives them the settings of their
predecessors. A grant that comes from default privileges, and that the predecessor did not have, is revoked. The
settings of a relation that is gone already are known from the registry, where the watch notes them.

A table with row-level security of the operator's own is the exception. Its policies are gone with it, and who was
granted the table under them would see every row.

Source: PostgreSQL, "Privileges" (aclexplode), "CREATE VIEW", "Row Security Policies".
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.logs import get_logger
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.policies import GUARDED
from cdcsync.target.registry import Registry

log = get_logger()

_PRIVILEGE = re.compile("[A-Z ]+")


class Grant(msgspec.Struct, frozen=True):
    """A privilege of a role on a relation, or on one column of it. No role is PUBLIC."""

    privilege: str
    role: str | None
    column: str | None = None
    grantable: bool = False

    def on(self, relation: sql.Composable) -> sql.Composed:
        """Return the statement that grants it on a relation."""
        option = sql.SQL(" WITH GRANT OPTION" if self.grantable else "")
        return sql.SQL("GRANT {} ON {} TO {}{}").format(self._what, relation, self._whom, option)

    def off(self, relation: sql.Composable) -> sql.Composed:
        """Return the statement that revokes it."""
        return sql.SQL("REVOKE {} ON {} FROM {}").format(self._what, relation, self._whom)

    @property
    def _what(self) -> sql.Composable:
        if not _PRIVILEGE.fullmatch(self.privilege):
            raise ValueError("not the name of a privilege")
        column = sql.SQL("") if self.column is None else sql.SQL(" ({})").format(sql.Identifier(self.column))
        return sql.SQL(self.privilege) + column

    @property
    def _whom(self) -> sql.Composable:
        return sql.SQL("PUBLIC") if self.role is None else sql.Identifier(self.role)


def instead(present: Sequence[Grant], wanted: Sequence[Grant], relation: sql.Composable) -> list[sql.Composed]:
    """Return the statements after which a new relation has these grants and no others.

    :param present: those that it was created with, as default privileges say.
    """
    return [*(one.off(relation) for one in present if one not in wanted), *(one.on(relation) for one in wanted)]


class Settings(msgspec.Struct, frozen=True):
    """The settings of one relation.

    :ivar oid: tells a relation from another that has its name later.
    :ivar guarded: whether it has row-level security that is not ours.
    """

    oid: int
    kind: Literal["table", "view", "function"]
    grants: tuple[Grant, ...] = ()
    options: dict[str, str] = {}
    guarded: bool = False

    def statements(self, relation: sql.Composable, present: Settings) -> list[sql.Composed]:
        """Return the statements that give these settings to the relation that is there now."""
        on = sql.SQL("FUNCTION {}").format(relation) if self.kind == "function" else relation
        # One that replaces itself keeps its grants, and a view has no options then.
        grants = instead(present.grants, self.grants, on) if self.oid != present.oid else []
        options = [
            sql.SQL("ALTER VIEW {} SET ({} = {})").format(relation, sql.Identifier(name), sql.Literal(value))
            for name, value in self.options.items()
            if present.options.get(name) != value
        ]
        return [*options, *grants]


@asynccontextmanager
async def settings_kept(connection: Connection, schema: str, index: str) -> AsyncIterator[None]:
    """Give the relations of an index that are made again inside the settings that their predecessors had.

    All of it is in the caller's transaction.
    """
    entry = await Registry(schema).find(connection, index)
    known = msgspec.convert(entry.settings or {}, dict[str, Settings]) if entry is not None else {}
    before = known | await read_settings(connection, schema, index)
    yield
    for name, present in (await read_settings(connection, schema, index)).items():
        settings = before.get(name)
        if settings is None or settings.kind != present.kind:
            continue
        if settings.guarded and settings.grants and settings.oid != present.oid:
            fix = "create its policies again, then grant again what roles may do with it"
            log.error("grants_left_out", index=index, relation=name, fix=fix)
            settings = msgspec.structs.replace(settings, grants=())
        await set_again(connection, settings.statements(sql.SQL(name), present))


async def settings_to_note(connection: Connection, schema: str, index: str) -> dict[str, Any]:
    """Return the settings of an index's relations, as the registry keeps them for the time when one of them is gone."""
    return cast(dict[str, Any], msgspec.to_builtins(await read_settings(connection, schema, index)))


async def read_settings(connection: Connection, schema: str, index: str) -> dict[str, Settings]:
    """Return the settings of an index's relations and of its search function, by their names as SQL writes them.

    They are known by their comments. What the owner may do is left out.
    """
    cursor = await connection.execute(
        """
        SELECT format('%%I.%%I', n.nspname, c.relname), c.oid::int8,
               CASE c.relkind WHEN 'v' THEN 'view' ELSE 'table' END,
               coalesce((SELECT jsonb_agg(jsonb_build_object('privilege', a.privilege_type, 'role', r.rolname,
                                                   'column', t.attname, 'grantable', a.is_grantable))
                         FROM (SELECT NULL::name AS attname, c.relacl AS acl
                               UNION ALL SELECT attname, attacl FROM pg_attribute
                               WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS t
                         CROSS JOIN aclexplode(t.acl) AS a LEFT JOIN pg_roles r ON r.oid = a.grantee
                         WHERE a.grantee <> c.relowner AND (a.grantee = 0 OR r.oid IS NOT NULL)), '[]'),
               CASE c.relkind WHEN 'v' THEN coalesce((SELECT jsonb_object_agg(o.option_name, o.option_value)
                                                      FROM pg_options_to_table(c.reloptions) AS o), '{}') ELSE '{}' END,
               c.relrowsecurity AND """
        + GUARDED
        + """
        FROM pg_description d JOIN pg_class c ON c.oid = d.objoid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE d.classoid = 'pg_class'::regclass AND d.objsubid = 0 AND c.relkind IN ('r', 'p', 'v')
            AND (starts_with(d.description, %(index)s) OR starts_with(d.description, %(chunks)s))
        UNION ALL
        SELECT format('%%I.%%I', n.nspname, p.proname), p.oid::int8, 'function',
               coalesce((SELECT jsonb_agg(jsonb_build_object('privilege', a.privilege_type, 'role', r.rolname,
                                                             'grantable', a.is_grantable))
                         FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
                         LEFT JOIN pg_roles r ON r.oid = a.grantee
                         WHERE a.grantee <> p.proowner AND (a.grantee = 0 OR r.oid IS NOT NULL)), '[]'), '{}', false
        FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = %(schema)s AND p.proname = %(function)s
            AND starts_with(obj_description(p.oid, 'pg_proc'), %(index)s)
        """,
        {
            "index": f"cdcsync index {index}: ",
            "chunks": f"cdcsync chunks of index {index}: ",
            "schema": schema,
            "function": f"{index}_search",
        },
    )
    fields = ("oid", "kind", "grants", "options", "guarded")
    return {
        name: msgspec.convert(dict(zip(fields, facts, strict=True)), Settings)
        for name, *facts in await cursor.fetchall()
    }


async def guarded(connection: Connection, relation: sql.Identifier) -> bool:
    """Say whether a table has row-level security of an operator's own, which a table in its place would lack."""
    cursor = await connection.execute(
        "SELECT FROM pg_class c WHERE c.oid = to_regclass(%s) AND c.relrowsecurity AND " + GUARDED,
        [relation.as_string(connection)],
    )
    return await cursor.fetchone() is not None


async def opens(connection: Connection, new: sql.Identifier, *, old: sql.Identifier) -> bool:
    """Say whether a table in the place of another lacks the row-level security that an operator gave that one."""
    return await guarded(connection, old) and not await guarded(connection, new)


async def grants_of(connection: Connection, relation: sql.Identifier) -> list[Grant]:
    """Return what roles other than the owner may do with a relation, or with some of its columns."""
    cursor = await connection.execute(
        "SELECT a.privilege_type, r.rolname, t.attname, a.is_grantable FROM pg_class c CROSS JOIN LATERAL ("
        " SELECT NULL::name AS attname, c.relacl AS acl"
        " UNION ALL SELECT attname, attacl FROM pg_attribute"
        " WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS t CROSS JOIN aclexplode(t.acl) AS a"
        " LEFT JOIN pg_roles r ON r.oid = a.grantee WHERE c.oid = to_regclass(%s) AND a.grantee <> c.relowner"
        " AND (a.grantee = 0 OR r.oid IS NOT NULL)",
        [relation.as_string(connection)],
    )
    return [Grant(*row) for row in await cursor.fetchall()]


async def succeed(connection: Connection, relation: sql.Identifier, grants: Sequence[Grant]) -> None:
    """Give a relation the grants of the one that it replaces, in the transaction that does so, and no others."""
    await set_again(connection, instead(await grants_of(connection, relation), grants, relation))


async def read_alike(connection: Connection, new: sql.Identifier, *, chunks: sql.Identifier, index: str) -> None:
    """Let whoever may read all chunks of an index read a table that the index did not have before.

    A search reads all of its index's tables with its caller's privileges: without this, a new one would take every
    search away from them. Who may read only columns of the chunks was not granted what their words give away.
    """
    readers = [one for one in await grants_of(connection, chunks) if one.privilege == "SELECT" and one.column is None]
    if readers and await opens(connection, new, old=chunks):
        fix = "if roles under policies on the chunks may read the table, which has none, grant them SELECT on it"
        log.error("grants_left_out", index=index, relation=new.as_string(connection), fix=fix)
        return
    await set_again(connection, [one.on(new) for one in readers])


async def set_again(connection: Connection, statements: Iterable[sql.Composed]) -> None:
    """Run what gives a relation its settings, in the transaction that replaced it.

    Grants on a column, and to a role, that is no longer there are left out.
    """
    for statement in statements:
        try:
            async with connection.transaction():
                await connection.execute(statement)
        except (psycopg.errors.UndefinedColumn, psycopg.errors.UndefinedObject):
            continue
