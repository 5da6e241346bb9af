-- The roles that cdcsync needs, with the least that it needs. For psql, as an administrator of the database concerned.
--
-- The source, whose tables are indexed:
--
--   psql -d shop -v source_role=cdcsync_source -v tables='public.articles, public.notes' -f config/roles.sql
--
-- The target, which holds the index (the source's own database, or another one):
--
--   psql -d search -v target_role=cdcsync_target -f config/roles.sql
--
-- Both at once, for one database: give all three variables. The two roles may be one. The role of `cdcsync serve`, in a
-- target that has its schema:
--
--   psql -d search -v serve_role=cdcsync_serve -f config/roles.sql
--
-- If a variable lacks the role that it is about, or no role is given, the script ends with an error and grants nothing.
-- Running it again is harmless: it adds what is missing, and takes nothing away but what reader_role and serve_role do not
-- need on cdcsync's tables, which earlier versions of it granted. If one of these roles was given that WITH GRANT OPTION and
-- passed it on, those to whom it did lose it, too. It sets no passwords:
-- \password cdcsync_source, in psql, does that without one ever being in a file or a log.
--
-- Variables, with their defaults:
--
--   source_role     the role of source.dsn
--   tables          the indexed tables, separated by commas and written as in SQL: with their schemas, and in quotation
--                   marks where SQL needs them ('shop.articles, shop."a, b"')
--   publication     cdcsync: source.publication of the configuration
--   target_role     the role of target.dsn
--   former_role     none: another role, with which a worker has run before: all that cdcsync has in the target and that
--                   is this role's is handed over to target_role, but for the schema, which it may use
--   schema          cdcsync: target.schema of the configuration
--   view_schema     public: where the views are that your users search, as in `view` of each index
--   reader_role     none: a role of applications that search by SQL, and ask cdcsync.wait_for; it must exist, and
--                   target_role be given, because it may read the views that role creates later. Run the script again
--                   once a worker has created an index: its search function reads tables that are not there before
--   serve_role      none: the role of `cdcsync serve`, as in serve.role; it must exist. It may be the reader_role too
--                   if its callers may see every row

\set ON_ERROR_STOP on
\if :{?publication}
\else
    \set publication cdcsync
\endif
\if :{?schema}
\else
    \set schema cdcsync
\endif
\if :{?view_schema}
\else
    \set view_schema public
\endif

BEGIN;
-- An administrator runs this: no operator or function that someone left in the schema public is to run with it.
SET LOCAL search_path = '';

-- Variables that come without the role that they are about stop the script before it has changed anything.
SELECT set_config('cdcsync.lacking', coalesce(string_agg(lacking, '; '), ''), true) AS lacking
FROM (VALUES
    (:{?tables} AND NOT :{?source_role}, 'tables needs source_role'),
    (:{?former_role} AND NOT :{?target_role}, 'former_role needs target_role'),
    (:{?reader_role} AND NOT :{?target_role}, 'reader_role needs target_role, whose future views it is to read'),
    (:{?serve_role} AND NOT :{?target_role} AND to_regnamespace(quote_ident(:'schema')) IS NULL,
        format('serve_role needs target_role, because the schema %s is not there yet', quote_ident(:'schema'))),
    (NOT (:{?source_role} OR :{?tables} OR :{?target_role} OR :{?former_role} OR :{?reader_role} OR :{?serve_role}),
        'no role is given')
) AS one (so, lacking) WHERE so
\gset
DO $$
BEGIN
    IF current_setting('cdcsync.lacking') <> '' THEN
        RAISE EXCEPTION USING MESSAGE = current_setting('cdcsync.lacking'),
            HINT = 'Give each variable as psql -v NAME=VALUE; the head of the script describes them.';
    END IF;
END
$$;

\if :{?source_role}
\if :{?tables}
\else
    \set tables ''
\endif
\echo 'source: the role' :source_role

SELECT NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'source_role') AS missing,
       EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication') AS managed,
       EXISTS (SELECT FROM pg_publication WHERE pubname = :'publication') AS published,
       current_setting('server_version_num')::int >= 180000 AS generated,
       trim(:'tables') <> '' AS listed,
       -- A comma between quotation marks separates nothing.
       (SELECT coalesce(array_agg(btrim(m[1], E' \t\r\n')), '{}')
        FROM regexp_matches(:'tables', '((?:"(?:[^"]|"")*"|[^",])+)', 'g') AS m) AS all_tables
