{create} FUNCTION {function}(
    query text,
    embedding {extension}.vector DEFAULT NULL,
    k int DEFAULT 10,
    filter jsonb DEFAULT '{{}}',
    mode text DEFAULT 'hybrid',
    per_document boolean DEFAULT true,
    skip int DEFAULT 0,
    vector_weight float8 DEFAULT 1,
    text_weight float8 DEFAULT 1,
    headline text DEFAULT {headline_options},
    generation int DEFAULT NULL
) RETURNS SETOF {hit} LANGUAGE plpgsql {volatility} SECURITY INVOKER {settings} AS {tag}
-- Searches the index {index_comment}. One snapshot, and read only: every statement in here sees the caller's.
--
-- That one is older than the locks of the tables. A search that had to wait for an exchange of the settled tier still
-- sees what the exchange deleted from fresh, beside the copies in settled. Fusion makes one place of both, and the
-- result takes the vector of the chunk's text.
--
--     vector leg   the nearest vectors, by HNSW; exactly where that finds too few          ids, distances
--     keyword leg  chunks with the rarest words of the query, within a budget of rows,
--                  ordered by idf * ts_rank, and the best of them by BM25; or the best by
--                  the BM25 index of pg_textsearch                                          ids, scores
--     fusion       the sum of weight / ({fusion} + place) over both legs
--
-- Vectors are those of the generation that the embedding was made for: one model's are never compared with another's.
--
-- Operators in statements that hold a condition are qualified: a condition may need the caller's search_path.
#variable_conflict use_variable
-- the block
DECLARE
    wanted CONSTANT int := least(greatest(skip::bigint + k, 0), {max_hits} + 1);
    facts CONSTANT jsonb := {columns};
    asked CONSTANT text := CASE WHEN length(query) <= {unbroken} THEN query ELSE (
        SELECT string_agg(CASE WHEN length(run) > {unbroken} OR length(run) > {looked_through} AND run ~ '[_~@]'
                               THEN regexp_replace(run, '.{{{looked_through}}}', '\& ', 'g') ELSE run END, ' ' ORDER BY place)
        FROM regexp_split_to_table(left(query, {query_characters}), '\s') WITH ORDINALITY AS runs (run, place)) END;
    by_vector boolean := embedding IS NOT NULL AND mode <> 'text';
    by_words boolean := {searchable} AND query IS NOT NULL AND mode <> 'vector';
    ranker text;
    conditions text := {condition};
    filtered boolean := {filtered};
    configurations regconfig[] := {configurations};
    column_name text;
    of_type text;
    of_array boolean;
    of_json boolean;
    of_elements boolean;
    as_json boolean;
    wish jsonb;
    operator_name text;
    value jsonb;
    parts jsonb;
    literal text;
    literals text[];
    required tsquery;
    excluded tsquery;
    bare text;
    total float8;
    mean_length float8;
    never_counted boolean;
    late boolean[];
    words text[];
    seen float8[];
    weights float8[];
    word_queries tsquery[];
    any_word tsquery;
    ranking text;
    depth int;
    looked int := 3;
    least_effort int := 1;
    statement text;
    near_ids bigint[];
    word_ids bigint[];
    word_scores float8[];
    vector_ids bigint[];
    budget int;
    most int;
    room int;
    visited float8;
    remaining boolean;
    at int;
    batch tsquery;
    tried tsquery;
    others tsquery;
    one tsquery;
    attempts tsquery[];
    more_ids bigint[];
    more_ranks float8[];
    candidates bigint[];
    candidate_ranks float8[];
    text_ids bigint[];
    text_scores float8[];
    hit_ids bigint[];
    hit_scores float8[];
    hit_vector_ranks bigint[];
    hit_text_ranks bigint[];
    hit_text_scores float8[];
    kept_vector_ids bigint[] := '{{}}';
    kept_text_ids bigint[] := '{{}}';
    kept_text_scores float8[] := '{{}}';
    kept_ids bigint[] := '{{}}';
    kept_scores float8[] := '{{}}';
    kept_vector_ranks bigint[] := '{{}}';
    kept_text_ranks bigint[] := '{{}}';
    kept_hit_text_scores float8[] := '{{}}';
    line text;
    made_by int := coalesce(CASE WHEN embedding IS NOT NULL THEN generation END, {live_generation});
    dimensions int;
    directed boolean;
    model text;
    nearest_leg text;
    exact_leg text;
    rescored int;
    result text;
