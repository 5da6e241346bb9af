"""The tables in the target that all pipelines and indexes share, and the function that waits for a position.

Everything is created idempotently and describes itself with COMMENT ON. A column that a later version adds has a
statement of its own after its table's, so that an older table gets it too. The tables of `registry` and `requests` are
defined there, beside the statements that use them.

Source: PostgreSQL, "Data Definition", "PL/pgSQL".
"""

from __future__ import annotations

import re
from typing import LiteralString

from psycopg import sql

from cdcsync.config.names import BESIDE
from cdcsync.logs import get_logger
from cdcsync.postgres.sessions import Connection
from cdcsync.target import approvals, audits, calls, entries, generations, version
from cdcsync.target.ddl.names import MAX_ATTEMPTS, PATH
from cdcsync.target.pipelines import waiters_lock
from cdcsync.target.requests import tables as requests

log = get_logger()


async def create_shared(connection: Connection, schema: str) -> None:
    """Create the schema and the tables that all pipelines and indexes share, or bring older ones to our version.

    The caller's transaction commits.

    :raises SetupError: the tables are of a version that this cdcsync does not know.
    """
    names: dict[str, sql.Composable] = {
        "schema": sql.Identifier(schema),
        "literal": sql.Literal(schema),
        "path": sql.SQL(PATH),
    }
    wait_for = sql.SQL(WAIT_FOR).format(
        **names,
        indexes=sql.Literal(sql.Identifier(schema, entries.TABLE).as_string(connection)),
        attempts=sql.SQL(str(MAX_ATTEMPTS)),
        waiters=sql.Literal(waiters_lock(schema)),
    )
    names["beside"] = sql.Literal(BESIDE)
    names["registry"] = sql.Literal(sql.Identifier(schema, entries.TABLE).as_string(connection))
    names["definition"] = sql.Literal(wait_for.as_string(connection))
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('cdcsync schema ' || %s, 0))", [schema])
    before = await version.read_version(connection, schema)
    if (error := version.refusal(schema, before)) is not None:
        raise error
    cursor = await connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [schema])
    if await cursor.fetchone() is None:
        await connection.execute(sql.SQL("CREATE SCHEMA {schema}").format(**names))
    present, comments = await _present(connection, schema), await _comments(connection, schema)
    for statement in _SHARED:
        if not _done(statement, present, comments):
            await connection.execute(sql.SQL(statement).format(**names))
    await version.write_version(connection, schema)
    if before is not None and before.version < version.VERSION:
        log.info("schema_upgraded", schema=schema, before=before.version, now=version.VERSION)


_ADDS = re.compile(
    r"ALTER TABLE \{schema\}\.(?P<table>\w+) ADD COLUMN IF NOT EXISTS (?P<name>\w+)"
    r"|CREATE INDEX IF NOT EXISTS (?P<index>\w+) ON \{schema\}\.(?P<of>\w+)"
)
_DROPS = re.compile(r"ALTER TABLE \{schema\}\.(?P<table>\w+) DROP CONSTRAINT IF EXISTS (?P<name>\w+)")
"""Statements that a later version added after those of their tables."""

_DESCRIBES = re.compile(
    r"COMMENT ON (?:TABLE|COLUMN) \{schema\}\.(?P<table>\w+)(?:\.(?P<column>\w+))? IS '(?P<comment>.*)'", re.DOTALL
)


def _done(statement: str, present: set[tuple[str, str]], comments: set[tuple[str, str, str]]) -> bool:
    """Say whether there is nothing left to do for a statement that locks its table even then.

    An application that waits in `wait_for` reads some of these tables for as long as that takes: a start that waited
    for it would be what it waits for. And a reader of two of them and a start that alters both would wait for each
    other. COMMENT waits only for VACUUM, ANALYZE and the like, but these may take hours.

    :param present: by table, its columns, indexes and constraints.
    :param comments: by table and column, "" for the table itself.
    """
    if describes := _DESCRIBES.fullmatch(statement):
        comment = describes["comment"].replace("''", "'")
        return (describes["table"], describes["column"] or "", comment) in comments
    if adds := _ADDS.match(statement):
        return (adds["table"] or adds["of"], adds["name"] or adds["index"]) in present
    drops = _DROPS.match(statement)
    return drops is not None and (drops["table"], drops["name"]) not in present