\gset
\if :missing
    CREATE ROLE :"source_role" LOGIN;
\endif

-- REPLICATION is what a slot needs: creating, reading and dropping it. It reaches further than the database: a role that
-- has it may read every change on the server. Two lines in pg_hba.conf take that back, because a logical connection
-- is let in by the line of its database, and only a physical one by a line for the word `replication`:
--
--   hostssl  shop         cdcsync_source  10.0.0.0/8  scram-sha-256
--   hostssl  replication  cdcsync_source  all         reject
\if :managed
    GRANT rds_replication TO :"source_role";
\else
    ALTER ROLE :"source_role" REPLICATION;
\endif

SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'source_role') \gexec

-- The initial load, replays and re-reads of large values are plain SELECTs. To hide columns, grant SELECT (id, title, …)
-- by hand instead, and give the publication the same column list: key, template and carried columns must be in both, and
-- the columns of a row filter in the grant.
-- A table with row-level security also needs ALTER ROLE … BYPASSRLS: replication sends all of its rows anyway, and
-- `cdcsync check` says so.
SELECT DISTINCT format('GRANT USAGE ON SCHEMA %I TO %I', n.nspname, :'source_role')
FROM unnest(:'all_tables'::text[]) AS one
JOIN pg_class AS c ON c.oid = one::regclass
JOIN pg_namespace AS n ON n.oid = c.relnamespace \gexec
SELECT format('GRANT SELECT ON TABLE %s TO %I', one::regclass, :'source_role')
FROM unnest(:'all_tables'::text[]) AS one \gexec

-- The publication is made here, and stays its maker's. The other way is to let the worker make it: it then has to own the
-- tables (GRANT their_owner TO cdcsync_source) and to have CREATE on the database, and could alter or drop the tables.
-- The price of this way: a new index on another table wants this script once more, before the worker starts with it.
\if :published
    SELECT format('ALTER PUBLICATION %I ADD TABLE %s', p.pubname, one::regclass)
    FROM pg_publication AS p, unnest(:'all_tables'::text[]) AS one
    WHERE p.pubname = :'publication' AND NOT p.puballtables
        AND NOT EXISTS (SELECT FROM pg_publication_rel AS r WHERE r.prpubid = p.oid AND r.prrelid = one::regclass) \gexec
\elif :listed
    -- Partitioned tables send their changes under their own name; stored generated columns are sent where they can be.
    \if :generated
        CREATE PUBLICATION :"publication" FOR TABLE :tables
            WITH (publish_via_partition_root = true, publish_generated_columns = stored);
    \else
        CREATE PUBLICATION :"publication" FOR TABLE :tables WITH (publish_via_partition_root = true);
    \endif
\endif

-- Nothing else: no write access, no ownership, no superuser. The marks that a load leaves in the WAL
-- (pg_logical_emit_message) are open to everyone. One privilege is useful and not needed: with pg_read_all_stats the
-- worker can name the session whose open transaction the creation of the slot waits for, and not just its pid.
\endif

\if :{?target_role}
\echo 'target: the role' :target_role

SELECT NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'target_role') AS missing,
       NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS ordinary
\gset
\if :missing
    CREATE ROLE :"target_role" LOGIN;
\endif
\if :ordinary
    -- An administrator who is no superuser may give a schema only to a role that they could be themselves.
    GRANT :"target_role" TO CURRENT_USER;
\endif

-- Batches are applied through temporary tables.
SELECT format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO %I', current_database(), :'target_role') \gexec

-- The extension is made here because it then is the administrator's, who updates it. Where it lies must be usable.
SELECT NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') AS missing
\gset
\if :missing
    CREATE EXTENSION vector SCHEMA public;
\endif
SELECT format('GRANT USAGE ON SCHEMA %I TO %I', n.nspname, :'target_role')
FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace WHERE e.extname = 'vector' \gexec

