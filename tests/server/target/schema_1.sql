-- Two live indexes as the last version without a version of its schema made them (pg_dump --inserts of commit ba20e04, without
-- comments, settings and owners). SLOT stands for the slot.
CREATE SCHEMA cdcsync;
CREATE FUNCTION cdcsync.wait_for(index_name text, lsn pg_lsn, timeout interval DEFAULT '00:00:10'::interval) RETURNS boolean
    LANGUAGE plpgsql STRICT
    AS $$
    DECLARE
        deadline timestamptz := clock_timestamp() + timeout;
        pause float8 := 0.002;
        reached boolean;
    BEGIN
        IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
            RAISE EXCEPTION 'wait_for needs READ COMMITTED: in this transaction every query sees the same moment';
        END IF;
        LOOP
            SELECT p.checkpoint >= wait_for.lsn INTO reached
            FROM "cdcsync".indexes i JOIN "cdcsync".pipelines p USING (slot) WHERE i.name = wait_for.index_name;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'there is no index %', quote_literal(index_name) USING
                    HINT = 'See the table indexes in the schema ' || 'cdcsync' || '.';
            END IF;
            IF reached THEN
                RETURN true;
            END IF;
            IF clock_timestamp() >= deadline THEN
                RETURN false;
            END IF;
            PERFORM pg_sleep(pause);
            pause := least(pause * 1.5, 0.05);
        END LOOP;
    END
    $$;
