"""The oracle: says by plain SQL on either side whether every index equals its source. It imports nothing of cdcsync."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql

from tests.chaos.provider import VECTOR_SQL
from tests.chaos.tables import DOCUMENTS

Connection = psycopg.Connection[tuple[Any, ...]]

BESIDE = "~other"
"""How the names end under which chunks stand beside those that are searched."""

SQUEEZED = "regexp_replace({text}, '\\s+', '', 'g')"
"""A text without white space: what cutting it into chunks may drop."""


def differences(source: Connection, target: Connection, indexes: Iterable[str]) -> list[str]:
    """Return what is wrong with the indexes, in words; nothing if all is well.

    Chunks that stand beside those which are searched are compared like these.
    """
    found = []
    for name in indexes:
        stems = target.execute(
            "SELECT name, coalesce(stem, name) FROM cdcsync.indexes WHERE name IN (%s, %s) ORDER BY name",
            [name, name + BESIDE],
        ).fetchall()
        if not stems or stems[0][0] != name:
            found.append(f"{name}: there is no such index")
        found += [problem for one, stem in stems for problem in _of_index(source, target, one, stem)]
    return found


def _of_index(source: Connection, target: Connection, name: str, stem: str) -> list[str]:
    """Compare what the tables hold whose names begin with a stem."""
    columns, rows = DOCUMENTS[name.removesuffix(BESIDE)]
    squeezed = SQUEEZED.format(text="document")
    names = ", ".join(columns)
    wanted = source.execute(
        f"SELECT {names}, {squeezed} FROM ({rows}) AS d ({names}, document) WHERE {squeezed} <> ''"
    ).fetchall()
    chunks = sql.Identifier("cdcsync", f"{stem}_chunks")
    key = columns[:1] if columns[-1] == "tenant" else columns
    joined = SQUEEZED.format(text="string_agg(content, '' ORDER BY chunk_no)")
    there = target.execute(
        sql.SQL(
            f"SELECT {names}, {joined}, count(*) = max(chunk_no) + 1 AND min(chunk_no) = 0 FROM {{}} GROUP BY {names}"
        ).format(chunks)
    ).fetchall()
    found = []
    expected = {tuple(map(str, row[:-1])): row[-1] for row in wanted}
    actual = {tuple(map(str, row[:-2])): row[-2] for row in there}
    if len(actual) != len(there):
        found.append(f"{name}: a document is there twice")
    if broken := [row[:-2] for row in there if not row[-1]]:
        found.append(f"{name}: {len(broken)} documents lack chunks, for instance {broken[0]}")
    for what, keys in (
        ("missing", expected.keys() - actual.keys()),
        ("not in the source", actual.keys() - expected.keys()),
        ("of another text", {one for one in expected.keys() & actual.keys() if expected[one] != actual[one]}),
    ):
        if keys:
            found.append(f"{name}: {len(keys)} of {len(expected)} documents {what}, for instance {sorted(keys)[:4]}")
    return found + _vectors(target, name, stem, sql.SQL(", ").join(map(sql.Identifier, key)))


def _vectors(target: Connection, name: str, stem: str, key: sql.Composable) -> list[str]:
    """Compare what is stored beside the chunks."""
    row = target.execute("SELECT generation, state, reason FROM cdcsync.indexes WHERE name = %s", [name]).fetchone()
    if row is None:
        return [f"{name}: there is no such index"]
    generation, state, reason = row
    parts = {
        "chunks": sql.Identifier("cdcsync", f"{stem}_chunks"),
        "backlog": sql.Identifier("cdcsync", f"{stem}_backlog"),
        "view": sql.Identifier("public", f"{name}_index"),
        "key": key,
    }
    found = [] if state == "live" else [f"{name}: is {state}: {reason}"]
    whole = target.execute(
        "SELECT generation FROM cdcsync.generations WHERE index_name = %s AND state = 'ready' AND embedder = 'far'",
        [name],
    ).fetchall()
    if (generation,) not in whole:
        found.append(f"{name}: generation {generation} is live, and of the provider are {whole}")
    checks = [(what, statement, parts) for what, statement in CHECKS.items()]
    if not name.endswith(BESIDE):
        checks += [(what, statement, parts) for what, statement in OF_VIEWS.items()]
    for (one,) in whole:
        vectors = {**parts, "vectors": sql.Identifier("cdcsync", f"{stem}_vectors_{one}")}
        checks += [(f"{what} in generation {one}", statement, vectors) for what, statement in OF_VECTORS.items()]
    for what, statement, names in checks:
        (count,) = target.execute(sql.SQL(statement).format(**names, name=sql.Literal(name))).fetchone() or (None,)
        if count != 0:
            found.append(f"{name}: {count} {what}")
    return found


CHECKS = {
    "chunks twice": "SELECT count(*) - count(DISTINCT ({key}, chunk_no)) FROM {chunks}",
    "texts still waiting": "SELECT count(*) FROM {backlog}",
    "failed documents": "SELECT count(*) FROM cdcsync.failed_documents WHERE index_name = {name}",
}

OF_VIEWS = {
    "chunks not in the view": "SELECT (SELECT count(*) FROM {chunks}) - (SELECT count(*) FROM {view})",
    "chunks of others in the view": "SELECT count(*) FROM (SELECT {key}, chunk_no, content FROM {view}"
    " EXCEPT SELECT {key}, chunk_no, content FROM {chunks}) AS others",
    "stale rows in the view": "SELECT count(*) FROM {view} WHERE stale",
}
"""Of an index that is searched: those that stand beside it have no view."""

OF_VECTORS = {
    "chunks without a vector": "SELECT count(*) FROM {chunks} AS c WHERE NOT EXISTS"
    " (SELECT FROM {vectors} AS v WHERE v.chunk_id = c.chunk_id)",
    "vectors of another text": "SELECT count(*) FROM {chunks} AS c JOIN {vectors} AS v USING (chunk_id)"
    f" WHERE v.embedding::real[] <> {VECTOR_SQL.format(text='c.content')}",
    "vectors that name another text": "SELECT count(*) FROM {chunks} AS c JOIN {vectors} AS v USING (chunk_id)"
    " WHERE v.content_hash <> c.content_hash",
    "vectors twice": "SELECT count(*) - count(DISTINCT chunk_id) FROM {vectors}",
    "vectors without a chunk": "SELECT count(*) FROM {vectors} AS v WHERE NOT EXISTS"
    " (SELECT FROM {chunks} AS c WHERE c.chunk_id = v.chunk_id)",
}
"""Of each generation of vectors that the provider made."""


def standing(source: Connection, target: Connection, indexes: Iterable[str], slot: str) -> list[str]:
    """Return what is wrong with what holds and finds the documents, in words; nothing if all is well.

    That are the target's own indexes, its column for keyword search, and the slots of the source's database.
    """
    found = [f"{name} is no valid index" for (name,) in target.execute(INVALID).fetchall()]
    for name in indexes:
        for stands, stem in target.execute(
            "SELECT name, coalesce(stem, name) FROM cdcsync.indexes WHERE name IN (%s, %s)", [name, name + BESIDE]
        ).fetchall():
            there = {tuple(row) for row in target.execute(METHODS, [stem, stem]).fetchall()}
            wanted = {("chunks", "btree"), ("chunks", "gin")}
            for (generation,) in target.execute(
                "SELECT generation FROM cdcsync.generations WHERE index_name = %s AND state = 'ready'", [stands]
            ).fetchall():
                wanted |= {(f"vectors_{generation}_settled", method) for method in ("btree", "hnsw")}
                wanted |= {(f"vectors_{generation}_fresh", "btree")}
            if lacking := wanted - there:
                found.append(f"{stands}: there is no index for {sorted(lacking)}, but for {sorted(there)}")
            chunks = sql.Identifier("cdcsync", f"{stem}_chunks")
            (count,) = target.execute(sql.SQL(SEARCH).format(chunks=chunks)).fetchone() or (None,)
            if count != 0:
                found.append(f"{stands}: {count} chunks are searched by words that are not theirs")
    slots = source.execute(
        "SELECT slot_name FROM pg_replication_slots WHERE database = current_database() ORDER BY slot_name"
    ).fetchall()
    if slots != [(slot,)]:
        found.append(f"the source has the slots {slots}, and the worker needs {slot}")
    return found


INVALID = (
    "SELECT i.indexrelid::regclass::text FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
    " WHERE c.relnamespace = 'cdcsync'::regnamespace AND NOT (i.indisvalid AND i.indisready AND i.indislive)"
)

METHODS = (
    "SELECT substr(t.relname, length(%s) + 2), m.amname FROM pg_index AS i JOIN pg_class AS t ON t.oid = i.indrelid"
    " JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_am AS m ON m.oid = c.relam"
    " WHERE t.relnamespace = 'cdcsync'::regnamespace AND starts_with(t.relname, %s || '_') AND i.indisvalid"
)
"""The methods by which the tables are indexed whose names begin with a stem."""

SEARCH = "SELECT count(*) FROM {chunks} WHERE search IS DISTINCT FROM to_tsvector('pg_catalog.english', content)"
"""How many chunks would not be found by their words: no text here is so long that a part of it is left out."""