async def _present(connection: Connection, schema: str) -> set[tuple[str, str]]:
    """Return the columns, indexes and constraints of each table of a schema, with the table's name."""
    cursor = await connection.execute(
        "SELECT c.relname, of.name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace, LATERAL"
        " (SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND NOT a.attisdropped"
        " UNION ALL SELECT i.relname::text FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid"
        " WHERE x.indrelid = c.oid"
        " UNION ALL SELECT k.conname::text FROM pg_constraint AS k WHERE k.conrelid = c.oid) AS of (name)"
        " WHERE n.nspname = %s AND c.relkind = 'r'",
        [schema],
    )
    return set(await cursor.fetchall())


async def _comments(connection: Connection, schema: str) -> set[tuple[str, str, str]]:
    """Return the comments of the tables of a schema and of their columns: table, column or "", comment."""
    cursor = await connection.execute(
        "SELECT c.relname, coalesce(a.attname, ''), d.description FROM pg_class AS c"
        " JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " JOIN pg_description AS d ON d.objoid = c.oid AND d.classoid = 'pg_class'::regclass"
        " LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = d.objsubid AND d.objsubid > 0"
        " WHERE n.nspname = %s AND c.relkind = 'r'",
        [schema],
    )
    return set(await cursor.fetchall())


WAIT_FOR: LiteralString = """
    CREATE OR REPLACE FUNCTION {schema}.wait_for(
        index_name text, lsn pg_lsn, timeout interval DEFAULT '10 s', vectors boolean DEFAULT false)
    RETURNS boolean LANGUAGE plpgsql VOLATILE STRICT SECURITY DEFINER
    SET search_path = {path} SET row_security = off AS $body$
    DECLARE
        deadline timestamptz := clock_timestamp() + timeout;
        began timestamptz;
        pause float8 := 0.002;
        entry {schema}.indexes;
        reached boolean;
        waits boolean := false;
    BEGIN
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            RAISE EXCEPTION 'wait_for needs READ COMMITTED: in this transaction every query sees the same moment';
        END IF;
        IF mod(lsn - '0/0'::pg_lsn, 8192) = 24 OR mod(lsn - '0/0'::pg_lsn, 1048576) = 40 THEN
            -- The place after a page's header, which is longer on the first page of a segment, is where the next record
            -- begins, and nobody has written that page yet. A record that ends there begins on the page before.
            lsn := lsn - mod(lsn - '0/0'::pg_lsn, 8192);
        END IF;
        LOOP
            began := clock_timestamp();
            SELECT i.* INTO entry FROM {schema}.indexes i WHERE i.name = wait_for.index_name;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'there is no index %', quote_literal(index_name) USING
                    HINT = 'See the table indexes in the schema ' || {literal} || '.';
            END IF;
            IF entry.unfollowed_at IS NOT NULL THEN
                RAISE EXCEPTION 'the index % is no longer followed', quote_literal(index_name) USING
                    DETAIL = 'It left the configuration at ' || entry.unfollowed_at || ', and is as it was then.',
                    HINT = 'Put it back into the configuration, or remove it with cdcsync drop.';
            END IF;
            IF entry.state = 'paused' THEN
                -- The reason may name a row, so it is for those who may read it in the table.
                RAISE EXCEPTION 'the index % is paused', quote_literal(index_name) USING
                    DETAIL = CASE WHEN has_table_privilege(session_user, {indexes}, 'SELECT')
                        THEN coalesce(entry.reason, '') ELSE '' END,
                    HINT = 'cdcsync status says why, and what to do.';
            END IF;
            SELECT p.checkpoint >= wait_for.lsn AND NOT EXISTS (
                SELECT FROM {schema}.backfills b WHERE b.index_name = entry.name
                    AND (b.kind IN ('initial', 'resync') AND b.filter IS NULL OR b.kind = 'related'
                        OR b.owed AND NOT b.rewrite)
                    AND b.state IN ('requested', 'running', 'paused'))
            INTO reached FROM {schema}.pipelines p WHERE p.slot = entry.slot;
            IF reached AND vectors THEN
                EXECUTE format(
                    'SELECT NOT EXISTS (SELECT FROM %1$I.%2$I b JOIN %1$I.%3$I c USING (chunk_id)'
                    ' WHERE b.generation = $1 AND b.attempts < {attempts} AND c.commit_lsn < $2)',
                    {literal}, coalesce(entry.stem, entry.name) || '_backlog',
                    coalesce(entry.stem, entry.name) || '_chunks')
                INTO reached USING entry.generation, wait_for.lsn;
            END IF;
            IF reached THEN
                RETURN true;
            END IF;
            IF clock_timestamp() >= deadline THEN
                RETURN false;
            END IF;
            IF NOT waits THEN
                -- The worker sees this lock, and writes where it is as soon as nothing is left to apply.
                -- It is only tried: any role could hold it exclusively, and the timeout has to be kept.
                waits := pg_try_advisory_xact_lock_shared(hashtextextended({waiters} || entry.slot, 0));
            END IF;
            -- To look at a long backlog may take a second. The first look takes longer than others: it is planned.
            PERFORM pg_sleep(least(1.0, extract(epoch FROM deadline - clock_timestamp()), greatest(
                pause, CASE WHEN pause > 0.002 THEN 4 * extract(epoch FROM clock_timestamp() - began) END)));
            pause := least(pause * 1.5, 0.05);
        END LOOP;
    END
    $body$
"""
"""Waits for a position. It runs as its owner, the worker's role, so that it tells every role the truth: neither missing
privileges on our tables nor row-level security on them make it say that there is no index. A paused index, and one that
is no longer followed, are errors, because waiting does not help; one that is loading, rebuilds documents whose related
rows changed, or is owed rows, as of a partition that was attached, or a column, is not there yet. One that rewrites
documents because its template changed is: it holds what was committed, as it was cut before.

Whether a text that waits for its vector was committed before the position is said by its chunk, whose `commit_lsn` no
other change of the document moves, rather than by its place in the backlog: however a text gets there, as by a
generation that is filled or a vector that is to be made again, it has waited since its commit."""


