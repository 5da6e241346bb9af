"""The functions, types and collations that conditions go by, and digests of their definitions.

The outcome of a condition may change with what the user defined, and no row event tells: CREATE OR REPLACE FUNCTION,
ALTER OPERATOR, another check of a domain, a renamed label of an enum, a collation made anew. So everything outside of
pg_catalog that a condition may go by belongs to what an index is made of, together with what that goes by in turn: the
types of a function's arguments and of a type's attributes, what a domain is made of, the functions of a type's casts.

A condition names things by their schema, because our sessions have no search path. In bodies each word counts, even if
only a comment has it: as every function and operator of that name, in whatever schema, and as a type or collation of
the schema that is named with it, or of one in a search_path that a function sets. Each tenant of an application may
have types of one name, so other schemas do not count. The rows of a table are a type as well; of tables that bodies
mention that would be too many, so only those count that the condition itself names, or that the server says a function
takes or returns. A digest too many costs a comparison when that thing is altered. One that was altered and altered back
decided about rows in between, so the transactions that last wrote the catalog's entries are told beside the digests. A
GRANT writes such an entry, too. That is not excused where the privileges are others: the function may have been another
one besides.

A body of SQL statements (BEGIN ATOMIC) is stored as the server understood it, and the server records what that depends
on. So its text is not asked for: the function that writes it (pg_get_function_sqlbody) waits for all tables that the
body reads, and any function with a name in some body may be somebody else's.

A condition that searches text may go by `default_text_search_config`, which no session of ours pins: it is what the
user's own words are to be read by. So its value counts as well, as a new session would have it. And it goes by
configurations and dictionaries, which may be altered (ALTER TEXT SEARCH CONFIGURATION … ALTER MAPPING). There are few,
so all of them count. What writes and reads numbers and dates goes by settings that are pinned, and were not always.

Source: PostgreSQL, "System Catalogs" (pg_proc, pg_operator, pg_cast, pg_type, pg_enum, pg_attribute, pg_range,
pg_constraint, pg_collation, pg_depend, pg_db_role_setting, pg_ts_config, pg_ts_config_map, pg_ts_dict); "Text Search
Functions and Operators".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import LiteralString

import msgspec

from cdcsync.documents.lexer import Token, Unreadable, tokens
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection

Name = tuple[str | None, str, bool]
"""A schema, None for any; what is called there; and whether only the text of a body says so."""


_SEARCHING = re.compile(
    r"@@@?|\b(?:\w*to_tsvector|\w*to_tsquery|ts_headline|ts_lexize|unaccent|get_current_ts_config)\b", re.IGNORECASE
)
"""Matches what may go by a configuration for text search, the session's or a named one, or by a dictionary."""

_WRITING = re.compile(r"\bto_(?:char|number|date|timestamp)\b|=\s*null\b", re.IGNORECASE)
"""Matches what may go by `lc_time`, `lc_numeric` or `transform_null_equals`."""

_SEARCH_SETTING: LiteralString = """
    SELECT coalesce(string_agg(one, ' ' ORDER BY setrole, setdatabase), current_setting('default_text_search_config'))
    FROM pg_db_role_setting, unnest(setconfig) AS one
    WHERE one LIKE 'default_text_search_config=%%'
        AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
        AND setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user))
"""

_SEARCH_CONFIGURATIONS: LiteralString = """
    SELECT md5(string_agg(one, ' ' ORDER BY one)) FROM (
        SELECT concat_ws(' ', 'config', oid, xmin) FROM pg_ts_config
        UNION ALL SELECT concat_ws(' ', 'dictionary', oid, xmin) FROM pg_ts_dict
        UNION ALL SELECT concat_ws(' ', mapcfg, maptokentype, mapseqno, mapdict, xmin) FROM pg_ts_config_map
    ) AS entries (one)
"""
"""With the transactions that last wrote them: what was altered and altered back decided about rows in between, and a
dictionary is written to have sessions read its files again."""


