"""The names of an index's relations in the target, and the names that pgvector gives to what they need.

Source: pgvector's README (operators, operator classes).
"""

from __future__ import annotations

import hashlib
from typing import LiteralString, cast

from psycopg import sql

from cdcsync.config.names import MAX_NAME_BYTES, QualifiedName
from cdcsync.errors import SetupError
from cdcsync.model.spec import Distance, IndexSpec
from cdcsync.postgres.sessions import Connection

OPERATORS: dict[Distance, str] = {"cosine": "<=>", "l2": "<->", "inner_product": "<#>"}
"""pgvector's distance operator for each distance; all order by nearest first."""

PATH: LiteralString = "pg_catalog, pg_temp"
"""The search_path of each function: a list of names, so it follows SET search_path = without quotes.

The server looks in a session's temporary schema first unless the path names it. As the last name, it cannot hide the
server's own relations and types behind a caller's temporary ones, which would run the caller's code as whoever the
function runs as. Source: PostgreSQL, "CREATE FUNCTION" (Writing SECURITY DEFINER Functions Safely)."""

MAX_ATTEMPTS = 8
"""After so many failures a chunk waits for an operator; with the delays between them that is about ten minutes."""

DISCARDED_ATTEMPTS = 1_000_000
"""Added to the attempts of a text that failed and that an operator discarded. Its row of the backlog stays, as the
reason why the chunk has no vector, and goes as every other when the text changes. Earlier versions counted some
failures beyond `MAX_ATTEMPTS`, but never so many."""

OPCLASSES: dict[Distance, str] = {"cosine": "cosine_ops", "l2": "l2_ops", "inner_product": "ip_ops"}


FRESH, SETTLED = "fresh", "settled"
"""The tiers of a vectors table, in the order in which their tables are locked."""


class Names:
    """The identifiers of one index's relations."""

    def __init__(self, schema: str, index: str) -> None:
        self.schema = sql.Identifier(schema)
        self.chunks = sql.Identifier(schema, f"{index}_chunks")
        self.backlog = sql.Identifier(schema, f"{index}_backlog")
        self._prefix = (schema, index)

    def written(self, *generations: int) -> list[QualifiedName]:
        """Return the tables that changes and vectors of these generations are written to."""
        schema, index = self._prefix
        tables = ("chunks", "backlog", *(f"vectors_{generation}" for generation in generations))
        return [QualifiedName(schema, f"{index}_{table}") for table in tables]

    def vectors(self, generation: int) -> sql.Identifier:
        """Return the vectors table of a generation: both tiers."""
        return self._of_vectors(generation, "")

    def fresh(self, generation: int) -> sql.Identifier:
        """Return the tier of vectors that are new or changed lately, which has no HNSW index."""
        return self._of_vectors(generation, "_fresh")

    def settled(self, generation: int) -> sql.Identifier:
        """Return the tier of vectors that have rested, which has the HNSW index."""
        return self._of_vectors(generation, "_settled")

    def searched(self, generation: int, *, settled: bool) -> sql.Identifier:
        """Return the table that a search reads: the settled tier alone, or both."""
        return self.settled(generation) if settled else self.vectors(generation)

    @property
    def chunks_name(self) -> str:
        """Return the bare name of the chunks table."""
        return f"{self._prefix[1]}_chunks"

    def settled_name(self, generation: int) -> str:
        """Return the bare name of the settled tier."""
        return f"{self._prefix[1]}_vectors_{generation}_settled"

    def rebuild_name(self, generation: int) -> str:
        """Return the bare name of a settled tier in the making."""
        return f"{self._prefix[1]}_vectors_{generation}_new"

    def tiers(self, generation: int) -> dict[str, sql.Identifier]:
        """Return the tables of both tiers, in the order in which they are locked."""
        return {FRESH: self.fresh(generation), SETTLED: self.settled(generation)}

    def all_vectors(self, generation: int) -> list[sql.Identifier]:
        """Return the vectors table of a generation and its tiers, which searches read as well."""
        return [self.vectors(generation), *self.tiers(generation).values()]

    def key_name(self, generation: int, tier: str) -> str:
        """Return the bare name of a tier's primary key; the settled one's is of the time before there were tiers."""
        return f"{self._prefix[1]}_vectors_{generation}{'' if tier == SETTLED else f'_{tier}'}_pkey"

    def hash_name(self, generation: int, tier: str) -> str:
        """Return the bare name of a tier's index of hashes, likewise."""
        return f"{self._prefix[1]}_vectors_{generation}{'' if tier == SETTLED else f'_{tier}'}_hash"

    def near_name(self, generation: int) -> str:
        """Return the bare name of the fresh tier's index of distances."""
        return f"{self._prefix[1]}_vectors_{generation}_fresh_near"

    def _of_vectors(self, generation: int, suffix: str) -> sql.Identifier:
        schema, index = self._prefix
        return sql.Identifier(schema, f"{index}_vectors_{generation}{suffix}")

    @property
    def search_name(self) -> str:
        """The bare name of the index for keyword search."""
        return f"{self._prefix[1]}_chunks_search"

    @property
    def bm25_name(self) -> str:
        """The bare name of the index by which pg_textsearch ranks words."""
        return f"{self._prefix[1]}_chunks_bm25"

    def hnsw_name(self, generation: int) -> str:
        """Return the bare name of a generation's HNSW index."""
        return f"{self._prefix[1]}_vectors_{generation}_hnsw"


