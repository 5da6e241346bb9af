"""The functions that conditions call, and digests of their definitions.

The outcome of a condition may change with a function of the user's, and no row event tells: CREATE OR REPLACE
FUNCTION, ALTER OPERATOR, another check of a domain. So everything that a condition may call outside of pg_catalog
belongs to what an index is made of, together with what that calls in turn.

A condition names things by their schema, because our sessions have no search path. A function's body may have a path of
its own, so in bodies every function of a name counts, in whatever schema; so does one that only a comment mentions. A
digest too many costs a comparison when that function is replaced. One that was replaced and replaced back decided about
rows in between, so the transactions that last wrote the catalog's entries are told beside the digests. A GRANT writes
such an entry, too. That is not excused where the privileges are others: the function may have been another one besides.

A body of SQL statements (BEGIN ATOMIC) is stored as the server understood it, and the server records what that depends
on. So its text is not asked for: the function that writes it (pg_get_function_sqlbody) waits for all tables that the
body reads, and any function with a name in some body may be somebody else's.

A condition that searches text may go by `default_text_search_config`, which no session of ours pins: it is what the
user's own words are to be read by. So its value counts as well, as a new session would have it. And it goes by
configurations and dictionaries, which may be altered (ALTER TEXT SEARCH CONFIGURATION … ALTER MAPPING). There are few,
so all of them count. What writes and reads numbers and dates goes by settings that are pinned, and were not always.

Source: PostgreSQL, "System Catalogs" (pg_proc, pg_operator, pg_cast, pg_constraint, pg_depend, pg_db_role_setting,
pg_ts_config, pg_ts_config_map, pg_ts_dict); "Text Search Functions and Operators".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import LiteralString

import msgspec

from cdcsync.documents.lexer import Token, Unreadable, tokens
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection

Name = tuple[str | None, str]
"""A schema, None for any, and what is called there."""


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


class Called(msgspec.Struct, frozen=True):
    """A function, or the checks of a domain.

    :ivar name: with its arguments, as a message shows it.
    :ivar digest: of its definition, without its owner, its privileges and its cost.
    :ivar written: the entries that make it up, or by which an operator or a cast calls it, each with the transaction
        (32 bits) that last wrote it.
    :ivar body: its text, if it is in a language that may call others and its text says what it calls.
    :ivar named: the schemas and names of what it depends on, if its body is SQL that the server has understood.
    """

    name: str
    digest: str
    written: list[str]
    body: str | None
    named: list[list[str]] = []

    @property
    def calls(self) -> set[Name]:
        """The names of what it may call."""
        return {*_named_in_body(self.body or ""), *((schema, name) for schema, name in self.named)}


class Definition(msgspec.Struct, frozen=True):
    """What something that a condition goes by is defined as.

    :ivar written: which transactions last wrote it, of a function or a domain's checks.
    """

    digest: str
    written: str = ""


async def functions_called(connection: Connection, conditions: Iterable[str]) -> dict[str, dict[str, Definition]]:
    """Return, for each condition, the definitions of what it calls outside of pg_catalog, or searches by; by name."""
    named = {text: set(_named_in_condition(text)) for text in conditions}
    known: dict[Name, list[Called]] = {}
    found: dict[str, dict[str, Definition]] = {}
    for text, left in named.items():
        digests: dict[str, str] = {}
        written: dict[str, set[str]] = {}
        seen: set[Name] = set()
        bodies = [text]
        while left:
            await _look_up(connection, known, left)
            seen |= left
            for one in (one for name in left for one in known[name]):
                written.setdefault(one.name, set()).update(one.written)
            new = [one for name in left for one in known[name] if one.name not in digests]
            digests |= {one.name: one.digest for one in new}
            bodies += [one.body for one in new if one.body is not None]
            bodies += [name for one in new for _, name in one.named]
            left = {name for one in new for name in one.calls} - seen
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
    """Yield what a condition names by a schema: functions, operators, types."""
    try:
        words = tokens(text)
    except Unreadable:
        return  # It is refused for that.
    for schema, dot, name in zip(words, words[1:], words[2:], strict=False):
        if dot == Token("mark", ".") and schema.kind in ("name", "quoted") and name.kind != "mark":
            yield schema.text, name.text


_IN_BODY = re.compile(
    r"""(?P<schema> [^\W\d][\w$]* | "[^"]+" ) \s* \. \s* (?P<name> [^\W\d][\w$]* | "[^"]+" )
      | (?P<called> [^\W\d][\w$]* | "[^"]+" ) (?= \s* \( )
      | (?P<operator> [-+*/<>=~!@\#%^&|`?]+ )""",
    re.VERBOSE,
)


def _named_in_body(text: str) -> Iterator[Name]:
    """Yield what a body may call; in a string or a comment, too."""
    for match in _IN_BODY.finditer(text):
        schema, name, called, operator = match.group("schema", "name", "called", "operator")
        if name is not None:
            yield None, _as_stored(name)
        yield (None, operator) if operator is not None else (None, _as_stored(called or schema))


def _as_stored(name: str) -> str:
    return name[1:-1] if name.startswith('"') else name.lower()


async def _look_up(connection: Connection, known: dict[Name, list[Called]], names: set[Name]) -> None:
    """Add what has these names to what is known."""
    wanted = list(names - known.keys())
    known |= {name: [] for name in wanted}
    if not wanted:
        return
    cursor = await connection.execute(_CALLED, [[schema for schema, _ in wanted], [name for _, name in wanted]])
    for place, *facts in await cursor.fetchall():
        known[wanted[place - 1]].append(Called(*facts))


_CALLED: LiteralString = """
    WITH wanted AS (
        SELECT w.name, w.place, n.oid AS schema
        FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS w (schema, name, place)
        JOIN pg_namespace AS n ON n.nspname = w.schema OR w.schema IS NULL
        WHERE n.nspname NOT IN ('pg_catalog', 'information_schema')
    ), functions AS (
        SELECT w.place, p.oid, NULL AS by
        FROM wanted AS w JOIN pg_proc AS p ON p.proname = w.name AND p.pronamespace = w.schema
        UNION SELECT w.place, o.oprcode, concat_ws(' ', 'operator', o.oid, o.xmin) FROM wanted AS w
            JOIN pg_operator AS o ON o.oprname = w.name AND o.oprnamespace = w.schema
        UNION SELECT w.place, c.castfunc, concat_ws(' ', 'cast', c.oid, c.xmin) FROM wanted AS w
            JOIN pg_type AS t ON t.typname = w.name AND t.typnamespace = w.schema
            JOIN pg_cast AS c ON t.oid IN (c.castsource, c.casttarget)
    )
    SELECT f.place, p.oid::regprocedure::text,
        md5((to_jsonb(p) - ARRAY['oid', 'proowner', 'proacl', 'procost', 'prorows'])::text),
        array_remove(ARRAY[concat_ws(' ', 'function', p.oid, p.xmin), f.by], NULL),
        CASE WHEN l.lanname NOT IN ('c', 'internal') THEN p.prosrc END,
        -- These are also its arguments' types and what their defaults call. An array counts as its elements. Of
        -- what is in pg_catalog there is no record of its own.
        CASE WHEN p.prosqlbody IS NULL THEN '{}'::text[] ELSE ARRAY(
            SELECT ARRAY[n.nspname::text, used.name::text] FROM pg_depend AS d CROSS JOIN LATERAL (
                SELECT pronamespace, proname FROM pg_proc
                    WHERE d.refclassid = 'pg_proc'::regclass AND oid = d.refobjid
                UNION ALL SELECT oprnamespace, oprname FROM pg_operator
                    WHERE d.refclassid = 'pg_operator'::regclass AND oid = d.refobjid
                UNION ALL SELECT e.typnamespace, e.typname FROM pg_type AS t
                    JOIN pg_type AS e ON e.oid = t.oid OR e.oid = t.typelem AND t.typlen = -1
                    WHERE d.refclassid = 'pg_type'::regclass AND t.oid = d.refobjid
            ) AS used (schema, name) JOIN pg_namespace AS n ON n.oid = used.schema
            WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'n'
            UNION ALL SELECT ARRAY['pg_catalog', c.proname::text]
            FROM regexp_matches(p.prosqlbody::text, ':(?:op)?funcid ([0-9]+)', 'g') AS m (found)
            JOIN pg_proc AS c ON c.oid = found[1]::oid WHERE c.pronamespace = 'pg_catalog'::regnamespace) END
    FROM functions AS f JOIN pg_proc AS p USING (oid) JOIN pg_language AS l ON l.oid = p.prolang
    WHERE p.pronamespace <> 'pg_catalog'::regnamespace
    UNION ALL
    SELECT w.place, 'domain ' || format_type(t.oid, NULL), md5(string_agg(d.text, ' ' ORDER BY d.text)),
        array_agg(concat_ws(' ', 'check', c.oid, c.xmin)), string_agg(d.text, ' '), '{}'::text[]
    FROM wanted AS w JOIN pg_type AS t ON t.typname = w.name AND t.typnamespace = w.schema
    JOIN pg_constraint AS c ON c.contypid = t.oid
    CROSS JOIN LATERAL (SELECT pg_get_constraintdef(c.oid) AS text) AS d
    GROUP BY w.place, t.oid
"""