COMMENT ON FUNCTION cdcsync.wait_for(index_name text, lsn pg_lsn, timeout interval) IS 'cdcsync: returns true once the index holds everything up to lsn, false when that took longer than timeout.';
CREATE TABLE cdcsync.articles_backlog (
    generation integer NOT NULL,
    chunk_id bigint NOT NULL,
    content_hash bytea NOT NULL,
    lane smallint NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    next_attempt_at timestamp with time zone DEFAULT now() NOT NULL,
    error text
);
COMMENT ON TABLE cdcsync.articles_backlog IS 'cdcsync index articles: chunks without a current vector; lane 0 live, 1 backfill';
CREATE TABLE cdcsync.articles_chunks (
    chunk_id bigint NOT NULL,
    id integer NOT NULL,
    tenant integer,
    chunk_no integer NOT NULL,
    chunk_total integer,
    content text NOT NULL,
    content_hash bytea NOT NULL,
    document_hash bytea NOT NULL,
    commit_lsn pg_lsn NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL,
    search tsvector GENERATED ALWAYS AS (to_tsvector('english'::regconfig, "left"(content, 100000))) STORED
)
WITH (fillfactor='85');
COMMENT ON TABLE cdcsync.articles_chunks IS 'cdcsync index articles: the chunks of public.articles, by key and number';
ALTER TABLE cdcsync.articles_chunks ALTER COLUMN chunk_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME cdcsync.articles_chunks_chunk_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE cdcsync.articles_vectors_1 (
    chunk_id bigint NOT NULL,
    content_hash bytea NOT NULL,
    embedding public.vector(8) NOT NULL
);
COMMENT ON TABLE cdcsync.articles_vectors_1 IS 'cdcsync index articles: vectors by hash:1:8; content_hash names the text each was made from';
CREATE TABLE cdcsync.backfill_keys (
    backfill_id bigint NOT NULL,
    place bigint NOT NULL,
    key text[] NOT NULL
);
COMMENT ON TABLE cdcsync.backfill_keys IS 'cdcsync: the keys that a request is about, where it is not about all; removed when the request has ended.';
CREATE TABLE cdcsync.backfills (
    id bigint NOT NULL,
    index_name text NOT NULL,
    kind text NOT NULL,
    rewrite boolean DEFAULT false NOT NULL,
    force_embed boolean DEFAULT false NOT NULL,
    filter text,
    keyed boolean DEFAULT false NOT NULL,
    max_rows_per_s integer,
    state text DEFAULT 'requested'::text NOT NULL,
    phase text DEFAULT 'rows'::text NOT NULL,
    cursor text[],
    rows_done bigint DEFAULT 0 NOT NULL,
    rows_total bigint,
    error text,
    requested_at timestamp with time zone DEFAULT now() NOT NULL,
    started_at timestamp with time zone,
    finished_at timestamp with time zone,
    CONSTRAINT backfills_kind_check CHECK ((kind = ANY (ARRAY['initial'::text, 'replay'::text, 'resync'::text, 'verify'::text]))),
    CONSTRAINT backfills_max_rows_per_s_check CHECK ((max_rows_per_s > 0)),
    CONSTRAINT backfills_phase_check CHECK ((phase = ANY (ARRAY['rows'::text, 'orphans'::text]))),
    CONSTRAINT backfills_state_check CHECK ((state = ANY (ARRAY['requested'::text, 'running'::text, 'paused'::text, 'done'::text, 'failed'::text, 'cancelled'::text])))
);
COMMENT ON TABLE cdcsync.backfills IS 'cdcsync: requests to read source tables, and how far each is.';
COMMENT ON COLUMN cdcsync.backfills.keyed IS 'Only the keys in backfill_keys are read; cursor is then the place of the last one that was.';
COMMENT ON COLUMN cdcsync.backfills.phase IS 'rows: reading the source; orphans: asking it which index keys it still has.';
COMMENT ON COLUMN cdcsync.backfills.cursor IS 'The key of the last row that was applied; commits together with the rows.';
ALTER TABLE cdcsync.backfills ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME cdcsync.backfills_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE cdcsync.differences (
    backfill_id bigint NOT NULL,
    key text[] NOT NULL,
    problem text NOT NULL,
    CONSTRAINT differences_problem_check CHECK ((problem = ANY (ARRAY['missing'::text, 'stale'::text, 'orphaned'::text, 'carried'::text, 'undecided'::text])))
);
COMMENT ON TABLE cdcsync.differences IS 'cdcsync: what a verification found to differ from the source.';
CREATE TABLE cdcsync.evaluations (
    index_name text NOT NULL,
    generation integer NOT NULL,
    k integer NOT NULL,
    ef_search integer NOT NULL,
    usual boolean NOT NULL,
    by_hnsw boolean NOT NULL,
    queries integer NOT NULL,
    recall double precision NOT NULL,
    mean_ms double precision NOT NULL,
    p95_ms double precision NOT NULL,
    exact_mean_ms double precision NOT NULL,
    exact_p95_ms double precision NOT NULL,
    evaluated_at timestamp with time zone NOT NULL
);
COMMENT ON TABLE cdcsync.evaluations IS 'cdcsync: the last measurement of how well searches by HNSW find what exact ones find.';
COMMENT ON COLUMN cdcsync.evaluations.usual IS 'Whether sessions had this ef_search without asking for another.';
COMMENT ON COLUMN cdcsync.evaluations.by_hnsw IS 'Whether the planner used HNSW; false where it read the whole table.';
COMMENT ON COLUMN cdcsync.evaluations.recall IS 'Mean share, 0 to 1, of the k nearest that a search with this ef_search found.';
CREATE TABLE cdcsync.failed_documents (
    index_name text NOT NULL,
    key text[] NOT NULL,
    error text NOT NULL,
    attempts integer DEFAULT 1 NOT NULL,
    commit_lsn pg_lsn NOT NULL,
    failed_at timestamp with time zone DEFAULT now() NOT NULL
);
COMMENT ON TABLE cdcsync.failed_documents IS 'cdcsync: rows that no document, or no chunks, could be made of; the index is without them until that succeeds. An empty key stands for rows that the list has no room for.';
COMMENT ON COLUMN cdcsync.failed_documents.error IS 'What failed and where; it holds no value of the row.';
COMMENT ON COLUMN cdcsync.failed_documents.attempts IS 'How many changes or readings of the row failed.';
COMMENT ON COLUMN cdcsync.failed_documents.commit_lsn IS 'Where in the stream it failed last.';
CREATE TABLE cdcsync.indexes (
    name text NOT NULL,
    slot text NOT NULL,
    source_table text NOT NULL,
    view_name text NOT NULL,
    key text[] NOT NULL,
    columns text[] NOT NULL,
    fingerprint text NOT NULL,
    generation integer NOT NULL,
    model text NOT NULL,
    dimensions integer NOT NULL,
    vector_type text NOT NULL,
    distance text NOT NULL,
    state text NOT NULL,
    reason text,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    live_at timestamp with time zone,
    table_oid bigint,
    sent text,
    membership bigint,
    partitions jsonb,
    CONSTRAINT indexes_state_check CHECK ((state = ANY (ARRAY['building'::text, 'live'::text, 'paused'::text])))
);
COMMENT ON TABLE cdcsync.indexes IS 'cdcsync: one row per index, with what its chunks and vectors were made by.';
COMMENT ON COLUMN cdcsync.indexes.generation IS 'The vectors table in use: NAME_vectors_GENERATION.';
COMMENT ON COLUMN cdcsync.indexes.table_oid IS 'The table''s OID on the source: another one under the same name is another table.';
COMMENT ON COLUMN cdcsync.indexes.sent IS 'How the source sends the table: types of the columns that are used, row filter, operations.';
COMMENT ON COLUMN cdcsync.indexes.membership IS 'OID of the table''s row in pg_publication_rel: a table that was taken out and put back has another one.';
COMMENT ON COLUMN cdcsync.indexes.partitions IS 'Of a partitioned table, the partitions by OID: which file holds each, and which transactions attached it.';
CREATE TABLE cdcsync.notes_backlog (
    generation integer NOT NULL,
    chunk_id bigint NOT NULL,
    content_hash bytea NOT NULL,
    lane smallint NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    next_attempt_at timestamp with time zone DEFAULT now() NOT NULL,
    error text
);
COMMENT ON TABLE cdcsync.notes_backlog IS 'cdcsync index notes: chunks without a current vector; lane 0 live, 1 backfill';
CREATE TABLE cdcsync.notes_chunks (
    chunk_id bigint NOT NULL,
    region text NOT NULL,
    id bigint NOT NULL,
    chunk_no integer NOT NULL,
    chunk_total integer,
    content text NOT NULL,
    content_hash bytea NOT NULL,
    document_hash bytea NOT NULL,
    commit_lsn pg_lsn NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL
)
WITH (fillfactor='85');
COMMENT ON TABLE cdcsync.notes_chunks IS 'cdcsync index notes: the chunks of public.notes, by key and number';
ALTER TABLE cdcsync.notes_chunks ALTER COLUMN chunk_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME cdcsync.notes_chunks_chunk_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
CREATE TABLE cdcsync.notes_vectors_1 (
    chunk_id bigint NOT NULL,
    content_hash bytea NOT NULL,
    embedding public.halfvec(8) NOT NULL
);
COMMENT ON TABLE cdcsync.notes_vectors_1 IS 'cdcsync index notes: vectors by hash:1:8; content_hash names the text each was made from';
CREATE TABLE cdcsync.pipelines (
    slot text NOT NULL,
    publication text NOT NULL,
    checkpoint pg_lsn,
    system_identifier text,
    timeline integer,
    fence bigint DEFAULT 0 NOT NULL,
    worker text,
    commit_time timestamp with time zone,
    caught_up_at timestamp with time zone,
    updated_at timestamp with time zone DEFAULT now() NOT NULL
);
COMMENT ON TABLE cdcsync.pipelines IS 'cdcsync: one row per replication slot. checkpoint commits together with the chunks.';
COMMENT ON COLUMN cdcsync.pipelines.checkpoint IS 'The index holds every source transaction that ends at or before this LSN.';
COMMENT ON COLUMN cdcsync.pipelines.fence IS 'Raised by each worker that takes over; writes under an older value are refused.';
COMMENT ON COLUMN cdcsync.pipelines.commit_time IS 'When the source committed the last transaction that was applied.';
COMMENT ON COLUMN cdcsync.pipelines.caught_up_at IS 'When the worker last had nothing left to apply.';
CREATE TABLE public.articles (
    id integer NOT NULL,
    tenant integer,
    title text
);
CREATE VIEW public.articles_index AS
 SELECT c.id,
    c.tenant,
    c.chunk_no,
    c.content,
    c.search,
    v.embedding,
    (v.content_hash <> c.content_hash) AS stale
   FROM (cdcsync.articles_chunks c
     JOIN cdcsync.articles_vectors_1 v USING (chunk_id));
