"""The statements of apply: they bring chunks, vectors and backlog to what the stage says.

The names in braces are those of an index's tables, its columns and its operators, see `IndexWriter`. No statement takes
arguments, so that several can be sent together. Their order matters, and `apply` says why.
"""

from __future__ import annotations

from typing import LiteralString

_OWN_POSITION = (
    "commit_lsn = least({new}.commit_lsn, CASE WHEN c.content_hash = {new}.content_hash THEN c.commit_lsn END),"
    " applied_at = least({new}.applied_at, CASE WHEN c.content_hash = {new}.content_hash THEN c.applied_at"
    " ELSE coalesce({new}.applied_at, now()) END)"
)
"""Lets a chunk whose text stays keep its position and time: the text may wait for a vector since then."""

SINCE = (
    "UPDATE {stage} AS s SET commit_lsn = least(s.commit_lsn, c.commit_lsn), applied_at = c.applied_at FROM"
    " (SELECT {own_key}, c.content_hash, min(c.commit_lsn) AS commit_lsn, min(c.applied_at) AS applied_at"
    " FROM {stage} AS s CROSS JOIN LATERAL"
    " (SELECT * FROM {chunks} AS c"
    " WHERE {same_key} AND c.chunk_no >= (s.op = {replace} AND s.chunk_total = 1)::int OFFSET 0) AS c"
    " WHERE s.op IN ({put_op}, {replace}) AND s.chunk_no = 0 GROUP BY {own_key}, c.content_hash) AS c"
    " WHERE s.op IN ({put_op}, {replace}) AND {same_key} AND s.content_hash = c.content_hash"
)
"""Does the same for texts that were another chunk of their document, before chunks are deleted or written.

Of a document of one chunk that stays one no row is read here. One that is thought new may be a row whose key is written
in another way now, and which is deleted before that.
"""

DELETE_SURPLUS = (
    "WITH gone AS (DELETE FROM {chunks} AS c USING {stage} AS s"
    " WHERE {same_key} AND (s.op = {delete} OR s.op = {delete_as_written} AND {as_written}"
    " OR s.op IN ({put_op}, {replace}) AND s.chunk_no = 0)"
    " AND c.chunk_no >= s.chunk_total RETURNING c.chunk_id)"
    " INSERT INTO {gone} (chunk_id) SELECT chunk_id FROM gone"
)
"""Deletes the chunks of deleted and absent keys, and of documents that have fewer chunks now."""

UPDATE_KEPT = (
    "UPDATE {chunks} AS c SET {assignments} FROM {stage} AS s WHERE s.op = {keep} AND {same_key} AND {differs}"
)

REPLACE = (
    "WITH put AS (UPDATE {chunks} AS c SET {replacements}, "
    + _OWN_POSITION.replace("{new}", "s")
    + " FROM {stage} AS s"
    " WHERE s.op = {replace} AND {same_key} AND c.chunk_no = s.chunk_no RETURNING c.chunk_id, c.content_hash)"
    " INSERT INTO {put} SELECT chunk_id, content_hash FROM put"
)

_PUT = (
    "WITH put AS (INSERT INTO {chunks} AS c ({targets}, applied_at) SELECT {sources}, coalesce(s.applied_at, now())"
    " FROM {stage} AS s WHERE ",
    " ON CONFLICT ({keys}, chunk_no) DO UPDATE SET {updates}, "
    + _OWN_POSITION.replace("{new}", "excluded")
    + " RETURNING chunk_id, content_hash)"
    " INSERT INTO {put} SELECT chunk_id, content_hash FROM put",
)

PUT_NEW = "s.op = {put_op}".join(_PUT)
"""Writes the chunks of documents that the index does not hold."""

PUT_MORE = (
    "s.op = {replace} AND NOT EXISTS (SELECT FROM {chunks} AS c WHERE {same_key} AND c.chunk_no = s.chunk_no OFFSET 0)"
).join(_PUT)
"""Writes the chunks that documents have more than before."""