BEGIN
    -- The generation. Without one, the query is taken to be embedded for the live one.
    CASE made_by
    {generations}
    ELSE
        RAISE EXCEPTION USING ERRCODE = '{no_generation}',
            MESSAGE = format('the index has no generation %s of vectors', made_by), HINT = {embed_hint};
    END CASE;

    -- The arguments.
    IF mode IS NULL OR mode NOT IN ('hybrid', 'vector', 'text') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format('there is no mode %L', mode),
            HINT = 'The modes are hybrid, vector and text.';
    END IF;
    IF k IS NULL OR skip IS NULL OR k < 1 OR skip < 0 OR wanted > {max_hits} THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('cannot return %s hits after skipping %s', k, skip),
            HINT = 'k is at least 1, and skip + k at most {max_hits}.';
    END IF;
    IF vector_weight IS NULL OR text_weight IS NULL OR NOT vector_weight BETWEEN 0 AND 1e6
            OR NOT text_weight BETWEEN 0 AND 1e6 OR vector_weight + text_weight = 0 THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a weight cannot be used',
            HINT = 'Weights are 0 or more, and one of them is more.';
    END IF;
    IF mode = 'text' AND NOT {searchable} THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'this index has no keyword search',
            HINT = 'Search by vector, or give the index a search = "english" in the configuration.';
    END IF;
    IF mode = 'vector' AND embedding IS NULL AND (query IS NULL OR query ~ '\S') THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a search by vector needs an embedding',
            HINT = 'Embed the query with the model of the index first.';
    END IF;
    IF embedding IS NOT NULL AND {extension}.vector_dims(embedding) <> dimensions THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format(
                'the embedding has %s dimensions, the index has %s', {extension}.vector_dims(embedding), dimensions),
            HINT = format('Embed the query with the model of the index, %s.', model);
    END IF;
    IF by_vector AND NOT directed THEN
        IF mode = 'vector' OR NOT by_words THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = {undirected},
                HINT = format('Embed the query with the model of the index, %s.', model);
        END IF;
        by_vector := false;
        RAISE INFO USING ERRCODE = '{by_words_alone}', MESSAGE = {undirected}, HINT = 'It was searched by words alone.';
    END IF;
    IF query !~ '\S' AND (mode <> 'vector' OR embedding IS NULL) THEN
        RETURN; -- blank: somebody has typed nothing yet
    END IF;

    -- An index that nothing keeps in step, or that is being built, says so. INFO reaches every client, and no log.
    IF has_function_privilege(to_regprocedure({standing_signature}), 'EXECUTE') THEN
        line := {standing}({index_name}, made_by);
        IF line IS NOT NULL THEN
            RAISE INFO USING ERRCODE = '{not_whole}', MESSAGE = line, HINT = 'cdcsync status says more.';
        END IF;
    END IF;

    -- The filter: values become literals of the columns' types, so that the planner can estimate them.
    IF jsonb_typeof(filter) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = format('the filter is %s', filter),
            HINT = 'Give an object that names columns, such as {{"id": 1}}; {{}} or NULL filters nothing.';
    END IF;
    FOR column_name, wish IN SELECT * FROM jsonb_each(coalesce(filter, '{{}}')) LOOP
        IF NOT facts ? column_name THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('the filter names a column that the index does not have: %I', column_name),
                HINT = 'The columns are ' || (SELECT string_agg(f, ', ' ORDER BY f)
                                              FROM jsonb_object_keys(facts) AS f) || '.';
        END IF;
        of_array := (facts -> column_name -> 'array')::boolean;
        of_json := (facts -> column_name -> 'json')::boolean;
        of_type := format('The column is of the type %s%s.', facts -> column_name ->> 'shown', CASE
            WHEN of_array AND facts -> column_name ->> 'element' IS NOT NULL
            THEN ': contains and overlaps take a list of elements, other operators an array as text, such as "{{1,2}}"'
            WHEN of_array THEN ': write an array as text, such as "{{1,2}}"'
            WHEN of_json THEN ': contains takes JSON, other operators JSON as text, such as "{{\"a\": 1}}"'
            ELSE '' END);
        wish := CASE jsonb_typeof(wish) WHEN 'object' THEN wish
                    WHEN 'array' THEN jsonb_build_object('in', wish)
                    WHEN 'null' THEN '{{"null": true}}' ELSE jsonb_build_object('eq', wish) END;
        FOR operator_name, value IN SELECT * FROM jsonb_each(wish) LOOP
            filtered := true;
            IF NOT facts -> column_name -> 'operators' ? operator_name THEN
                RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                    MESSAGE = format('the filter on %I has no operator %L', column_name, operator_name),
                    HINT = 'The operators are ' || (
                        SELECT string_agg(o, ', ' ORDER BY array_position('{operators}', o))
                        FROM jsonb_object_keys(facts -> column_name -> 'operators') AS o) || '. ' || of_type;
            END IF;
            of_elements := of_array AND operator_name IN ('contains', 'overlaps');
            as_json := of_json AND operator_name IN ('contains', 'overlaps');
            -- A list is of several values, unless it is JSON itself.
            parts := CASE WHEN jsonb_typeof(value) = 'array' AND (of_elements OR NOT as_json) THEN value
                          ELSE jsonb_build_array(value) END;
            IF jsonb_typeof(value) <> (CASE operator_name WHEN 'null' THEN 'boolean' WHEN 'in' THEN 'array'
                                       WHEN 'like' THEN 'string' ELSE jsonb_typeof(value) END)
                OR jsonb_typeof(value) = 'array' AND operator_name NOT IN ('in', 'contains', 'overlaps')
                OR of_elements AND jsonb_path_exists(parts, 'strict $[*] ? (@.type() == "null")', '{{}}', true)
                OR NOT as_json AND jsonb_path_exists(
                    parts, 'strict $[*] ? (@.type() == "null" || @.type() == "object" || @.type() == "array")', '{{}}', true)
            THEN
                RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                    MESSAGE = format('the filter on %I: %s cannot take %s', column_name, operator_name, value),
                    HINT = 'null takes true or false, in takes a list of values, like takes a string,'
                           ' contains and overlaps take one element or a list of them, and the others take one value. '
                           || of_type;
            END IF;
            literals := '{{}}';
            FOR literal IN SELECT CASE WHEN as_json THEN v::text ELSE v #>> '{{}}' END
                           FROM jsonb_array_elements(parts) AS v
            LOOP
                IF operator_name NOT IN ('null', 'like') THEN
                    BEGIN
                        literal := format('%L::%s', literal, facts -> column_name ->> (
                            CASE WHEN of_elements THEN 'element' ELSE 'type' END));
                        EXECUTE 'SELECT ' || literal;
                    EXCEPTION WHEN OTHERS THEN
                        -- Types refuse a value in any class: ltree as a mistake of syntax, regclass as a missing table.
                        IF SQLSTATE = ANY ('{of_the_server}') OR left(SQLSTATE, 2) = ANY ('{of_the_server}') THEN
                            RAISE;
                        END IF;
                        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                            MESSAGE = format('the filter on %I: %s', column_name, SQLERRM),
                            HINT = of_type;
                    END;
                END IF;
                IF operator_name = 'like' AND mod(length(substring(literal FROM '\\*$')), 2) = 1 THEN
                    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                        MESSAGE = format('the filter on %I: the pattern of like ends in a backslash', column_name),
                        HINT = 'A backslash takes the character behind it as it is; write two for a backslash itself.';
                END IF;
                literals := array_append(literals, literal);
            END LOOP;
            conditions := conditions || CASE operator_name
                WHEN 'null' THEN format(' AND c.%I IS %sNULL', column_name, CASE value WHEN 'true' THEN '' ELSE 'NOT ' END)
                WHEN 'like' THEN format(' AND c.%I::pg_catalog.text OPERATOR(pg_catalog.~~) %L', column_name, literals[1])
                WHEN 'in' THEN CASE
                    WHEN literals = '{{}}' THEN ' AND false'
                    WHEN (facts -> column_name -> 'array')::boolean THEN ( -- an array of arrays would be another thing
                        SELECT format(' AND (%s)', string_agg(format('c.%I %s %s', column_name,
                                      facts -> column_name -> 'operators' ->> 'in', l), ' OR ')) FROM unnest(literals) AS l)
                    ELSE format(' AND c.%I %s ANY (ARRAY[%s])', column_name,
                                facts -> column_name -> 'operators' ->> 'in', array_to_string(literals, ', ')) END
                ELSE format(' AND c.%I %s %s', column_name, facts -> column_name -> 'operators' ->> operator_name,
                    CASE WHEN of_elements
                         THEN format('ARRAY[%s]::%s', array_to_string(literals, ', '), facts -> column_name ->> 'type')
                         ELSE literals[1] END)
            END;
        END LOOP;
    END LOOP;

    -- The words: quoted phrases and -words are conditions, the other words are alternatives.
    IF {searchable} AND query IS NOT NULL AND (by_words OR asked ~ '(^|\s)-') THEN
        {choose_configurations}
        bare := asked;
        -- Words are counted as the index finds them: neither minified JSON nor a page of Chinese has blanks.
        IF (SELECT coalesce(max(p), 0) FROM {lexemes} AS u CROSS JOIN unnest(u.positions) AS p) <= {syntax_words} THEN
            SELECT (string_agg(c.clause, ' & ') FILTER (WHERE m[1] IS NULL AND m[3] IS NULL))::tsquery,
                   (string_agg(c.clause, ' | ') FILTER (WHERE m[1] IS NOT NULL OR m[3] IS NOT NULL))::tsquery
            INTO required, excluded
            FROM regexp_matches(asked, '((?:^|\s)-)?"([^"]*)"|(?:^|\s)-(?=[[:alnum:]])([^\s"]+)', 'g') AS m
            CROSS JOIN LATERAL (SELECT '(' || string_agg('(' || q::text || ')', ' | ') || ')' AS clause -- NULL: stop words
                                FROM {phrases} AS q WHERE numnode(q) > 0) AS c;
            bare := regexp_replace(bare, '(?<=\S)\s+OR(?=\s+\S)', ' ', 'g');
            bare := regexp_replace(bare, '(?:^|\s)-"[^"]*"', ' ', 'g');
            bare := regexp_replace(bare, '(?:^|\s)-(?=[[:alnum:]])[^\s"]+', ' ', 'g');
        END IF;
        SELECT s.chunks, s.occurrences / greatest(s.chunks, 1)::float8 INTO total, mean_length
        FROM {words} AS s WHERE s.lexeme = '';
        never_counted := total IS NULL;
        total := coalesce(total, {assumed_chunks});
        mean_length := coalesce(nullif(mean_length, 0), {assumed_length});
        -- A word that the query repeats weighs more, up to {k3} + 1 times as much. A word that is not among the counts is
        -- the rarest, but most of those in a long query are in no chunk at all: only some of them go before other words.
        SELECT array_agg(w.lexeme ORDER BY w.seen, w.lexeme), array_agg(w.seen ORDER BY w.seen, w.lexeme),
               array_agg(w.weight ORDER BY w.seen, w.lexeme),
               array_agg(('''' || replace(replace(w.lexeme, '\', '\\'), '''', '''''') || '''')::tsquery
                         ORDER BY w.seen, w.lexeme),
               array_agg(w.late ORDER BY w.seen, w.lexeme)
        INTO words, seen, weights, word_queries, late
        FROM (
            SELECT p.*, NOT (p.counted OR p.place <= {uncounted_words} OR never_counted) AS late FROM (
                SELECT e.*, row_number() OVER (PARTITION BY e.counted ORDER BY e.weight DESC, e.lexeme) AS place
                FROM (
                    SELECT l.*, ln(1 + (greatest(total, l.seen) - l.seen + 0.5) / (l.seen + 0.5))
                                * l.times * ({k3} + 1) / (l.times + {k3}) AS weight
                    FROM (SELECT u.lexeme, max(coalesce(cardinality(u.positions), 1))::float8 AS times,
                                 coalesce(min(s.chunks), 1)::float8 AS seen, min(s.chunks) IS NOT NULL AS counted
                          FROM {lexemes} AS u LEFT JOIN {words} AS s USING (lexeme) GROUP BY u.lexeme) AS l
                ) AS e
            ) AS p
            ORDER BY late, p.weight DESC, p.lexeme LIMIT {max_words}
        ) AS w;
    END IF;
    by_words := by_words AND words IS NOT NULL;
    -- BM25 of pg_textsearch, where its index is there; not of text that somebody pasted.
    ranker := CASE WHEN by_words AND cardinality(words) < {max_words} THEN ({bm25_usable}) END;
    IF excluded IS NOT NULL THEN
        conditions := conditions || format(' AND NOT c.search OPERATOR(pg_catalog.@@) %L::pg_catalog.tsquery', excluded);
        filtered := true;
    END IF;
    IF NOT by_words AND NOT by_vector THEN
        RETURN; -- stop words or exclusions alone
    END IF;
    IF by_words THEN
        SELECT string_agg(q::text, ' | ')::tsquery INTO any_word FROM unnest(word_queries) AS q;
        ranking := (
            SELECT string_agg(format('(%s::pg_catalog.float8 OPERATOR(pg_catalog.*)'
                ' pg_catalog.ts_rank(c.search, %L::pg_catalog.tsquery, 1))', weights[n], word_queries[n]),
                ' OPERATOR(pg_catalog.+) ')
            FROM (SELECT n FROM generate_subscripts(words, 1) AS n
                  ORDER BY late[n], weights[n] DESC LIMIT {ranked_words}) AS h);
    END IF;

    -- All pages of so many hits look equally deep at first, and keep what a page before them has shown: so one continues
    -- the other. What is kept stays in front, also where the legs find something better when they look deeper.
    depth := {first_depth};
    LOOP
        IF by_vector THEN
            FOR effort IN least_effort .. 3 LOOP
                CONTINUE WHEN effort = 2 AND filtered; -- among few rows an exact search costs less than a wider one
                PERFORM set_config('hnsw.ef_search',
                                   (CASE effort WHEN 1 THEN {usual_ef} ELSE {max_hits} END)::text, true);
                statement := replace(CASE WHEN effort = 3 THEN exact_leg ELSE nearest_leg END, '<rows>',
                    CASE WHEN filtered THEN {of_chunks} || conditions ELSE '' END);
                {enter_condition}
                {explain_vector}
                EXECUTE statement INTO near_ids USING embedding, depth;
                {leave_condition}
                looked := effort;
                EXIT WHEN cardinality(near_ids) >= least(k, depth);
            END LOOP;
        END IF;
        IF ranker IS NOT NULL THEN
            statement := replace(replace({bm25_leg}, '<ranker>', ranker), '<rows>',
                CASE WHEN required IS NULL THEN conditions ELSE conditions
                    || format(' AND c.search OPERATOR(pg_catalog.@@) %L::pg_catalog.tsquery', required) END);
            {enter_condition}
            {explain_bm25}
            EXECUTE statement INTO word_ids, word_scores USING bare, depth;
            {leave_condition}
        ELSIF by_words THEN
            statement := format({words_leg}, ranking,
                CASE WHEN required IS NULL THEN conditions ELSE conditions
                    || format(' AND c.search OPERATOR(pg_catalog.@@) %L::pg_catalog.tsquery', required) END);
            budget := greatest({budget}, depth);
            candidates := '{{}}';
            candidate_ranks := '{{}}';
            visited := 0;
            tried := NULL;
            at := 0;
            IF filtered AND total > budget THEN
                -- Where a filter leaves few rows, those that hold any of the words are ranked at once.
                {enter_condition}
                EXECUTE format({sample}, least(100, 100 * {sampled} / total), conditions) INTO visited;
                {leave_condition}
                IF visited * total / {sampled} <= 2 * budget THEN
                    one := any_word;
                    room := {visits};
                    {enter_condition}
                    {explain_words}
                    EXECUTE statement INTO more_ids, more_ranks USING one, room;
                    {leave_condition}
                    IF cardinality(more_ids) < {visits} THEN
                        candidates := more_ids;
                        candidate_ranks := more_ranks;
                        at := cardinality(words);
                    END IF;
                END IF;
                visited := 0;
            END IF;
            WHILE at < cardinality(words) AND cardinality(candidates) < depth LOOP
                -- As many of the rarest words as the budget allows for, after that one at a time. Where a condition left
                -- too few of the {visits} chunks that these words are in, all the others at once.
                remaining := visited >= {visits};
                most := CASE WHEN remaining THEN greatest(budget, {visits}) ELSE budget END;
                batch := NULL;
                WHILE at < cardinality(words)
                    AND (remaining OR batch IS NULL OR least(visited + seen[at + 1], total) <= budget) LOOP
                    at := at + 1;
                    visited := visited + seen[at];
                    batch := coalesce(batch || word_queries[at], word_queries[at]);
                END LOOP;
                one := coalesce(batch && !! tried, batch);
                tried := coalesce(tried || batch, batch);
                attempts := ARRAY[one];
                IF least(visited, total) > budget AND at < cardinality(words) THEN
                    -- A frequent word: chunks that hold another one too come first.
                    others := (SELECT string_agg(q::text, ' | ')::tsquery
                               FROM unnest(word_queries[at + 1:]) AS q);
                    attempts := ARRAY[one && others, one && !! others];
                END IF;
                FOREACH one IN ARRAY attempts LOOP
                    room := most - cardinality(candidates);
                    CONTINUE WHEN room <= 0;
                    {enter_condition}
                    {explain_words}
                    EXECUTE statement INTO more_ids, more_ranks USING one, room;
                    {leave_condition}
                    candidates := candidates || more_ids;
                    candidate_ranks := candidate_ranks || more_ranks;
                END LOOP;
            END LOOP;
            SELECT array_agg(b.id) INTO candidates FROM (
                SELECT f.id FROM unnest(candidates, candidate_ranks) AS f(id, rank)
                ORDER BY f.rank DESC, f.id LIMIT depth) AS b;
            SELECT array_agg(b.chunk_id ORDER BY b.score DESC, b.chunk_id),
                   array_agg(b.score ORDER BY b.score DESC, b.chunk_id)
            INTO word_ids, word_scores
            FROM (
                -- Of a chunk's words only those of the query are unnested: they are marked and filtered in C.
                SELECT c.chunk_id, (
                    SELECT sum(weights[array_position(words, t.lexeme)] * cardinality(t.positions) * ({k1} + 1)
                               / (cardinality(t.positions)
                                  + {k1} * (1 - {b} + {b} * length(c.search) / mean_length)))
                    FROM unnest(ts_filter(setweight(c.search, 'A', words), '{{a}}')) AS t) AS score
                FROM unnest(candidates) AS f(id) JOIN {chunks} AS c ON c.chunk_id = f.id
            ) AS b;
        END IF;

        vector_ids := near_ids;
        text_ids := word_ids;
        text_scores := word_scores;
        IF kept_ids <> '{{}}' THEN -- each leg's places continue, too
            SELECT kept_vector_ids || array_agg(n.id ORDER BY n.place) INTO vector_ids
            FROM unnest(near_ids) WITH ORDINALITY AS n(id, place) WHERE n.id <> ALL (kept_vector_ids);
            SELECT kept_text_ids || array_agg(w.id ORDER BY w.place), kept_text_scores || array_agg(w.score ORDER BY w.place)
            INTO text_ids, text_scores
            FROM unnest(word_ids, word_scores) WITH ORDINALITY AS w(id, score, place) WHERE w.id <> ALL (kept_text_ids);
        END IF;

        -- Fusion, of documents or of chunks. A document is shown by the chunk that its places are best for.
        SELECT kept_ids || array_agg(h.chunk_id ORDER BY h.score DESC, h.vector_rank NULLS LAST, h.chunk_id),
               kept_scores || array_agg(least(h.score, kept_scores[cardinality(kept_scores)])
                                        ORDER BY h.score DESC, h.vector_rank NULLS LAST, h.chunk_id),
               kept_vector_ranks || array_agg(h.vector_rank ORDER BY h.score DESC, h.vector_rank NULLS LAST, h.chunk_id),
               kept_text_ranks || array_agg(h.text_rank ORDER BY h.score DESC, h.vector_rank NULLS LAST, h.chunk_id),
               kept_hit_text_scores || array_agg(h.text_score ORDER BY h.score DESC, h.vector_rank NULLS LAST, h.chunk_id)
        INTO hit_ids, hit_scores, hit_vector_ranks, hit_text_ranks, hit_text_scores
        FROM (
            SELECT r.*, coalesce(vector_weight / ({fusion} + r.vector_rank), 0)
                        + coalesce(text_weight / ({fusion} + r.text_rank), 0) AS score
            FROM (
                SELECT d.chunk_id, d.text_score, d.kept,
                       CASE WHEN d.by_vector IS NOT NULL THEN row_number() OVER (ORDER BY d.by_vector) END AS vector_rank,
                       CASE WHEN d.by_text IS NOT NULL THEN row_number() OVER (ORDER BY d.by_text) END AS text_rank
                FROM (
                    SELECT min(g.by_vector) AS by_vector, min(g.by_text) AS by_text, max(g.text_score) AS text_score,
                           bool_or(g.chunk_id = ANY (kept_ids)) AS kept,
                           (array_agg(g.chunk_id ORDER BY coalesce(vector_weight / ({fusion} + g.by_vector), 0)
                               + coalesce(text_weight / ({fusion} + g.by_text), 0) DESC, g.chunk_id))[1] AS chunk_id
                    FROM (
                        SELECT c.chunk_id, f.by_vector, f.by_text, f.text_score,
                               CASE WHEN per_document THEN dense_rank() OVER (ORDER BY {key}) ELSE c.chunk_id END AS document
                        FROM (
                            SELECT coalesce(v.id, t.id) AS id, v.place AS by_vector, t.place AS by_text, t.score AS text_score
                            FROM unnest(vector_ids) WITH ORDINALITY AS v(id, place)
                            FULL JOIN unnest(text_ids, text_scores) WITH ORDINALITY AS t(id, score, place) USING (id)
                        ) AS f JOIN {chunks} AS c ON c.chunk_id = f.id
                    ) AS g GROUP BY g.document
                ) AS d
            ) AS r WHERE NOT r.kept
        ) AS h;
        EXIT WHEN cardinality(hit_ids) >= wanted;
        -- This page lies deeper, or most of what was found are chunks of the same few documents. The first page alone would
        -- have ended here if it is full.
        IF cardinality(hit_ids) >= k THEN
            kept_vector_ids := coalesce(vector_ids, '{{}}');
            kept_text_ids := coalesce(text_ids, '{{}}');
            kept_text_scores := coalesce(text_scores, '{{}}');
            kept_ids := hit_ids;
            kept_scores := hit_scores;
            kept_vector_ranks := hit_vector_ranks;
            kept_text_ranks := hit_text_ranks;
            kept_hit_text_scores := hit_text_scores;
        END IF;
        IF looked < 3 AND coalesce(cardinality(near_ids), 0) < depth THEN
            least_effort := 3; -- HNSW ended before it had seen all vectors
        ELSE
            EXIT WHEN depth >= {deepest}
                OR coalesce(cardinality(near_ids), 0) < depth AND coalesce(cardinality(word_ids), 0) < depth;
            depth := depth * 4;
        END IF;
    END LOOP;

    RETURN QUERY EXECUTE result
    USING hit_ids[skip + 1:wanted], hit_scores[skip + 1:wanted], hit_vector_ranks[skip + 1:wanted],
          hit_text_ranks[skip + 1:wanted], hit_text_scores[skip + 1:wanted], embedding, any_word, headline;
END