KEPT_IN_PLANS = ("type ", "collation ")
"""How the names of what a session may go on to see as it was begin.

A session keeps plans of functions' bodies, with the labels of enums, the attributes of composite types and the
collations as it found them, and makes them anew only for functions and operators that are altered.

Source: PostgreSQL, src/backend/utils/cache/plancache.c (InitPlanCache lists the catalogs that are watched).
"""


class Called(msgspec.Struct, frozen=True):
    """A function, a type or a collation.

    :ivar name: as a message shows it: a function with its arguments.
    :ivar digest: of its definition, without its owner, its privileges and its cost.
    :ivar written: the entries that make it up, or by which an operator or a cast calls it, each with the transaction
        (32 bits) that last wrote it; of a type, a digest of those.
    :ivar body: its text, if it is in a language that may call others and its text says what it calls; the checks of a
        domain.
    :ivar named: the schemas and names of what it depends on, as the server says; nothing of what is written in C.
    :ivar path: the schemas of the search_path that it sets.
    """

    name: str
    digest: str
    written: list[str]
    body: str | None
    named: list[list[str]] = []
    path: list[str] = []

    @property
    def calls(self) -> set[Name]:
        """The names of what it may go by."""
        return {*_named_in_body(self.body or ""), *((schema, name, False) for schema, name in self.named)}


class Definition(msgspec.Struct, frozen=True):
    """What something that a condition goes by is defined as.

    :ivar written: which transactions last wrote it, of a function, a type or a collation.
    """

    digest: str
    written: str = ""


async def functions_called(connection: Connection, conditions: Iterable[str]) -> dict[str, dict[str, Definition]]:
    """Return, for each condition, the definitions of what it goes by outside of pg_catalog, or searches by; by name."""
    named = {text: set(_named_in_condition(text)) for text in conditions}
    known: dict[Name, list[Called]] = {}
    found: dict[str, dict[str, Definition]] = {}
    for text, left in named.items():
        digests: dict[str, str] = {}
        written: dict[str, set[str]] = {}
        seen: set[Name] = set()
        bodies = [text]
        paths: set[str] = set()
        words: set[str] = set()
        while left:
            await _look_up(connection, known, left)
            seen |= left
            for one in (one for name in left for one in known[name]):
                written.setdefault(one.name, set()).update(one.written)
            new = [one for name in left for one in known[name] if one.name not in digests]
            digests |= {one.name: one.digest for one in new}
            bodies += [one.body for one in new if one.body is not None]
            bodies += [name for one in new for _, name in one.named]
            left = {name for one in new for name in one.calls}
            paths.update(schema for one in new for schema in one.path)
            words.update(word for schema, word, _ in left if schema is None)
            left = (left | {(schema, word, True) for schema in paths for word in words}) - seen
        if any(map(_SEARCHING.search, bodies)):
            digests["default_text_search_config"] = str(await fetch_value(connection, _SEARCH_SETTING, []))
            digests["text search configurations"] = str(await fetch_value(connection, _SEARCH_CONFIGURATIONS, []))
        if any(map(_WRITING.search, bodies)):
            digests["lc_time, lc_numeric, transform_null_equals"] = "pinned"
        found[text] = {
            name: Definition(digest, ", ".join(sorted(written.get(name, ())))) for name, digest in digests.items()
        }
    return found


def _named_in_condition(text: str) -> Iterator[Name]:
    """Yield what a condition names by a schema: functions, operators, types, collations."""
    try:
        words = tokens(text)
    except Unreadable:
        return  # It is refused for that.
    for schema, dot, name in zip(words, words[1:], words[2:], strict=False):
        if dot == Token("mark", ".") and schema.kind in ("name", "quoted") and name.kind != "mark":
            yield schema.text, name.text, False


_IN_BODY = re.compile(
    r"""(?P<word> [^\W\d][\w$]* | "[^"]+" ) (?P<dot> \s* \. \s* (?= [^\W\d] | " ) )?
      | (?P<operator> [-+*/<>=~!@\#%^&|`?]+ )""",
    re.VERBOSE,
)


def _named_in_body(text: str) -> Iterator[Name]:
    """Yield what a body may go by; in a string or a comment, too."""
    schema = None
    for word, dot, operator in _IN_BODY.findall(text):
        name = operator or _as_stored(word)
        yield None, name, True
        if schema is not None:
            yield schema, name, True
        schema = name if dot else None