-- cdcsync's own tables are in a schema that is the role's, so that it needs no CREATE on the database. The other way is
-- GRANT CREATE ON DATABASE, and the worker makes the schema itself; it could then make others too. A schema that exists
-- stays its owner's, who may have more in it: whom a schema belongs to may drop all that is in it.
CREATE SCHEMA IF NOT EXISTS :"schema" AUTHORIZATION :"target_role";
GRANT USAGE, CREATE ON SCHEMA :"schema" TO :"target_role";

-- The views. CREATE on the schema public lets the role make other things there as well: with
-- -v view_schema=search, and view = "search.articles" in the configuration, it can make them only in a schema for that.
CREATE SCHEMA IF NOT EXISTS :"view_schema";
GRANT USAGE, CREATE ON SCHEMA :"view_schema" TO :"target_role";

\if :{?former_role}
    -- The worker replaces and drops what is its own, which only the owner may. A comment tells which relations and functions
    -- are; indexes, sequences and triggers go with their tables. Views may be in any schema.
    SELECT format('ALTER %s %s OWNER TO %I', own.kind, own.name, :'target_role')
    FROM (
        SELECT CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'c' THEN 'TYPE' ELSE 'TABLE' END, c.oid::regclass::text, c.relowner
        FROM pg_class AS c, pg_namespace AS n
        WHERE n.nspname = :'schema' AND c.relkind IN ('r', 'p', 'v', 'c')
            AND starts_with(coalesce(obj_description(c.oid, 'pg_class'), obj_description(c.reltype, 'pg_type')), 'cdcsync')
            AND (c.relnamespace = n.oid OR EXISTS (
                SELECT FROM pg_rewrite AS r
                JOIN pg_depend AS d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                JOIN pg_class AS t ON d.refclassid = 'pg_class'::regclass AND d.refobjid = t.oid
                WHERE r.ev_class = c.oid AND t.relnamespace = n.oid))
        UNION ALL
        SELECT 'FUNCTION', p.oid::regprocedure::text, p.proowner
        FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE n.nspname = :'schema' AND starts_with(obj_description(p.oid, 'pg_proc'), 'cdcsync')
    ) AS own (kind, name, owner)
    WHERE pg_get_userbyid(own.owner) = :'former_role' \gexec
\endif
\endif

-- Searches name pgvector's types and operators, and a filter the type of its column, with their schemas and with the
-- caller's privileges. What types the columns have is known once the worker has created the index.
SELECT coalesce(array_agg(DISTINCT n.nspname), '{}') AS named
FROM pg_namespace AS n
WHERE n.oid IN (SELECT e.extnamespace FROM pg_extension AS e WHERE e.extname = 'vector')
    OR n.oid IN (SELECT t.typnamespace
                 FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid JOIN pg_type AS d ON d.oid = a.atttypid
                 JOIN pg_type AS t ON t.oid IN (d.oid, d.typbasetype)
                 WHERE c.relnamespace = to_regnamespace(quote_ident(:'schema')) AND c.relname ~ '_chunks$'
                     AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped)
\gset

-- What searches read of cdcsync's tables: chunks, words and vectors of each index, and the three that describe all indexes
-- to `cdcsync search`, the Python API and `cdcsync serve`. In the others are calls of everyone, with their questions, keys
-- of rows, and questions by which search is judged.
\set searched '^(indexes|pipelines|generations|.+_(chunks|words|vectors_[0-9]+(_fresh|_settled)?))$'

-- Earlier versions of this script granted both roles more, also on what was to come. An owner keeps all of it.
\set reader ''
\set server ''
\if :{?reader_role}
    \set reader :reader_role
\endif
\if :{?serve_role}
    \set server :serve_role
\endif
SELECT DISTINCT format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I REVOKE %s FROM %I', o.rolname, :'schema',
                       CASE d.defaclobjtype WHEN 'r' THEN 'SELECT ON TABLES' ELSE 'EXECUTE ON FUNCTIONS' END, r.rolname)
FROM pg_default_acl AS d CROSS JOIN aclexplode(d.defaclacl) AS a JOIN pg_roles AS o ON o.oid = d.defaclrole
JOIN pg_roles AS r ON r.oid = a.grantee AND r.oid <> o.oid
WHERE d.defaclnamespace = to_regnamespace(quote_ident(:'schema'))
    AND (d.defaclobjtype = 'r' AND r.rolname IN (:'reader', :'server') OR d.defaclobjtype = 'f' AND r.rolname = :'server')
