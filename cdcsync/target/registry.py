"""The registry: the table `indexes`, one row per index, and `dropped_indexes`. Every statement on them is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, LiteralString, cast

import msgspec
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from cdcsync.config import Index
from cdcsync.config.differences import as_stored
from cdcsync.config.names import BESIDE, beside_name
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.entries import DROPPED, DROPPED_DDL, TABLE, Entry, Facts


class Registry:
    """The table `indexes` of a schema. The caller's transaction commits, where there is one."""

    def __init__(self, schema: str) -> None:
        self._schema = schema
        self._table = sql.Identifier(schema, TABLE)
        self._dropped = sql.Identifier(schema, DROPPED)

    async def find(self, connection: Connection, index: str, *, lock: bool = False) -> Entry | None:
        """Return an index's entry; None if there is none, or not even the table.

        :param lock: keep others from changing it until the caller's transaction ends. Needs one.
        """
        if not await self._present(connection):
            return None
        statement = sql.SQL("SELECT to_jsonb(i) FROM {} AS i WHERE name = %s" + (" FOR UPDATE" if lock else ""))
        read = partial(fetch_row, connection, statement.format(self._table), [index])
        row = None
        if lock:
            async with connection.transaction():
                if (row := await read()) is None:
                    raise psycopg.Rollback
        if row is None:
            # Not only without a lock: if names were exchanged while that waited, the row that was waited for has
            # another one now, and its lock was given back; the one that has this name was not seen yet.
            row = await read()
        return None if row is None else msgspec.convert(row[0], Entry)

    async def both(self, connection: Connection, index: str) -> tuple[Entry | None, Entry | None]:
        """Return the entries of an index and of the one that stands beside it, as they are at one moment."""
        if not await self._present(connection):
            return None, None
        names = [index, beside_name(index)]
        cursor = await connection.execute(
            sql.SQL("SELECT to_jsonb(i) FROM {} AS i WHERE name = ANY(%s)").format(self._table), [names]
        )
        found = {one.name: one for one in [msgspec.convert(row[0], Entry) for row in await cursor.fetchall()]}
        return found.get(index), found.get(beside_name(index))

    async def all(self, connection: Connection) -> dict[str, Entry]:
        """Return every entry by name, those of other pipelines included, in the order of their names."""
        if not await self._present(connection):
            return {}
        cursor = await connection.execute(sql.SQL("SELECT to_jsonb(i) FROM {} AS i ORDER BY name").format(self._table))
        entries = [msgspec.convert(row[0], Entry) for row in await cursor.fetchall()]
        return {entry.name: entry for entry in entries}

    async def dropped(self, connection: Connection) -> dict[str, int]:
        """Return the highest number that a generation had of each index that was dropped, by the index's name."""
        if not await self._present(connection, DROPPED):
            return {}
        cursor = await connection.execute(sql.SQL("SELECT name, last_generation FROM {}").format(self._dropped))
        return cast(dict[str, int], dict(await cursor.fetchall()))

    async def _present(self, connection: Connection, table: str = TABLE) -> bool:
        return (
            await fetch_row(
                connection,
                "SELECT FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
                " WHERE n.nspname = %s AND c.relname = %s",
                [self._schema, table],
            )
            is not None
        )

    async def register(self, connection: Connection, slot: str, spec: IndexSpec) -> None:
        """Write what an index is to be made by; a paused index is resumed, and is building from now on.

        What its stored chunks and vectors depend on stays as it is: another key, model or distance is another index.
        """
        facts = {"slot": slot, **_facts_of(spec)}
        followed = ("left_out", "slot", "view_name", "columns", "fingerprint", "table_oid", "configuration")
        await connection.execute(
            sql.SQL(
                "INSERT INTO {} AS i (name, state, {}) VALUES (%s, 'building', {}) ON CONFLICT (name) DO UPDATE SET {},"
                " state = CASE i.state WHEN 'paused' THEN 'building' ELSE i.state END,"
                " reason = NULL, remedy = NULL, paused_at = NULL, unfollowed_at = NULL"
            ).format(
                self._table,
                sql.SQL(", ").join(map(sql.Identifier, facts)),
                sql.SQL(", ").join([sql.Placeholder()] * len(facts)),
                sql.SQL(", ").join(
                    sql.SQL("{0} = coalesce(excluded.{0}, i.{0})").format(sql.Identifier(column)) for column in followed
                ),
            ),
            [spec.name, *(Jsonb(one) if isinstance(one, dict) else one for one in facts.values())],
        )

    async def pause(self, connection: Connection, index: str, pause: Pause) -> None:
        """Store that an index does not follow its table from here on, and why. `register` resumes it."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET paused_at = CASE state WHEN 'paused' THEN coalesce(paused_at, now()) ELSE now() END,"
                " state = 'paused', reason = %s, remedy = %s WHERE name = %s"
            ).format(self._table),
            [str(pause), pause.remedy, index],
        )

    async def declare_live(self, connection: Connection, index: str) -> None:
        """Note that a building index is loaded, and has all that searches need."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET state = 'live', live_at = now(), reason = NULL WHERE name = %s AND state = 'building'"
            ).format(self._table),
            [index],
        )

    async def note_wait(self, connection: Connection, index: str, reason: str | None) -> None:
        """Note why a building index waits, if it does; being live, paused or registered anew ends that."""
        await connection.execute(
            sql.SQL("UPDATE {} SET reason = %s WHERE name = %s AND state = 'building'").format(self._table),
            [reason, index],
        )

    async def switch(self, connection: Connection, spec: IndexSpec) -> None:
        """Note that searches use the generation of this spec from now on; see `target/generations`."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET generation = %s, model = %s, dimensions = %s, vector_type = %s, distance = %s"
                " WHERE name = %s"
            ).format(self._table),
            [spec.generation, spec.model, spec.dimensions, spec.config.vector_type, spec.distance, spec.name],
        )

    async def add_beside(self, connection: Connection, index: str, index_section: Index, generation: Facts) -> None:
        """Add an index that stands beside another one, of the same tables, and is still to be made.

        :param index: the name of the one that is there.
        :param index_section: what the new one is made by.
        """
        number, model, dimensions, vector_type, distance = generation
        await connection.execute(
            sql.SQL(
                "INSERT INTO {table} (name, stem, slot, source_table, view_name, key, columns, table_oid, fingerprint,"
                " configuration, generation, last_generation, model, dimensions, vector_type, distance, state)"
                " SELECT %(beside)s, %(stem)s, slot, source_table, view_name, key, columns, table_oid, '', %(section)s,"
                " %(number)s, %(number)s, %(model)s, %(dimensions)s, %(vector_type)s, %(distance)s, 'building'"
                " FROM {table} WHERE name = %(index)s"
            ).format(table=self._table),
            {
                "index": index,
                "beside": beside_name(index),
                "stem": f"{index}~{number}",
                "section": Jsonb(as_stored(index_section)),
                "number": number,
                "model": model,
                "dimensions": dimensions,
                "vector_type": vector_type,
                "distance": distance,
            },
        )

    async def ask_for_activation(self, connection: Connection, index: str) -> None:
        """Ask the holder of the pipeline's lock to have searches use the chunks that stand beside an index."""
        await connection.execute(
            sql.SQL("UPDATE {} SET activation_asked_at = now() WHERE name = %s").format(self._table),
            [beside_name(index)],
        )

    async def withdraw(self, connection: Connection, index: str) -> None:
        """Note that an index which stands beside another is not to be activated any more, if that was asked."""
        statement = sql.SQL(
            "UPDATE {} SET activation_asked_at = NULL WHERE name = %s AND activation_asked_at IS NOT NULL"
        )
        await connection.execute(statement.format(self._table), [index])

    async def exchange(self, connection: Connection, index: str) -> None:
        """Exchange the names of an index and of the one that stands beside it, and with these all that refers to them.

        Whoever follows either of them would write to the other from then on: only the holder of the pipeline's lock may
        do this, before it writes.
        """
        passing = f"{index}~passing"
        for before, after in ((index, passing), (beside_name(index), index), (passing, beside_name(index))):
            await connection.execute(
                sql.SQL(
                    "UPDATE {} SET name = %s, stem = coalesce(stem, name), activation_asked_at = NULL, declined = NULL"
                    " WHERE name = %s"
                ).format(self._table),
                [after, before],
            )
        await connection.execute(
            sql.SQL(
                "UPDATE {0} SET last_generation = (SELECT max(coalesce(last_generation, generation)) FROM {0}"
                " WHERE name = ANY(%(both)s)) WHERE name = ANY(%(both)s)"
            ).format(self._table),
            {"both": [index, beside_name(index)]},
        )

    async def decline(self, connection: Connection, index: str, contents: Sequence[Mapping[str, Any]] | None) -> None:
        """Note what chunks are made of that are not to be made in place; None if that is no longer so."""
        await connection.execute(
            sql.SQL("UPDATE {} SET declined = %s WHERE name = %s").format(self._table),
            [None if contents is None else Jsonb(list(contents)), index],
        )

    async def note_generation(self, connection: Connection, index: str, generation: int) -> None:
        """Note the number of a new generation, so that no later one gets it again."""
        await connection.execute(
            sql.SQL("UPDATE {} SET last_generation = %s WHERE name = %s").format(self._table), [generation, index]
        )

    async def note_fingerprint(
        self,
        connection: Connection,
        index: str,
        made_of: Mapping[str, Any],
        sent_by: Mapping[str, Any],
        *,
        before: Entry | None = None,
    ) -> bool:
        """Note what an index's values are made of, and what has its table sent.

        :param before: only if it is still noted as it is there; returns whether it was.
        """
        unchanged = sql.SQL("" if before is None else " AND made_of IS NOT DISTINCT FROM %s")
        known = [] if before is None else [None if before.made_of is None else Jsonb(before.made_of)]
        cursor = await connection.execute(
            sql.SQL("UPDATE {} SET made_of = %s, sent_by = %s WHERE name = %s{}").format(self._table, unchanged),
            [Jsonb(made_of), Jsonb(sent_by), index, *known],
        )
        return cursor.rowcount > 0

    async def note_part(self, connection: Connection, index: str, table: str, oid: int) -> None:
        """Note a partition of a table that an index is made of, if it is not noted yet; nothing else is known of it."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET made_of = jsonb_set(made_of, %(leaf)s::text[], '[0, \"\"]') WHERE name = %(index)s"
                " AND made_of #> %(leaves)s::text[] IS NOT NULL AND made_of #> %(leaf)s::text[] IS NULL"
            ).format(self._table),
            {"index": index, "leaves": ["tables", table, "leaves"], "leaf": ["tables", table, "leaves", str(oid)]},
        )

    async def note_settings(self, connection: Connection, index: str, settings: Mapping[str, Any]) -> None:
        """Note what is granted on the relations of an index, and the options of its views."""
        await connection.execute(
            sql.SQL("UPDATE {} SET settings = %s WHERE name = %s AND settings IS DISTINCT FROM %s").format(self._table),
            [Jsonb(settings), index, Jsonb(settings)],
        )

    async def load_again(self, connection: Connection, index: str) -> None:
        """Note that a live index is not whole any more: it is building until its next load has drained."""
        await connection.execute(
            sql.SQL("UPDATE {} SET state = 'building' WHERE name = %s AND state = 'live'").format(self._table), [index]
        )

    async def note_followed(self, connection: Connection, slot: str, names: Sequence[str]) -> list[str]:
        """Note that only these indexes of a pipeline are followed from now on; returns those that no longer are."""
        await connection.execute(
            # One that comes back paused is read again when it is resumed.
            sql.SQL(
                "UPDATE {} SET unfollowed_at = NULL WHERE slot = %s AND name = ANY(%s) AND state = 'paused'"
                " AND unfollowed_at IS NOT NULL"
            ).format(self._table),
            [slot, list(names)],
        )
        cursor = await connection.execute(
            sql.SQL(
                # Locked in the order in which commands lock an index and what stands beside it.
                "WITH gone AS (SELECT name FROM {0} WHERE slot = %s AND name <> ALL(%s) AND unfollowed_at IS NULL"
                " ORDER BY name FOR UPDATE) UPDATE {0} AS i SET unfollowed_at = now() FROM gone"
                " WHERE i.name = gone.name RETURNING i.name"
            ).format(self._table),
            [slot, list(names)],
        )
        return sorted(row[0] for row in await cursor.fetchall())

    async def remove(self, connection: Connection, index: str) -> None:
        """Remove an index's entry, and with it all that refers to it."""
        await self._remove(connection, "name = %s", index)

    async def forget(self, connection: Connection, slot: str) -> None:
        """Remove the entries of a pipeline, and with them all that refers to them."""
        await self._remove(connection, "slot = %s", slot)

    async def _remove(self, connection: Connection, condition: LiteralString, value: str) -> None:
        """Remove entries, and keep the last numbers of their generations: applications may still name these."""
        if not await self._present(connection, DROPPED):  # in the tables of an earlier version
            for statement in DROPPED_DDL:
                await connection.execute(sql.SQL(statement).format(schema=sql.Identifier(self._schema)))
        await connection.execute(
            sql.SQL(
                "WITH gone AS (DELETE FROM {} AS i WHERE " + condition + " RETURNING name,"
                " greatest(generation, (to_jsonb(i) ->> 'last_generation')::int) AS last)"
                # The entry of an index knows the numbers of what stands beside it, too.
                " INSERT INTO {} AS d (name, last_generation) SELECT name, last FROM gone WHERE strpos(name, %s) = 0"
                " ON CONFLICT (name) DO UPDATE SET"
                " last_generation = greatest(d.last_generation, excluded.last_generation)"
            ).format(self._table, self._dropped),
            [value, BESIDE],
        )

    @property
    def paused(self) -> sql.Composed:
        """A subquery of the names of the indexes that are paused."""
        return sql.SQL("(SELECT name FROM {} WHERE state = 'paused')").format(self._table)

    @property
    def names(self) -> sql.Composed:
        """A subquery of the names of all indexes."""
        return sql.SQL("(SELECT name FROM {})").format(self._table)


def made_by(entry: Entry, spec: IndexSpec) -> bool:
    """Say whether registering a specification would change nothing of an entry."""
    stored = msgspec.json.decode(msgspec.json.encode(entry))
    return entry.stem == spec.stem and all(stored[name] == value for name, value in _facts_of(spec).items())


def _facts_of(spec: IndexSpec) -> dict[str, object]:
    return {
        "source_table": str(spec.shape.table),
        "table_oid": spec.table_oid,
        "view_name": str(spec.config.view_name),
        "key": list(spec.shape.key),
        "columns": list(spec.shape.carried),
        "fingerprint": spec.fingerprint,
        "generation": spec.generation,
        "model": spec.model,
        "dimensions": spec.dimensions,
        "vector_type": spec.config.vector_type,
        "distance": spec.distance,
        "configuration": as_stored(spec.config),
        "left_out": spec.left_out,
    }
