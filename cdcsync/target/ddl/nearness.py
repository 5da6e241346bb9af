"""The nearest vectors of an index, as SQL: by its HNSW index, and exactly.

An HNSW index of whole vectors returns them in the order of their distance, and the tiers' orders are merged. One of
signs alone (`hnsw.quantise = "binary"`) returns candidates by how many signs differ; the settled ones among them are
then ordered by their distance, beside the fresh ones.

Source: pgvector's README (HNSW; Binary Quantization).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.target.ddl.names import OPERATORS, Names, signs

PAGE_DEPTH = 200
"""The candidates that a search by vector asks for; see `ddl/searching`."""

RESCORED = 4
"""By signs alone, so many times the wanted vectors are found and then compared; at least `PAGE_DEPTH`, so this many
times."""


def distance(extension: sql.Identifier, spec: IndexSpec, vector: sql.Composable) -> sql.Composed:
    """Return the distance of `v.embedding` from a vector.

    :param extension: the schema of pgvector.
    """
    return sql.SQL("v.embedding OPERATOR({}." + OPERATORS[spec.distance] + ") {}").format(
        extension, _typed(extension, spec, vector)
    )


def nearest(
    schema: str,
    extension: sql.Identifier,
    spec: IndexSpec,
    *,
    vector: sql.Composable,
    limit: sql.Composable,
    rows: sql.Composable,
    settled: bool = False,
) -> sql.Composed:
    """Return the statement that finds the nearest vectors by HNSW, as `chunk_id` and `distance`.

    :param rows: what follows the vectors, `v`, in FROM: nothing, or the chunks with a condition.
    :param settled: look in the settled tier alone.
    """
    names, away = Names(schema, spec.name), distance(extension, spec, vector)
    parts: dict[str, sql.Composable] = {
        "away": away,
        "rows": rows,
        "limit": limit,
        "vectors": names.settled(spec.generation) if settled else names.vectors(spec.generation),
    }
    if spec.config.hnsw.quantise == "none":
        return sql.SQL(
            "SELECT v.chunk_id, {away} AS distance FROM {vectors} AS v{rows} ORDER BY {away} LIMIT {limit}"
        ).format(**parts)
    parts["signs"] = sql.SQL("{} OPERATOR({}.<~>) {}").format(
        signs(extension, spec, sql.SQL("v.embedding")),
        extension,
        signs(extension, spec, _typed(extension, spec, vector)),
    )
    found = sql.SQL(
        "(SELECT v.chunk_id, {away} AS distance FROM {tier} AS v{rows} ORDER BY {signs}"
        " LIMIT {times} OPERATOR(pg_catalog.*) greatest({limit}, {depth}))"
    ).format(
        **parts,
        tier=names.settled(spec.generation),
        times=sql.SQL(str(RESCORED)),
        depth=sql.SQL(str(PAGE_DEPTH)),
    )
    if not settled:
        found += sql.SQL(
            " UNION ALL (SELECT v.chunk_id, {away} AS distance FROM {tier} AS v{rows} ORDER BY {away} LIMIT {limit})"
        ).format(**parts, tier=names.fresh(spec.generation))
    return sql.SQL("SELECT f.chunk_id, f.distance FROM ({}) AS f ORDER BY f.distance LIMIT {}").format(found, limit)


def exactly_nearest(
    schema: str,
    extension: sql.Identifier,
    spec: IndexSpec,
    *,
    vector: sql.Composable,
    limit: sql.Composable,
    rows: sql.Composable,
    settled: bool = False,
) -> sql.Composed:
    """Return the statement that finds the nearest vectors by comparing all of them; see `nearest`."""
    names, away = Names(schema, spec.name), distance(extension, spec, vector)
    # An order that no index has.
    return sql.SQL(
        "SELECT v.chunk_id, {away} AS distance FROM {vectors} AS v{rows}"
        " ORDER BY ({away}) OPERATOR(pg_catalog.+) 0::pg_catalog.float8 LIMIT {limit}"
    ).format(
        away=away,
        rows=rows,
        limit=limit,
        vectors=names.settled(spec.generation) if settled else names.vectors(spec.generation),
    )


def _typed(extension: sql.Identifier, spec: IndexSpec, vector: sql.Composable) -> sql.Composed:
    return sql.SQL("{}::{}." + spec.vector_type).format(vector, extension)
