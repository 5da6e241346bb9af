"""An index as it is stored in the target, which may differ from the configuration; needs no source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config import Index, QualifiedName
from cdcsync.config.differences import made_as
from cdcsync.documents.documents import make_documents
from cdcsync.errors import SetupError
from cdcsync.model.conditions import Where
from cdcsync.model.rows import Shape
from cdcsync.model.spec import Distance, IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.beside import as_kept, made_by
from cdcsync.target.entries import TABLE, Entry
from cdcsync.target.generations import Generations
from cdcsync.target.registry import Registry


async def stored_spec(connection: Connection, schema: str, name: str, config: Index) -> IndexSpec:
    """Return an index as it is stored in the target now, which may differ from the configuration; needs no source.

    The types of keys are the target's; the source's are taken to be the same, as nothing here asks it.

    :raises SetupError: the target holds no such index yet.
    """
    with speaking_of("target", where=f"index {name}"):
        entry, other = await Registry(schema).both(connection, name)
        if entry is None:
            raise no_index(schema, name)
        types = await _columns(connection, schema, entry)
        if not types:
            raise SetupError(
                f"its table {schema}.{entry.relations}_chunks is missing in the target",
                where=f"index {name}",
                hint="a running worker creates it again within a minute, and fills it from the source",
            )
        spec = await _spec_of(connection, schema, entry, as_kept(config, entry, other), types)
        # What is beside it comes into being when the worker has seen that it is asked for.
        if other is None or not (types := await _columns(connection, schema, other)):
            return spec
        return msgspec.structs.replace(
            spec, beside=await _spec_of(connection, schema, other, made_by(config, other), types)
        )


def no_index(schema: str, name: str) -> SetupError:
    """Return the error of a search for an index that never was, or that somebody has dropped."""
    return SetupError(
        "the target holds no such index",
        where=f"index {name}, schema {schema}",
        hint="`cdcsync run` creates and fills it; check target.dsn and target.schema",
    )


async def _columns(connection: Connection, schema: str, entry: Entry) -> dict[str, str]:
    """Return the columns of an index's chunks, and their types; none if the table is missing."""
    cursor = await connection.execute(
        "SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s) AND attnum > 0 AND NOT attisdropped",
        [schema, f"{entry.relations}_chunks"],
    )
    return cast(dict[str, str], dict(await cursor.fetchall()))


async def _spec_of(
    connection: Connection, schema: str, entry: Entry, config: Index, types: Mapping[str, str]
) -> IndexSpec:
    """Return a stored index.

    :param types: of the columns of its chunks.
    """
    name = entry.name
    generations = await Generations(schema).of(connection, name)
    documents = make_documents(config, where=f"indexes.{name}")
    # The worker notes the one that the column has: its expression cannot be read while somebody holds the table.
    noted = made_as(config, entry.configuration or {}, ["search"]).search
    kept = noted if config.search is not None and "search" in types else None
    live = next((one for one in generations if one.generation == entry.generation), None)
    if live is not None:
        config = live.settings(config)
    spec = IndexSpec(
        name=name,
        config=msgspec.structs.replace(
            config,
            vector_type=entry.vector_type,
            columns=entry.columns,
            search=kept,
            view=entry.view_name,
        ),
        shape=Shape(
            name,
            config.table_name,
            entry.key,
            entry.columns,
            documents.columns,
            computed=documents.computed,
            joined=documents.joined,
            many=bool(config.tables),
        ),
        documents=documents,
        source_key_types=_types_of(types, entry.key),
        key_types=_types_of(types, entry.key),
        carried_types=_types_of(types, entry.columns),
        model=entry.model,
        dimensions=entry.dimensions,
        distance=cast(Distance, entry.distance),
        fingerprint=entry.fingerprint,
        where=None if entry.where is None else Where(entry.where),
        generation=entry.generation,
        members={QualifiedName.parse(one): None for one in entry.members} if config.tables else {},
        stem=entry.stem,
    )
    others = [one.spec(spec) for one in generations if one is not live and one.state != "dropping"]
    return msgspec.structs.replace(spec, others=tuple(others))


class Served(msgspec.Struct, frozen=True):
    """What searches of an index read now, which tells that it is not what it was when its spec was read.

    :ivar generation: the number of the generation that searches use.
    :ivar last_generation: the last number that was given, as far as the index remembers.
    """

    generation: int
    last_generation: int
    stem: str | None
    columns: tuple[str, ...]

    def fits(self, spec: IndexSpec) -> bool:
        """Say whether a spec of the live generation is still true."""
        return (self.generation, self.stem, self.columns) == (spec.generation, spec.stem, spec.shape.carried)


async def served_now(connection: Connection, schema: str, name: str) -> Served | None:
    """Return what searches of an index read now; None if there is no such index."""
    statement = sql.SQL(
        "SELECT generation, greatest(generation, last_generation), stem, columns FROM {} WHERE name = %s"
    ).format(sql.Identifier(schema, TABLE))
    try:
        row = await fetch_row(connection, statement, [name])
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None  # it went with all that was ours
    return None if row is None else Served(row[0], row[1], row[2], tuple(row[3]))


def _types_of(types: Mapping[str, str], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(types[name] for name in names)