_WAIT_FOR: tuple[LiteralString, ...] = (
    # An older version had no parameter `vectors`. Whoever was allowed to call that one may call its successor.
    """
    DO $outer$
    DECLARE
        older regprocedure := to_regprocedure(format('%I.wait_for(text, pg_lsn, interval)', {literal}));
        allowed text[];
        public_too boolean;
    BEGIN
        IF older IS NOT NULL THEN
            SELECT array_agg(DISTINCT a.grantee::regrole::text) FILTER (WHERE a.grantee <> 0),
                   bool_or(a.grantee = 0)
            INTO allowed, public_too
            FROM pg_proc AS p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
            WHERE p.oid = older AND a.privilege_type = 'EXECUTE';
            EXECUTE format('DROP FUNCTION %s', older);
        END IF;
        EXECUTE {definition};
        IF older IS NOT NULL AND NOT public_too THEN
            EXECUTE format(
                'REVOKE ALL ON FUNCTION %I.wait_for(text, pg_lsn, interval, boolean) FROM PUBLIC', {literal});
            IF allowed IS NOT NULL THEN
                EXECUTE format('GRANT EXECUTE ON FUNCTION %I.wait_for(text, pg_lsn, interval, boolean) TO %s',
                    {literal}, array_to_string(allowed, ', '));
            END IF;
        END IF;
    END
    $outer$
    """,
    "COMMENT ON FUNCTION {schema}.wait_for(text, pg_lsn, interval, boolean) IS 'cdcsync: returns true once the index"
    " holds everything up to lsn (and, with vectors, its vectors), false when that took longer than timeout.'",
)


_STANDING: tuple[LiteralString, ...] = (
    # An earlier version's was not asked for a generation.
    "DROP FUNCTION IF EXISTS {schema}.standing(text)",
    """
    CREATE OR REPLACE FUNCTION {schema}.standing(index_name text, generation int)
    RETURNS text LANGUAGE sql STABLE STRICT SECURITY DEFINER
    SET search_path = {path} SET row_security = off AS $body$
        SELECT CASE
            WHEN i.unfollowed_at IS NOT NULL
                THEN o.whole || ' is no longer followed since ' || i.unfollowed_at::text || ', and is as it was then'
            WHEN i.state = 'paused'
                THEN o.whole || ' is paused' || coalesce(' since ' || i.paused_at::text, '')
                    || ', and is as it was then'
            ELSE CASE WHEN strpos(i.name, {beside}) > 0 OR i.generation <> standing.generation
                THEN 'generation ' || standing.generation || ' of ' ELSE '' END
                || o.whole || ' is being built: a search may not find all of it' END
        FROM {schema}.indexes AS i LEFT JOIN {schema}.generations AS g
            ON g.index_name = i.name AND g.generation = standing.generation,
            LATERAL (SELECT 'the index ' || quote_literal(replace(i.name, {beside}, '')) AS whole) AS o
        WHERE i.name = standing.index_name
            AND (i.unfollowed_at IS NOT NULL OR i.state <> 'live'
                 OR g.state = 'filling' AND i.generation <> standing.generation)
    $body$
    """,
    "COMMENT ON FUNCTION {schema}.standing(text, int) IS"
    " 'cdcsync: says that an index is paused or no longer followed, and since when, or that it, or this generation of"
    " its vectors, is being built; NULL if it is kept in step.'",
)
"""Runs as the worker's role, as `wait_for` does: every search asks it, and a reader need not see the tables."""


