"""BM25 of the extension pg_textsearch, where it is installed: an index that scores by itself.

    installed? ─► an index of the chunks' text ─► the search function's keyword leg asks it, while it is valid

Without it, the search function ranks by the words' counts that the worker keeps. The extension's index returns the best
chunks in their order, and so looks at fewer of them. It knows one text search configuration and neither phrases nor
exclusions: those stay conditions on the search column, and an index whose languages differ by row, or that has each
character for a word, does without it.

Source: pg_textsearch's README (Querying; PL/pgSQL and Stored Procedures; Data Types).
"""

from __future__ import annotations

from typing import LiteralString

import msgspec
from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.languages import CJK
from cdcsync.target.ddl.names import Names

_READY: LiteralString = "pg_catalog.current_setting('pg_textsearch.default_limit', true) IS NOT NULL"
"""Whether the server has loaded the extension's library when it started, which every use of it needs."""


class Bm25(msgspec.Struct, frozen=True):
    """How an index's words are ranked by the extension.

    :ivar extension: the schema of its operators.
    :ivar configuration: the text search configuration, with its schema.
    """

    extension: str
    configuration: str

    @property
    def option(self) -> str:
        """The option that the index was built with, as the catalog has it."""
        return f"text_config={self.configuration}"

    @property
    def method(self) -> sql.Composed:
        """The definition of the index, as it follows USING in CREATE INDEX."""
        return sql.SQL("bm25 (content {}.text_bm25_ops) WITH (text_config = {})").format(
            sql.Identifier(self.extension), sql.Literal(self.configuration)
        )


def rankable(spec: IndexSpec) -> bool:
    """Say whether the extension may rank an index's words, should the target have it."""
    config = spec.config
    return config.ranking == "auto" and config.search not in (None, CJK) and config.search_column is None


async def bm25_of(connection: Connection, spec: IndexSpec) -> Bm25 | None:
    """Return how the extension ranks an index's words; None where it does not."""
    if not rankable(spec):
        return None
    row = await fetch_row(
        connection,
        sql.SQL(
            "SELECT en.nspname, quote_ident(cn.nspname) || '.' || quote_ident(c.cfgname)"
            " FROM pg_extension AS e JOIN pg_namespace AS en ON en.oid = e.extnamespace"
            " CROSS JOIN pg_ts_config AS c JOIN pg_namespace AS cn ON cn.oid = c.cfgnamespace"
            " WHERE e.extname = 'pg_textsearch' AND c.oid = %s::regconfig AND " + _READY
        ),
        [spec.config.search],
    )
    return None if row is None else Bm25(*row)


async def bm25_option(connection: Connection, schema: str, spec: IndexSpec) -> str | None:
    """Return the option that an index's BM25 was built with, "" if it is not valid, and None if there is none."""
    row = await fetch_row(
        connection,
        "SELECT CASE WHEN i.indisvalid THEN c.reloptions[1] ELSE '' END FROM pg_class AS c"
        " JOIN pg_index AS i ON i.indexrelid = c.oid WHERE c.oid = to_regclass(%s)",
        [_index_name(schema, spec)],
    )
    return None if row is None else row[0]


def usable(schema: str, spec: IndexSpec) -> sql.Composed:
    """Return the statement that has a row while the extension's index can be asked: the schema of its operators.

    `configurations` is the search function's variable. Neither extension nor index may be there, and the caller may
    lack the extension's schema: it is asked each time.
    """
    if not rankable(spec):
        return sql.SQL("SELECT NULL WHERE false").format()
    return sql.SQL(
        "SELECT quote_ident(n.nspname) FROM pg_index AS i JOIN pg_class AS o ON o.oid = i.indexrelid"
        " JOIN pg_opclass AS p ON p.oid = i.indclass[0] JOIN pg_namespace AS n ON n.oid = p.opcnamespace"
        " WHERE i.indexrelid = to_regclass({}) AND i.indisvalid AND has_schema_privilege(n.oid, 'USAGE') AND "
        + _READY
        + " AND EXISTS (SELECT FROM pg_options_to_table(o.reloptions) AS c"
        " WHERE c.option_name = 'text_config' AND c.option_value::regconfig = configurations[1])"
    ).format(sql.Literal(_index_name(schema, spec)))


def best_by_words(schema: str, spec: IndexSpec) -> sql.Composed:
    """Return the statement of the best chunks by their words, as ids and scores.

    The search function puts the schema of the extension's operators for <ranker>, and a condition on the chunks `c` for
    <rows>. $1 are the words, and $2 is how many chunks.
    """
    # It scores by negative numbers, so that the best comes first; what holds none of the words has none.
    score = sql.SQL("c.content OPERATOR(<ranker>.<@>) <ranker>.to_bm25query($1, {})").format(
        sql.Literal(_index_name(schema, spec))
    )
    return sql.SQL(
        "SELECT pg_catalog.array_agg(m.chunk_id ORDER BY m.score, m.chunk_id),"
        " pg_catalog.array_agg(OPERATOR(pg_catalog.-) m.score ORDER BY m.score, m.chunk_id)"
        " FROM (SELECT c.chunk_id, {score} AS score FROM {chunks} AS c WHERE <rows> ORDER BY {score} LIMIT $2) AS m"
        " WHERE m.score OPERATOR(pg_catalog.<) 0"
    ).format(score=score, chunks=Names(schema, spec.relations).chunks)


def _index_name(schema: str, spec: IndexSpec) -> str:
    """Return the index's name as SQL writes it."""
    return sql.Identifier(schema, Names(schema, spec.relations).bm25_name).as_string()
