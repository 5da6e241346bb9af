"""How large the generations of vectors are that indexes have in the target, those that nobody uses included."""

from __future__ import annotations

from collections.abc import Mapping

from cdcsync.postgres.sessions import Connection


async def stored_generations(
    connection: Connection, schema: str, indexes: Mapping[str, str]
) -> dict[str, dict[int, int]]:
    """Return the size in bytes of each generation of these indexes, by index and number.

    :param indexes: by their names, how the names of their relations begin.
    """
    cursor = await connection.execute(
        r"""
        SELECT i.name, substring(c.relname FROM '_vectors_(\d+)$')::int,
               (SELECT sum(pg_total_relation_size(t.relid)) FROM pg_partition_tree(c.oid) AS t)::int8
        FROM unnest(%s::text[], %s::text[]) AS i (name, stem)
        JOIN pg_class c ON starts_with(c.relname::text, i.stem || '_vectors_')
            AND substring(c.relname::text FROM length(i.stem) + 10) ~ '^\d+$'
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %s AND c.relkind IN ('r', 'p') AND NOT c.relispartition
            AND starts_with(obj_description(c.oid, 'pg_class'), 'cdcsync index ' || i.name || ': ')
        """,
        [list(indexes), list(indexes.values()), schema],
    )
    sizes: dict[str, dict[int, int]] = {}
    for name, generation, size in await cursor.fetchall():
        sizes.setdefault(name, {})[generation] = size
    return sizes