NUMBERED = ("backfills", "judged_runs")
"""The shared tables whose rows are numbered, in a column `id`."""

_SHARED: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.pipelines (
        slot text PRIMARY KEY,
        publication text NOT NULL,
        checkpoint pg_lsn,
        system_identifier text,
        timeline int,
        fence bigint NOT NULL DEFAULT 0,
        worker text,
        commit_time timestamptz,
        caught_up_at timestamptz,
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "ALTER TABLE {schema}.pipelines ADD COLUMN IF NOT EXISTS ahead pg_lsn",
    "ALTER TABLE {schema}.pipelines ADD COLUMN IF NOT EXISTS commits bigint NOT NULL DEFAULT 0",
    "ALTER TABLE {schema}.pipelines ADD COLUMN IF NOT EXISTS waiting jsonb",
    "ALTER TABLE {schema}.pipelines ADD COLUMN IF NOT EXISTS source_started timestamptz",
    "COMMENT ON COLUMN {schema}.pipelines.source_started IS"
    " 'When the source that the index follows was started, by its own clock.'",
    "ALTER TABLE {schema}.pipelines ADD COLUMN IF NOT EXISTS commit_lsn pg_lsn",
    "COMMENT ON COLUMN {schema}.pipelines.commit_lsn IS"
    " 'Where the last transaction that was applied ended; NULL if that is not known.'",
    "ALTER TABLE {schema}.pipelines ADD COLUMN IF NOT EXISTS approved_source text",
    "COMMENT ON COLUMN {schema}.pipelines.approved_source IS"
    " 'The server, by system identifier and timeline, that somebody approved in place of the one followed so far.'",
    "COMMENT ON COLUMN {schema}.pipelines.waiting IS"
    " 'Why indexes that have no row yet, because they could not be set up, are paused.'",
    "COMMENT ON COLUMN {schema}.pipelines.ahead IS"
    " 'How far beyond the checkpoint the index may hold parts of what the source committed.'",
    "COMMENT ON COLUMN {schema}.pipelines.commits IS"
    " 'Counts the commits of workers; one that finds another number than its own last one writes nothing.'",
    "COMMENT ON TABLE {schema}.pipelines IS"
    " 'cdcsync: one row per replication slot. checkpoint commits together with the chunks.'",
    "COMMENT ON COLUMN {schema}.pipelines.checkpoint IS"
    " 'The index holds every source transaction that ends at or before this LSN.'",
    "COMMENT ON COLUMN {schema}.pipelines.fence IS"
    " 'Raised by each worker that takes over; writes under an older value are refused.'",
    "COMMENT ON COLUMN {schema}.pipelines.commit_time IS"
    " 'When the source committed the last transaction that was applied.'",
    "COMMENT ON COLUMN {schema}.pipelines.caught_up_at IS 'When the worker last had nothing left to apply.'",
    *version.DDL,
    *entries.DDL,
    *generations.DDL,
    *requests.DDL,
    *audits.DDL,
    *calls.DDL,
    *approvals.DDL,
    """
    CREATE TABLE IF NOT EXISTS {schema}.evaluations (
        index_name text NOT NULL REFERENCES {schema}.indexes ON DELETE CASCADE ON UPDATE CASCADE,
        generation int NOT NULL,
        k int NOT NULL,
        ef_search int NOT NULL,
        usual boolean NOT NULL,
        by_hnsw boolean NOT NULL,
        queries int NOT NULL,
        recall float8 NOT NULL,
        mean_ms float8 NOT NULL,
        p95_ms float8 NOT NULL,
        exact_mean_ms float8 NOT NULL,
        exact_p95_ms float8 NOT NULL,
        evaluated_at timestamptz NOT NULL,
        PRIMARY KEY (index_name, generation, k, ef_search)
    )
    """,
    "COMMENT ON TABLE {schema}.evaluations IS"
    " 'cdcsync: the last measurement of how well searches by HNSW find what exact ones find.'",
    "COMMENT ON COLUMN {schema}.evaluations.recall IS"
    " 'Mean share, 0 to 1, of the k nearest that a search with this ef_search found.'",
    "COMMENT ON COLUMN {schema}.evaluations.usual IS 'Whether searches look so far without being told.'",
    "COMMENT ON COLUMN {schema}.evaluations.by_hnsw IS"
    " 'Whether the planner used HNSW; false where it read the whole table.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.judged_runs (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        index_name text NOT NULL REFERENCES {schema}.indexes ON DELETE CASCADE ON UPDATE CASCADE,
        generation int NOT NULL,
        collection text NOT NULL,
        evaluated_at timestamptz NOT NULL,
        run jsonb NOT NULL
    )
    """,
    "COMMENT ON TABLE {schema}.judged_runs IS"
    " 'cdcsync: how well searches answered the questions of judged collections, run after run.'",
    "COMMENT ON COLUMN {schema}.judged_runs.run IS"
    " 'Figures of each mode of search with their intervals, and the scores of each question.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.failed_documents (
        index_name text NOT NULL REFERENCES {schema}.indexes ON DELETE CASCADE ON UPDATE CASCADE,
        key text[] NOT NULL,
        error text NOT NULL,
        attempts int NOT NULL DEFAULT 1,
        commit_lsn pg_lsn NOT NULL,
        failed_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (index_name, key)
    )
    """,
    "COMMENT ON TABLE {schema}.failed_documents IS"
    " 'cdcsync: rows that no document, or no chunks, could be made of; the index is without them until that succeeds."
    " An empty key stands for rows that the list has no room for.'",
    "COMMENT ON COLUMN {schema}.failed_documents.error IS 'What failed and where; it holds no value of the row.'",
    "COMMENT ON COLUMN {schema}.failed_documents.attempts IS 'How many changes or readings of the row failed.'",
    "COMMENT ON COLUMN {schema}.failed_documents.commit_lsn IS 'Where in the stream it failed last.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.embedders (
        slot text NOT NULL,
        name text NOT NULL,
        call_texts float8,
        call_bytes float8,
        calls float8,
        day date,
        tokens bigint NOT NULL DEFAULT 0,
        problem text,
        hint text,
        since timestamptz,
        tried_again_at timestamptz,
        loads_wait_until timestamptz,
        updated_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (slot, name)
    )
    """,
    "ALTER TABLE {schema}.embedders ADD COLUMN IF NOT EXISTS texts_per_s float8",
    "COMMENT ON COLUMN {schema}.embedders.texts_per_s IS 'How many texts a second it made vectors of, lately.'",
    "ALTER TABLE {schema}.embedders ADD COLUMN IF NOT EXISTS probe jsonb",
    "COMMENT ON COLUMN {schema}.embedders.probe IS"
    " 'The vector that it made of a fixed text, and how far the last one is from that. NULL has it made anew.'",
    "COMMENT ON TABLE {schema}.embedders IS"
    " 'cdcsync: what a worker knows of each embedder: sizes of calls that work, tokens of the day, and its trouble.'",
    "COMMENT ON COLUMN {schema}.embedders.call_texts IS"
    " 'The most texts of a call, learnt from calls that failed; NULL where nothing is in the way.'",
    "COMMENT ON COLUMN {schema}.embedders.problem IS 'Why it makes no vectors now; NULL while it does.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.tiers (
        index_name text PRIMARY KEY REFERENCES {schema}.indexes ON DELETE CASCADE ON UPDATE CASCADE,
        generation int NOT NULL,
        scan_ms float8 NOT NULL,
        settled_per_s float8 NOT NULL,
        measured_at timestamptz NOT NULL
    )
    """,
    "COMMENT ON TABLE {schema}.tiers IS 'cdcsync: what the fresh vectors of each index cost a search, as last seen.'",
    "COMMENT ON COLUMN {schema}.tiers.scan_ms IS 'Milliseconds of the server that comparing them takes.'",
    "COMMENT ON COLUMN {schema}.tiers.settled_per_s IS 'Vectors that moved into the HNSW index in a second.'",
    # Tables of earlier versions: what refers to an index follows when its name is exchanged (`Registry.exchange`).
    """
    DO $outer$
    DECLARE
        one record;
    BEGIN
        FOR one IN SELECT k.conrelid::regclass AS referring, k.confrelid::regclass AS referred, k.conname
            FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid
            JOIN pg_namespace AS n ON n.oid = c.relnamespace
            WHERE k.contype = 'f' AND k.confupdtype <> 'c' AND k.confrelid = to_regclass({registry})
                AND n.nspname = {literal}
        LOOP
            EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I, ADD CONSTRAINT %I FOREIGN KEY (index_name)'
                ' REFERENCES %s ON DELETE CASCADE ON UPDATE CASCADE',
                one.referring, one.conname, one.conname, one.referred);
        END LOOP;
    END
    $outer$
    """,
    *_WAIT_FOR,
    *_STANDING,
)