def _as_stored(name: str) -> str:
    return name[1:-1] if name.startswith('"') else name.lower()


async def _look_up(connection: Connection, known: dict[Name, list[Called]], names: set[Name]) -> None:
    """Add what has these names to what is known."""
    wanted = list(names - known.keys())
    known |= {name: [] for name in wanted}
    if not wanted:
        return
    cursor = await connection.execute(_CALLED, [list(column) for column in zip(*wanted, strict=True)])
    for place, *facts in await cursor.fetchall():
        known[wanted[place - 1]].append(Called(*facts))


_CALLED: LiteralString = """
    WITH wanted AS (
        SELECT w.schema, w.name::name, w.in_body, w.place
        FROM unnest(%s::text[], %s::text[], %s::bool[]) WITH ORDINALITY AS w (schema, name, in_body, place)
    ), named AS (
        SELECT w.place, one.class, one.oid FROM wanted AS w CROSS JOIN LATERAL (
            SELECT 'pg_proc'::regclass, oid, pronamespace FROM pg_proc WHERE proname = w.name
            UNION ALL SELECT 'pg_operator'::regclass, oid, oprnamespace FROM pg_operator WHERE oprname = w.name
            UNION ALL SELECT 'pg_type'::regclass, oid, typnamespace FROM pg_type
                WHERE w.schema IS NOT NULL AND typname = w.name AND (typtype <> 'c' OR NOT w.in_body
                    OR EXISTS (SELECT FROM pg_class WHERE oid = typrelid AND relkind = 'c'))
            UNION ALL SELECT 'pg_collation'::regclass, oid, collnamespace FROM pg_collation
                WHERE w.schema IS NOT NULL AND collname = w.name
                    AND collencoding IN (-1, pg_char_to_encoding(getdatabaseencoding()))
        ) AS one (class, oid, schema) JOIN pg_namespace AS n ON n.oid = one.schema
        WHERE n.nspname = coalesce(w.schema, n.nspname) AND n.nspname NOT IN ('pg_catalog', 'information_schema')
    ), entries AS (
        SELECT place, class, oid, NULL AS by FROM named
        UNION SELECT n.place, 'pg_proc'::regclass, o.oprcode, concat_ws(' ', 'operator', o.oid, o.xmin)
            FROM named AS n JOIN pg_operator AS o USING (oid) WHERE n.class = 'pg_operator'::regclass
        UNION SELECT n.place, 'pg_proc'::regclass, c.castfunc, concat_ws(' ', 'cast', c.oid, c.xmin)
            FROM pg_cast AS c CROSS JOIN LATERAL unnest(ARRAY[c.castsource, c.casttarget]) AS type (oid)
            JOIN named AS n ON n.oid = type.oid WHERE n.class = 'pg_type'::regclass
    )
    SELECT e.place, d.name, d.digest, array_remove(ARRAY[d.written, e.by], NULL), d.body,
        -- An array counts as its elements. Of what is in pg_catalog there is no record of its own.
        ARRAY(
            SELECT ARRAY[n.nspname::text, used.name::text]
            FROM (VALUES (e.class, e.oid), ('pg_class'::regclass, d.relation)) AS owner (class, oid)
            JOIN pg_depend AS dep ON dep.classid = owner.class AND dep.objid = owner.oid CROSS JOIN LATERAL (
                SELECT pronamespace, proname FROM pg_proc
                    WHERE dep.refclassid = 'pg_proc'::regclass AND oid = dep.refobjid
                UNION ALL SELECT oprnamespace, oprname FROM pg_operator
                    WHERE dep.refclassid = 'pg_operator'::regclass AND oid = dep.refobjid
                UNION ALL SELECT collnamespace, collname FROM pg_collation
                    WHERE dep.refclassid = 'pg_collation'::regclass AND oid = dep.refobjid
                UNION ALL SELECT own.typnamespace, own.typname FROM pg_type AS t
                    JOIN pg_type AS own ON own.oid = CASE WHEN t.typlen = -1 THEN coalesce(nullif(t.typelem, 0), t.oid)
                        ELSE t.oid END
                    WHERE dep.refclassid = 'pg_type'::regclass AND t.oid = dep.refobjid
            ) AS used (schema, name) JOIN pg_namespace AS n ON n.oid = used.schema
            WHERE dep.deptype IN ('n', 'i') AND (e.class <> 'pg_proc'::regclass OR d.body <> '' OR d.parsed <> '')
            UNION ALL SELECT ARRAY['pg_catalog', c.proname::text]
            FROM regexp_matches(d.parsed, ':(?:op)?funcid ([0-9]+)', 'g') AS m (found)
            JOIN pg_proc AS c ON c.oid = found[1]::oid WHERE c.pronamespace = 'pg_catalog'::regnamespace),
        ARRAY(SELECT btrim(one, ' "') FROM unnest(d.settings) AS s (setting)
            CROSS JOIN LATERAL regexp_split_to_table(substr(setting, length('search_path=') + 1), ',') AS one
            WHERE starts_with(setting, 'search_path='))
    FROM entries AS e CROSS JOIN LATERAL (
        SELECT p.oid::regprocedure::text,
            md5((to_jsonb(p) - ARRAY['oid', 'proowner', 'proacl', 'procost', 'prorows'])::text),
            concat_ws(' ', 'function', p.oid, p.xmin), CASE WHEN l.lanname NOT IN ('c', 'internal') THEN p.prosrc END,
            p.prosqlbody::text, NULL::oid, p.proconfig
        FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
        WHERE e.class = 'pg_proc'::regclass AND p.oid = e.oid AND p.pronamespace <> 'pg_catalog'::regnamespace
        UNION ALL
        SELECT format('type %%I.%%I', n.nspname, t.typname), md5(made_of.facts), 'type ' || md5(made_of.entries),
            made_of.checks, NULL, t.typrelid, NULL
        FROM pg_type AS t JOIN pg_namespace AS n ON n.oid = t.typnamespace CROSS JOIN LATERAL (
            SELECT string_agg(fact, ' ' ORDER BY place, fact), string_agg(entry, ' ' ORDER BY entry),
                string_agg(fact, ' ' ORDER BY fact) FILTER (WHERE is_check)
            FROM (
                SELECT 0, false, concat_ws(' ', 'type', t.oid, t.xmin),
                    (to_jsonb(t) - ARRAY['oid', 'typowner', 'typacl', 'typarray', 'typrelid', 'typdefault',
                        'typdefaultbin'])::text
                UNION ALL SELECT enumsortorder, false, concat_ws(' ', 'label', oid, xmin), enumlabel
                    FROM pg_enum WHERE enumtypid = t.oid
                UNION ALL SELECT attnum, false, concat_ws(' ', 'attribute', attnum, xmin),
                        concat_ws(' ', attnum, attname, atttypid, atttypmod, attcollation)
                    FROM pg_attribute WHERE attrelid = t.typrelid AND attnum > 0 AND NOT attisdropped
                UNION ALL SELECT 0, false, concat_ws(' ', 'range', r.xmin), to_jsonb(r)::text
                    FROM pg_range AS r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
                UNION ALL SELECT 0, true, concat_ws(' ', 'check', oid, xmin), pg_get_constraintdef(oid)
                    FROM pg_constraint WHERE contypid = t.oid
            ) AS part (place, is_check, entry, fact)
        ) AS made_of (facts, entries, checks)
        WHERE e.class = 'pg_type'::regclass AND t.oid = e.oid
        UNION ALL
        SELECT format('collation %%I.%%I', n.nspname, c.collname), md5((to_jsonb(c) - ARRAY['oid', 'collowner'])::text),
            concat_ws(' ', 'collation', c.oid, c.xmin), NULL, NULL, NULL, NULL
        FROM pg_collation AS c JOIN pg_namespace AS n ON n.oid = c.collnamespace
        WHERE e.class = 'pg_collation'::regclass AND c.oid = e.oid
    ) AS d (name, digest, written, body, parsed, relation, settings)
"""
