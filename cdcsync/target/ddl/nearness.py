"""The nearest vectors of an index, as SQL: by its HNSW index, and exactly.

An HNSW index of whole vectors returns them in the order of their distance, and the tiers' orders are merged. One of
signs alone (`hnsw.quantise = "binary"`) returns candidates by how many signs differ; the settled ones among them are
then ordered by their distance, beside the fresh ones.

Source: pgvector's README (HNSW; Binary Quantization).
"""

from __future__ import annotations

from typing import LiteralString

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.target.ddl.names import OPERATORS, Names, signs

FUSION = 60
"""Added to each place before its reciprocal is taken. The paper's value: results were near their best there, and
changed little around it. Smaller lets the first hit of one leg outweigh agreement of both, larger makes all places
alike."""

MAX_HITS = 1_000
"""The last place that a search can be asked for: pgvector's upper bound of hnsw.ef_search."""

PAGE_DEPTH = 200
"""The chunks that each leg of a search returns at first, for any page: the order of hits depends on how deep the legs
look, so one page continues the other only if both look equally deep. For the first 70 hits this is as good as any
depth: what both legs place below 200 scores less than 2 / (FUSION + 200), which the first 70 chunks of either leg
exceed alone. A page that lies deeper has the legs look deeper, and continues the hits that they had before."""

EF_SEARCH = 100
"""How many candidates HNSW looks at, where pgvector's default is 40: who searches the view can tune that, a search
should not miss a near neighbour to save a fraction of a millisecond."""

ITERATIVE = (0, 8)
"""The first version of pgvector that scans iteratively."""

WORK_MEMORY = "32MB"
"""Enough to sort the distances of some ten thousand rows in memory; an iterative scan may use as much."""

RESCORED = 4
"""By signs alone, so many times the wanted vectors are found and then compared; at least `PAGE_DEPTH`, so this many
times."""


DEPTH: LiteralString = f"CASE WHEN k <= {PAGE_DEPTH} THEN {PAGE_DEPTH} ELSE {MAX_HITS} END"
"""How many chunks each leg returns at first for pages of `k` hits, as an expression."""


def effort(*, iterative: bool) -> LiteralString:
    """Return the `hnsw.ef_search` of a search, as an expression of `k`, `depth` and `rescored`.

    An iterative scan continues past these candidates; an older pgvector returns no more than they are.

    :param iterative: whether pgvector scans iteratively.
    """
    least: LiteralString = "k" if iterative else "depth"
    return f"least(greatest({EF_SEARCH}, {least}, rescored * depth), {MAX_HITS})"


def rescored(spec: IndexSpec) -> int:
    """Return how many times the chunks that the vector leg returns are found by signs; 0 where whole vectors are."""
    return RESCORED if spec.config.hnsw.quantise == "binary" else 0


def settings(*, iterative: bool) -> dict[str, str]:
    """Return the server's settings that a search by vector has, but for how far it looks."""
    found = {"work_mem": WORK_MEMORY, "jit": "off", "plan_cache_mode": "force_custom_plan"}
    if iterative:
        # Scan on until enough rows are found: past the entries of rows that were updated or deleted since, and past
        # rows that a filter leaves out.
        found["hnsw.iterative_scan"] = "relaxed_order"
    return found


def distance(extension: sql.Identifier, spec: IndexSpec, vector: sql.Composable) -> sql.Composed:
    """Return the distance of `v.embedding` from a vector.

    :param extension: the schema of pgvector.
    """
    return sql.SQL("v.embedding OPERATOR({}." + OPERATORS[spec.distance] + ") {}").format(
        extension, _typed(extension, spec, vector)
    )


def measured(extension: sql.Identifier, spec: IndexSpec, vector: sql.Composable, other: sql.Composable) -> sql.Composed:
    """Return the distance of two vectors, neither of which is stored; see `distance`."""
    return sql.SQL("{1} OPERATOR({0}." + OPERATORS[spec.distance] + ") {2}").format(
        extension, _typed(extension, spec, vector), _typed(extension, spec, other)
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
    names, away = Names(schema, spec.relations), distance(extension, spec, vector)
    parts: dict[str, sql.Composable] = {
        "away": away,
        "rows": rows,
        "limit": limit,
        "vectors": names.searched(spec.generation, settled=settled),
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
    names, away = Names(schema, spec.relations), distance(extension, spec, vector)
    # An order that no index has.
    return sql.SQL(
        "SELECT v.chunk_id, {away} AS distance FROM {vectors} AS v{rows}"
        " ORDER BY ({away}) OPERATOR(pg_catalog.+) 0::pg_catalog.float8 LIMIT {limit}"
    ).format(
        away=away,
        rows=rows,
        limit=limit,
        vectors=names.searched(spec.generation, settled=settled),
    )


def _typed(extension: sql.Identifier, spec: IndexSpec, vector: sql.Composable) -> sql.Composed:
    return sql.SQL("{}::{}." + spec.vector_type).format(vector, extension)