COMMENT ON VIEW public.articles_index IS 'cdcsync index articles: public.articles with its vectors; stale says that the vector is of an older text';
CREATE TABLE public.notes (
    region text NOT NULL,
    id bigint NOT NULL,
    title text
);
CREATE VIEW public.notes_index AS
 SELECT c.region,
    c.id,
    c.chunk_no,
    c.content,
    v.embedding,
    (v.content_hash <> c.content_hash) AS stale
   FROM (cdcsync.notes_chunks c
     JOIN cdcsync.notes_vectors_1 v USING (chunk_id));
COMMENT ON VIEW public.notes_index IS 'cdcsync index notes: public.notes with its vectors; stale says that the vector is of an older text';
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (1, 1, 1, 0, 1, 'title 1', '\xda0c5763ba3de2aa6d7e1403cf1376ec', '\xda0c5763ba3de2aa6d7e1403cf1376ec', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (3, 3, 0, 0, 1, 'title 3', '\x379d712f18a020eccf1666e7ced912e7', '\x379d712f18a020eccf1666e7ced912e7', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (4, 4, 1, 0, 1, 'title 4', '\xb8205aee0f708c3892475f6af0f16967', '\xb8205aee0f708c3892475f6af0f16967', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (5, 5, 2, 0, 1, 'title 5', '\xf10c9e85552828e2a41d4542d8d1b85c', '\xf10c9e85552828e2a41d4542d8d1b85c', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (6, 6, 0, 0, 1, 'title 6', '\x9771ade4e51b6566f5cbcedc2a19d874', '\x9771ade4e51b6566f5cbcedc2a19d874', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (7, 7, 1, 0, 1, 'title 7', '\xfda3632597ea61e181a9f6072fc24007', '\xfda3632597ea61e181a9f6072fc24007', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (8, 8, 2, 0, 1, 'title 8', '\xdf3e3288d2d997d17bf6f03d910bfe71', '\xdf3e3288d2d997d17bf6f03d910bfe71', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (9, 9, 0, 0, 1, 'title 9', '\xa9b517f3cf4c25ba9f7ccbdb21e41bad', '\xa9b517f3cf4c25ba9f7ccbdb21e41bad', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (10, 10, 1, 0, 1, 'title 10', '\xf35cc2291744af4f4d3621750378bab8', '\xf35cc2291744af4f4d3621750378bab8', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (11, 11, 2, 0, 1, 'title 11', '\x52bb4776f97490d5e2e6e1447d6a67bc', '\x52bb4776f97490d5e2e6e1447d6a67bc', '0/1C197E0', '2026-11-26 06:31:23.451395+00', DEFAULT);
INSERT INTO cdcsync.articles_chunks OVERRIDING SYSTEM VALUE VALUES (2, 2, 2, 0, 1, 'title 2 again', '\xfccecaa00d93576f54f220354a10f33c', '\xfccecaa00d93576f54f220354a10f33c', '0/1C2E358', '2026-11-26 06:31:24.171302+00', DEFAULT);
INSERT INTO cdcsync.articles_vectors_1 VALUES (1, '\xda0c5763ba3de2aa6d7e1403cf1376ec', '[0,0,0.36380345,-0.60633904,0,-0.36380345,0,0.60633904]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (3, '\x379d712f18a020eccf1666e7ced912e7', '[0.21428572,0,0,-0.9285714,0,-0.21428572,0,-0.21428572]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (4, '\xb8205aee0f708c3892475f6af0f16967', '[0.80812204,0,0,-0.5050763,0,-0.30304575,0,0]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (5, '\xf10c9e85552828e2a41d4542d8d1b85c', '[0,0,0,-0.3904344,0,-0.23426065,0.8589557,-0.23426065]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (6, '\x9771ade4e51b6566f5cbcedc2a19d874', '[0,0,0,-0.5050763,-0.80812204,0,0,-0.30304575]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (7, '\xfda3632597ea61e181a9f6072fc24007', '[0,0,-0.74278134,-0.46423835,0.278543,-0.278543,0,-0.278543]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (8, '\xdf3e3288d2d997d17bf6f03d910bfe71', '[0,0,0,0,0,-0.70710677,0,-0.70710677]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (9, '\xa9b517f3cf4c25ba9f7ccbdb21e41bad', '[0,0,-0.36380345,-0.60633904,0,0.60633904,0,-0.36380345]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (10, '\xf35cc2291744af4f4d3621750378bab8', '[0,0.7733892,0,-0.48336825,0,-0.29002094,0.29002094,0]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (11, '\x52bb4776f97490d5e2e6e1447d6a67bc', '[0,0.29002094,0,-0.48336825,0,-0.29002094,0,0.7733892]');
INSERT INTO cdcsync.articles_vectors_1 VALUES (2, '\xfccecaa00d93576f54f220354a10f33c', '[0,0.15617377,-0.15617377,-0.2602896,0.57263714,-0.7288109,0,-0.15617377]');
INSERT INTO cdcsync.backfills OVERRIDING SYSTEM VALUE VALUES (1, 'articles', 'initial', false, false, NULL, false, NULL, 'done', 'rows', '{12}', 12, 12, NULL, '2026-11-26 06:31:23.209561+00', '2026-11-26 06:31:23.420027+00', '2026-11-26 06:31:23.469821+00');
INSERT INTO cdcsync.backfills OVERRIDING SYSTEM VALUE VALUES (2, 'notes', 'initial', false, false, NULL, false, NULL, 'done', 'rows', '{eu,5}', 5, 5, NULL, '2026-11-26 06:31:23.259985+00', '2026-11-26 06:31:23.488599+00', '2026-11-26 06:31:23.516073+00');
INSERT INTO cdcsync.indexes VALUES ('articles', 'SLOT', 'public.articles', 'public.articles_index', '{id}', '{tenant}', '1720d3c9d320b690be39667a32f07ba1', 1, 'hash:1:8', 8, 'vector', 'cosine', 'live', NULL, '2026-11-26 06:31:23.209561+00', '2026-11-26 06:31:23.944171+00', 16713, '{"types": {"id": "integer", "tenant": "integer", "title": "text"}, "row_filter": null}', 16998, NULL);
INSERT INTO cdcsync.indexes VALUES ('notes', 'SLOT', 'public.notes', 'public.notes_index', '{region,id}', '{}', '1720d3c9d320b690be39667a32f07ba1', 1, 'hash:1:8', 8, 'halfvec', 'cosine', 'live', NULL, '2026-11-26 06:31:23.259985+00', '2026-11-26 06:31:23.955332+00', 16721, '{"types": {"region": "text", "id": "bigint", "title": "text"}, "row_filter": null}', 16999, NULL);
INSERT INTO cdcsync.notes_chunks OVERRIDING SYSTEM VALUE VALUES (1, 'eu', 1, 0, 1, 'note 1', '\x282832bf5600024e20cb23703e88cb9c', '\x282832bf5600024e20cb23703e88cb9c', '0/1C22C08', '2026-11-26 06:31:23.512828+00');
INSERT INTO cdcsync.notes_chunks OVERRIDING SYSTEM VALUE VALUES (2, 'eu', 2, 0, 1, 'note 2', '\x3d46d5759c4b3d13868f984299fbd342', '\x3d46d5759c4b3d13868f984299fbd342', '0/1C22C08', '2026-11-26 06:31:23.512828+00');
INSERT INTO cdcsync.notes_chunks OVERRIDING SYSTEM VALUE VALUES (3, 'eu', 3, 0, 1, 'note 3', '\x517bd266044a0564123633b400872754', '\x517bd266044a0564123633b400872754', '0/1C22C08', '2026-11-26 06:31:23.512828+00');
INSERT INTO cdcsync.notes_chunks OVERRIDING SYSTEM VALUE VALUES (4, 'eu', 4, 0, 1, 'note 4', '\x58e7056eab9f54d585da44577fcb3d9a', '\x58e7056eab9f54d585da44577fcb3d9a', '0/1C22C08', '2026-11-26 06:31:23.512828+00');
INSERT INTO cdcsync.notes_chunks OVERRIDING SYSTEM VALUE VALUES (5, 'eu', 5, 0, 1, 'note 5', '\x6d705859c34dd4f3f597d058224b3a47', '\x6d705859c34dd4f3f597d058224b3a47', '0/1C22C08', '2026-11-26 06:31:23.512828+00');
INSERT INTO cdcsync.notes_vectors_1 VALUES (1, '\x282832bf5600024e20cb23703e88cb9c', '[0,-0.2409668,0.2409668,-0.2409668,0.6425781,0,0,0.6425781]');
INSERT INTO cdcsync.notes_vectors_1 VALUES (2, '\x3d46d5759c4b3d13868f984299fbd342', '[0,0,0,-0.25634766,0.68359375,-0.68359375,0,0]');
INSERT INTO cdcsync.notes_vectors_1 VALUES (3, '\x517bd266044a0564123633b400872754', '[0.21057129,-0.21057129,0,-0.77197266,0.56152344,0,0,0]');
INSERT INTO cdcsync.notes_vectors_1 VALUES (4, '\x58e7056eab9f54d585da44577fcb3d9a', '[0.6425781,-0.2409668,0,-0.2409668,0.6425781,0,0,0.2409668]');
INSERT INTO cdcsync.notes_vectors_1 VALUES (5, '\x6d705859c34dd4f3f597d058224b3a47', '[0,-0.21057129,0,-0.21057129,0.56152344,0,0.77197266,0]');
INSERT INTO cdcsync.pipelines VALUES ('SLOT', 'cdcsync', '0/1C2EF48', '7712364023729191733', 1, 1, 'host:1', '2026-11-26 06:31:24.156924+00', '2026-11-26 06:31:26.016557+00', '2026-11-26 06:31:26.016558+00');
INSERT INTO public.articles VALUES (1, 1, 'title 1');
INSERT INTO public.articles VALUES (3, 0, 'title 3');
INSERT INTO public.articles VALUES (4, 1, 'title 4');
INSERT INTO public.articles VALUES (5, 2, 'title 5');
INSERT INTO public.articles VALUES (6, 0, 'title 6');
INSERT INTO public.articles VALUES (7, 1, 'title 7');
INSERT INTO public.articles VALUES (8, 2, 'title 8');
INSERT INTO public.articles VALUES (9, 0, 'title 9');
INSERT INTO public.articles VALUES (10, 1, 'title 10');
INSERT INTO public.articles VALUES (11, 2, 'title 11');
INSERT INTO public.articles VALUES (2, 2, 'title 2 again');
INSERT INTO public.notes VALUES ('eu', 1, 'note 1');
INSERT INTO public.notes VALUES ('eu', 2, 'note 2');
INSERT INTO public.notes VALUES ('eu', 3, 'note 3');
INSERT INTO public.notes VALUES ('eu', 4, 'note 4');
INSERT INTO public.notes VALUES ('eu', 5, 'note 5');
SELECT pg_catalog.setval('cdcsync.articles_chunks_chunk_id_seq', 13, true);
SELECT pg_catalog.setval('cdcsync.backfills_id_seq', 2, true);
SELECT pg_catalog.setval('cdcsync.notes_chunks_chunk_id_seq', 5, true);
ALTER TABLE ONLY cdcsync.articles_backlog
    ADD CONSTRAINT articles_backlog_pkey PRIMARY KEY (chunk_id, generation);
ALTER TABLE ONLY cdcsync.articles_chunks
    ADD CONSTRAINT articles_chunks_id_chunk_no_key UNIQUE (id, chunk_no);
ALTER TABLE ONLY cdcsync.articles_chunks
    ADD CONSTRAINT articles_chunks_pkey PRIMARY KEY (chunk_id);
ALTER TABLE ONLY cdcsync.articles_vectors_1
    ADD CONSTRAINT articles_vectors_1_pkey PRIMARY KEY (chunk_id);
ALTER TABLE ONLY cdcsync.backfill_keys
    ADD CONSTRAINT backfill_keys_pkey PRIMARY KEY (backfill_id, place);
ALTER TABLE ONLY cdcsync.backfills
    ADD CONSTRAINT backfills_pkey PRIMARY KEY (id);
ALTER TABLE ONLY cdcsync.differences
    ADD CONSTRAINT differences_pkey PRIMARY KEY (backfill_id, key);
ALTER TABLE ONLY cdcsync.evaluations
    ADD CONSTRAINT evaluations_pkey PRIMARY KEY (index_name, generation, k, ef_search);
ALTER TABLE ONLY cdcsync.failed_documents
    ADD CONSTRAINT failed_documents_pkey PRIMARY KEY (index_name, key);
ALTER TABLE ONLY cdcsync.indexes
    ADD CONSTRAINT indexes_pkey PRIMARY KEY (name);
ALTER TABLE ONLY cdcsync.notes_backlog
    ADD CONSTRAINT notes_backlog_pkey PRIMARY KEY (chunk_id, generation);
ALTER TABLE ONLY cdcsync.notes_chunks
    ADD CONSTRAINT notes_chunks_pkey PRIMARY KEY (chunk_id);
ALTER TABLE ONLY cdcsync.notes_chunks
    ADD CONSTRAINT notes_chunks_region_id_chunk_no_key UNIQUE (region, id, chunk_no);
ALTER TABLE ONLY cdcsync.notes_vectors_1
    ADD CONSTRAINT notes_vectors_1_pkey PRIMARY KEY (chunk_id);
ALTER TABLE ONLY cdcsync.pipelines
    ADD CONSTRAINT pipelines_pkey PRIMARY KEY (slot);
ALTER TABLE ONLY public.articles
    ADD CONSTRAINT articles_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.notes
    ADD CONSTRAINT notes_pkey PRIMARY KEY (region, id);
CREATE INDEX articles_backlog_failed ON cdcsync.articles_backlog USING btree (generation) WHERE (attempts >= 8);
CREATE INDEX articles_backlog_hash ON cdcsync.articles_backlog USING btree (generation, content_hash);
CREATE INDEX articles_backlog_lane ON cdcsync.articles_backlog USING btree (generation, lane, chunk_id);
CREATE INDEX articles_chunks_search ON cdcsync.articles_chunks USING gin (search);
CREATE INDEX articles_vectors_1_hash ON cdcsync.articles_vectors_1 USING btree (content_hash);
CREATE INDEX articles_vectors_1_hnsw ON cdcsync.articles_vectors_1 USING hnsw (embedding public.vector_cosine_ops) WITH (m='16', ef_construction='64');
CREATE INDEX backfills_open ON cdcsync.backfills USING btree (index_name, id) WHERE (state = ANY (ARRAY['requested'::text, 'running'::text, 'paused'::text]));
CREATE INDEX notes_backlog_failed ON cdcsync.notes_backlog USING btree (generation) WHERE (attempts >= 8);
CREATE INDEX notes_backlog_hash ON cdcsync.notes_backlog USING btree (generation, content_hash);
CREATE INDEX notes_backlog_lane ON cdcsync.notes_backlog USING btree (generation, lane, chunk_id);
CREATE INDEX notes_vectors_1_hash ON cdcsync.notes_vectors_1 USING btree (content_hash);
CREATE INDEX notes_vectors_1_hnsw ON cdcsync.notes_vectors_1 USING hnsw (embedding public.halfvec_cosine_ops) WITH (m='16', ef_construction='64');
ALTER TABLE ONLY cdcsync.backfill_keys
    ADD CONSTRAINT backfill_keys_backfill_id_fkey FOREIGN KEY (backfill_id) REFERENCES cdcsync.backfills(id) ON DELETE CASCADE;
ALTER TABLE ONLY cdcsync.backfills
    ADD CONSTRAINT backfills_index_name_fkey FOREIGN KEY (index_name) REFERENCES cdcsync.indexes(name) ON DELETE CASCADE;
ALTER TABLE ONLY cdcsync.differences
    ADD CONSTRAINT differences_backfill_id_fkey FOREIGN KEY (backfill_id) REFERENCES cdcsync.backfills(id) ON DELETE CASCADE;
ALTER TABLE ONLY cdcsync.evaluations
    ADD CONSTRAINT evaluations_index_name_fkey FOREIGN KEY (index_name) REFERENCES cdcsync.indexes(name) ON DELETE CASCADE;
ALTER TABLE ONLY cdcsync.failed_documents
    ADD CONSTRAINT failed_documents_index_name_fkey FOREIGN KEY (index_name) REFERENCES cdcsync.indexes(name) ON DELETE CASCADE;
ALTER TABLE ONLY cdcsync.indexes
    ADD CONSTRAINT indexes_slot_fkey FOREIGN KEY (slot) REFERENCES cdcsync.pipelines(slot);
