"""The words of a text: by one configuration, by the language that a column of each row names, or by characters.

    search = "english"       a text search configuration
    search = "{language}"    a column that names the language of its row
    search = "cjk"           scripts that do not space words

The search column is generated from the row alone, so the server keeps it, and a row whose language changes needs no
work of ours. A value is the name of one of PostgreSQL's configurations, or the two letters of a language; anything
else, and NULL, is `simple`: words as they are written.

PostgreSQL's parser takes a run of Chinese or Japanese characters for one word. By `cjk` each character is a word, which
keeps its place, so a quoted phrase is found inside of any run; what is not of these scripts is as by `simple`.

The column that an index has decides how its queries are read, whatever the configuration asks for meanwhile: words that
are made in another way are found in no column.

Source: PostgreSQL, "Text Search" (Configurations), "Generated Columns"; ISO 639-1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from psycopg import sql

from cdcsync.config import Index, QualifiedName
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection

SIMPLE = "simple"

CJK = "cjk"

CHARACTERS = "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff])"
"""Hiragana, Katakana, the unified ideographs with extension A, Hangul syllables, and compatibility ideographs."""

LETTERS = {
    "arabic": "ar",
    "armenian": "hy",
    "basque": "eu",
    "catalan": "ca",
    "danish": "da",
    "dutch": "nl",
    "english": "en",
    "finnish": "fi",
    "french": "fr",
    "german": "de",
    "greek": "el",
    "hindi": "hi",
    "hungarian": "hu",
    "indonesian": "id",
    "irish": "ga",
    "italian": "it",
    "lithuanian": "lt",
    "nepali": "ne",
    "norwegian": "no",
    "portuguese": "pt",
    "romanian": "ro",
    "russian": "ru",
    "serbian": "sr",
    "spanish": "es",
    "swedish": "sv",
    "tamil": "ta",
    "turkish": "tr",
    "yiddish": "yi",
}
"""Configurations that every PostgreSQL from 14 on has, and the two letters of their languages."""

_BY_LANGUAGE = re.compile(r'CASE lower\(\(?("(?:[^"]|"")+"|\w+)')
"""How the server prints a column of words that is made by languages."""

_BY_CHARACTER = "regexp_replace("
"""What it prints only of one that is made by characters."""


class Searched(msgspec.Struct, frozen=True):
    """How words are made of a text, as expressions of the search function's body.

    :ivar choose: statements that set `configurations`, where they depend on the index's rows.
    :ivar configurations: the array of configurations to begin with.
    :ivar lexemes: a table of the lexemes of `bare`, of each configuration.
    :ivar phrases: a table of queries for the words of the match `m` in their order: its second or its third part.
    :ivar of_chunk: the configuration of a chunk `c`, for its headline.
    """

    choose: sql.Composable
    configurations: sql.Composable
    lexemes: sql.Composable
    phrases: sql.Composable
    of_chunk: sql.Composable


def search_expression(index: Index, text: sql.Composable) -> sql.Composable:
    """Return the expression of the generated search column.

    :param text: the text that is searched.
    """
    if index.search == CJK:
        return _vector("pg_catalog.simple", _apart(text))
    if index.search_column is None:
        return _vector(index.search or SIMPLE, text)
    return _by_language(sql.Identifier(index.search_column), lambda one: _vector(f"pg_catalog.{one}", text))


async def kept_search(connection: Connection, schema: str, relations: str, index: Index) -> str | None:
    """Return the `search` that an index has: that of its column of words, by which its queries have to be read.

    It is what the configuration asks for if that makes the same words, if there is no column yet, and if the column is
    not one of ours; and if the configuration asks for no search by words.

    :param relations: how the names of the index's relations begin.
    :param index: its section as the configuration has it.
    """
    wanted = index.search
    if wanted is None:
        return None
    named = None if wanted == CJK or index.search_column is not None else wanted
    row = await fetch_row(
        connection,
        r"""
        SELECT made, CASE WHEN n.nspname <> 'pg_catalog' THEN quote_ident(n.nspname) || '.' ELSE '' END
                   || quote_ident(t.cfgname),
               t.cfgname = w[cardinality(w)] AND n.nspname = CASE cardinality(w) WHEN 1 THEN 'pg_catalog' ELSE w[1] END
        FROM (SELECT pg_get_expr(d.adbin, d.adrelid) AS made, parse_ident(%(named)s) AS w FROM pg_attrdef d
              JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
              JOIN pg_class c ON c.oid = d.adrelid JOIN pg_namespace s ON s.oid = c.relnamespace
              WHERE s.nspname = %(schema)s AND c.relname = %(chunks)s AND a.attname = 'search') AS d
        LEFT JOIN pg_ts_config t ON t.oid = replace(
            substring(made FROM $$to_tsvector\('((?:[^']|'')+)'::regconfig$$), $$''$$, $$'$$)::regconfig
        LEFT JOIN pg_namespace n ON n.oid = t.cfgnamespace
        """,
        {"named": named, "schema": schema, "chunks": f"{relations}_chunks"},
    )
    # The server waits for whoever drops a table, and then has no expression of it.
    made, name, same = row or (None, None, None)
    if made is None:
        return wanted
    if by_language := _BY_LANGUAGE.search(made):
        return f"{{{QualifiedName.parse(by_language[1]).name}}}"
    if _BY_CHARACTER in made:
        return CJK
    return wanted if same else name or wanted


def searched(index: Index, chunks: sql.Composable, words: sql.Composable, sample: int) -> Searched:
    """Return how the search function makes words of a query.

    A query is in any of the languages that a sample of the rows has, as nobody says which.
    """
    if index.search == CJK:
        configuration = _configuration("pg_catalog.simple")
        return Searched(
            sql.SQL(""),
            sql.SQL("ARRAY[{}]").format(configuration),
            sql.SQL("unnest(to_tsvector(configurations[1], {}))").format(_apart(sql.SQL("bare"))),
            sql.SQL("phraseto_tsquery(configurations[1], {})").format(_apart(sql.SQL("coalesce(m[2], m[3])"))),
            configuration,
        )
    if index.search_column is None:
        configuration = _configuration(index.search or "pg_catalog.simple")
        return Searched(
            sql.SQL(""),
            sql.SQL("ARRAY[{}]").format(configuration),
            sql.SQL("unnest(to_tsvector(configurations[1], bare))"),
            sql.SQL("phraseto_tsquery(configurations[1], coalesce(m[2], m[3]))"),
            configuration,
        )

    def named(column: sql.Composable) -> sql.Composable:
        return _by_language(column, lambda one: _configuration(f"pg_catalog.{one}"))

    column = sql.Identifier(index.search_column)
    return Searched(
        sql.SQL(
            "SELECT least(100, 100.0 * {sample} / greatest(max(s.chunks), 1)) INTO visited FROM {words} AS s"
            " WHERE s.lexeme = '';\n"
            "configurations := ARRAY(SELECT DISTINCT {named} FROM (SELECT DISTINCT c.{column} AS language"
            " FROM {chunks} AS c TABLESAMPLE SYSTEM (visited) REPEATABLE (1)) AS d);\n"
            "IF configurations = '{{}}' THEN configurations := ARRAY[{simple}]; END IF;"
        ).format(
            sample=sql.SQL(str(sample)),
            words=words,
            chunks=chunks,
            column=column,
            named=named(sql.SQL("d.language")),
            simple=_configuration("pg_catalog.simple"),
        ),
        sql.SQL("'{}'"),
        sql.SQL("(SELECT t.* FROM unnest(configurations) AS g CROSS JOIN LATERAL unnest(to_tsvector(g, bare)) AS t)"),
        sql.SQL("unnest(ARRAY(SELECT phraseto_tsquery(g, coalesce(m[2], m[3])) FROM unnest(configurations) AS g))"),
        named(sql.Composed([sql.SQL("c."), column])),
    )


def headline(
    index: Index, configuration: sql.Composable, text: sql.Composable, query: sql.Composable, options: sql.Composable
) -> sql.Composable:
    """Return the expression of the parts of a chunk's text in which words were found.

    :param configuration: the chunk's, see `Searched.of_chunk`.
    """
    if index.search != CJK:
        return sql.SQL("pg_catalog.ts_headline({}, {}, {}, {})").format(configuration, text, query, options)
    # Characters are words here, too: a control character parts them, which is taken out again. By default, words of up
    # to three bytes, as these are, do not begin or end a headline.
    parted = sql.SQL(r"pg_catalog.regexp_replace({}, {}, E'\x01\\1\x01', 'g')").format(text, sql.Literal(CHARACTERS))
    made = "pg_catalog.ts_headline({}, {}, {}, pg_catalog.concat('ShortWord=0, ', {}))"
    return sql.SQL("pg_catalog.translate(" + made + r", E'\x01', '')").format(configuration, parted, query, options)


def _by_language(column: sql.Composable, result: Callable[[str], sql.Composable]) -> sql.Composable:
    cases = [
        sql.SQL("WHEN {} THEN {} WHEN {} THEN {}").format(
            sql.Literal(name), result(name), sql.Literal(letters), result(name)
        )
        for name, letters in LETTERS.items()
    ]
    return sql.SQL("CASE lower({}) {} ELSE {} END").format(column, sql.SQL(" ").join(cases), result(SIMPLE))


def _apart(text: sql.Composable) -> sql.Composable:
    """Return an expression for a text in which each character of these scripts stands alone."""
    return sql.SQL("regexp_replace({}, {}, {}, 'g')").format(text, sql.Literal(CHARACTERS), sql.Literal(r" \1 "))


def _configuration(name: str) -> sql.Composable:
    return sql.SQL("{}::pg_catalog.regconfig").format(sql.Literal(name))


def _vector(name: str, text: sql.Composable) -> sql.Composable:
    return sql.SQL("to_tsvector({}, {})").format(_configuration(name), text)