\gexec
-- SELECT on what searches read is theirs, and stays as it is, with an option to grant it. What is taken back is taken from
-- those, too, to whom they passed it on (CASCADE): without that, PostgreSQL refuses to revoke it.
SELECT format('REVOKE %s ON %I.%I FROM %I CASCADE',
              CASE WHEN c.relname ~ :'searched' THEN 'INSERT, DELETE' ELSE 'SELECT, INSERT, DELETE' END,
              n.nspname, c.relname, r.rolname)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN pg_roles AS r ON r.rolname IN (:'reader', :'server') AND r.oid <> c.relowner
WHERE n.nspname = :'schema' AND c.relkind IN ('r', 'p') AND starts_with(obj_description(c.oid, 'pg_class'), 'cdcsync') \gexec

\if :{?reader_role}
    -- A view reads with its owner's privileges, so readers of the view need nothing below it; but the search functions
    -- read with the caller's. The functions and the views that the worker will create are the reader's at once; tables
    -- are not, because no default privilege tells those that searches read from the others. A table that succeeds
    -- another, as in a migration, has the grants of that.
    GRANT USAGE ON SCHEMA :"schema", :"view_schema" TO :"reader_role";
    SELECT format('GRANT USAGE ON SCHEMA %I TO %I', one, :'reader_role')
    FROM unnest(:'named'::name[]) AS one WHERE NOT has_schema_privilege(:'reader_role', one, 'USAGE') \gexec
    SELECT format('GRANT SELECT ON %I.%I TO %I', n.nspname, c.relname, :'reader_role')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :'schema' AND c.relkind IN ('r', 'p') AND c.relname ~ :'searched' \gexec
    GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA :"schema" TO :"reader_role";
    ALTER DEFAULT PRIVILEGES FOR ROLE :"target_role" IN SCHEMA :"schema" GRANT EXECUTE ON FUNCTIONS TO :"reader_role";
    -- In the schema of the tables it would be all of these: for a new view there, run the script again.
    SELECT format('ALTER DEFAULT PRIVILEGES FOR ROLE %I IN SCHEMA %I GRANT SELECT ON TABLES TO %I', :'target_role',
                  :'view_schema', :'reader_role')
    WHERE :'view_schema' <> :'schema' \gexec
    SELECT format('GRANT SELECT ON %I.%I TO %I', n.nspname, c.relname, :'reader_role')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :'view_schema' AND c.relkind = 'v' AND pg_get_userbyid(c.relowner) = :'target_role' \gexec
\endif

\if :{?serve_role}
    -- The tool server calls the search functions, which read chunks, vectors and words with its privileges, under the policy
    -- that holds its callers to their tenants. It gets no view: a view reads with its owner's privileges, past the policy.
    -- It writes the record of calls, and deletes what is old by its time.
    --
    -- A worker whose configuration has the role as serve.role grants the same on the tables of each index that it creates,
    -- and a table that succeeds another has the grants of that. Otherwise run this script again once a worker has created
    -- an index.
    GRANT USAGE ON SCHEMA :"schema" TO :"serve_role";
    SELECT format('GRANT USAGE ON SCHEMA %I TO %I', one, :'serve_role')
    FROM unnest(:'named'::name[]) AS one WHERE NOT has_schema_privilege(:'serve_role', one, 'USAGE') \gexec
    SELECT format('GRANT SELECT ON %I.%I TO %I', :'schema', c.relname, :'serve_role')
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = :'schema' AND c.relkind IN ('r', 'p') AND c.relname ~ :'searched' \gexec
    SELECT format('GRANT INSERT, DELETE, SELECT (at) ON %I.calls TO %I', :'schema', :'serve_role')
    WHERE to_regclass(format('%I.calls', :'schema')) IS NOT NULL \gexec
    SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I', p.oid::regprocedure, :'serve_role')
    FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
    WHERE n.nspname = :'schema' AND p.proname ~ '^(wait_for|standing|.+_search)$' \gexec
\endif

COMMIT;