def written_tables(schema: str, spec: IndexSpec) -> list[QualifiedName]:
    """Return the tables that changes and vectors of an index are written to, those of all its generations."""
    return Names(schema, spec.relations).written(*(one.generation for one in spec.generations))


def b_tree_name(index: str, column: str) -> str:
    """Return a name for a column's b-tree that no other has: PostgreSQL would cut a long one, and take two for one."""
    name = f"{index}_chunks_by_{column}"
    if len(name.encode()) > MAX_NAME_BYTES:
        name = f"{index}_chunks_by_{hashlib.sha256(column.encode()).hexdigest()[:8]}"
    return name


async def opclass(connection: Connection, spec: IndexSpec) -> sql.Identifier:
    """Return the operator class by which the spec's vectors are indexed; HNSW and IVFFlat name theirs alike."""
    name = f"{spec.config.vector_type}_{OPCLASSES[spec.distance]}"
    return sql.Identifier(await vector_schema(connection), name)


def signs(extension: sql.Identifier, spec: IndexSpec, vector: sql.Composable) -> sql.Composable:
    """Return the signs of a vector's components, as an HNSW index with `quantise = "binary"` holds them.

    :param extension: the schema of pgvector.
    """
    return sql.SQL("{}.binary_quantize({})::pg_catalog.bit({})").format(
        extension, vector, sql.SQL(str(spec.dimensions))
    )


async def vector_schema(connection: Connection) -> str:
    """Return the schema that pgvector is installed in.

    :raises SetupError: it is not installed in this database.
    """
    cursor = await connection.execute(
        "SELECT nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = 'vector'"
    )
    row = await cursor.fetchone()
    if row is None:
        raise SetupError(
            "pgvector is not installed in the target database", where="target", hint="CREATE EXTENSION vector"
        )
    return cast(str, row[0])


def function_name(schema: str, index: str) -> sql.Identifier:
    """Return the name of an index's search function."""
    return sql.Identifier(schema, f"{index}_search")


def hit_name(schema: str, index: str) -> sql.Identifier:
    """Return the name of the type of an index's hits."""
    return sql.Identifier(schema, f"{index}_hit")


def words_name(schema: str, index: str) -> sql.Identifier:
    """Return the name of the table of an index's words."""
    return sql.Identifier(schema, f"{index}_words")


async def pgvector_version(connection: Connection) -> tuple[int, ...]:
    """Return the version of pgvector in this database, major and minor."""
    cursor = await connection.execute("SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'vector'")
    row = await cursor.fetchone()
    return tuple(int(part) for part in str(row[0] if row else "0").split(".")[:2] if part.isdigit())