REPLACED: LiteralString = (
    "content_hash = excluded.content_hash, embedding = excluded.embedding, stored_at = excluded.stored_at"
)

STORE = (
    "INSERT INTO {fresh} (chunk_id, content_hash, embedding) SELECT p.chunk_id, p.content_hash, {ready_vector}"
    " FROM {put} AS p JOIN {ready} AS r USING (content_hash) WHERE {ready_fits}"
    " ON CONFLICT (chunk_id) DO UPDATE SET " + REPLACED
)
"""Stores the vectors that came with the batch."""

LOCK_TIERS = "LOCK TABLE {fresh}, {settled} IN ROW EXCLUSIVE MODE"

LOCK = "LOCK TABLE {backlog}, {fresh}, {settled} IN ROW EXCLUSIVE MODE"

CLEAR_BACKLOG = (
    "DELETE FROM {backlog} WHERE chunk_id = ANY (ARRAY("
    "SELECT chunk_id FROM {gone} UNION ALL SELECT chunk_id FROM {put}))"
)

REUSE = (
    "INSERT INTO {fresh} AS mine (chunk_id, content_hash, embedding)"
    " SELECT p.chunk_id, p.content_hash, equal.embedding FROM {put} AS p CROSS JOIN LATERAL"
    " (SELECT v.embedding FROM {vectors} AS v WHERE v.content_hash = p.content_hash{alike} LIMIT 1) AS equal"
    " WHERE NOT EXISTS (SELECT FROM {vectors} AS v WHERE v.chunk_id = p.chunk_id"
    " AND v.content_hash = p.content_hash OFFSET 0)"
    " ON CONFLICT (chunk_id) DO UPDATE SET " + REPLACED
)
"""Gives each chunk without a current vector that of an equal text, in whichever generation one is stored."""

REUSE_OWN = REUSE.replace("{alike}", "{siblings}")
"""The same without the generations of the index beside, whose tables another session holds."""

SUPERSEDE = (
    "DELETE FROM {settled} WHERE chunk_id = ANY (ARRAY("
    "SELECT chunk_id FROM {fresh} WHERE chunk_id = ANY (ARRAY(SELECT chunk_id FROM {put}))))"
)

QUEUE = (
    "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane)"
    " SELECT {generation}, p.chunk_id, p.content_hash, s.lane FROM {put} AS p"
    " JOIN (SELECT content_hash, min(lane) AS lane FROM {stage} WHERE op IN ({put_op}, {replace})"
    " GROUP BY content_hash) AS s USING (content_hash)"
    " WHERE NOT EXISTS (SELECT FROM {vectors} AS v"
    " WHERE v.chunk_id = p.chunk_id AND v.content_hash = p.content_hash OFFSET 0)"
)
"""Puts each chunk that still has no current vector into the backlog."""

HASHING = "SET LOCAL enable_hashjoin = on"
NOT_HASHING = "SET LOCAL enable_hashjoin = off"
"""Around what joins temporary tables, which have no index."""

UNPLANNED = frozenset((HASHING, NOT_HASHING, LOCK, LOCK_TIERS))
"""What the server makes no plan for."""

QUEUE_LOADED = (
    "INSERT INTO {backlog} (generation, chunk_id, content_hash, lane)"
    " SELECT {generation}, p.chunk_id, p.content_hash, {backfill} FROM {put} AS p"
    " WHERE NOT EXISTS (SELECT FROM {vectors} AS v WHERE v.chunk_id = p.chunk_id OFFSET 0)"
)
"""The same for chunks that were copied in."""

DROP_FRESH = "DELETE FROM {fresh} WHERE chunk_id = ANY (ARRAY(SELECT chunk_id FROM {gone}))"
DROP_SETTLED = "DELETE FROM {settled} WHERE chunk_id = ANY (ARRAY(SELECT chunk_id FROM {gone}))"
