"""Functions that reading a table runs: those in expressions of its indexes, extended statistics and check constraints.

The planner evaluates calls with constant arguments in such expressions with the privileges of the role that reads the
table, and no setting keeps it from that. So the owner of a table could have code run as the source's role. A table
that has such an expression is warned of, unless the function belongs to somebody who may do more than that role
anyway.

Source: PostgreSQL, src/backend/utils/cache/relcache.c, RelationGetIndexExpressions; "Function Volatility Categories".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import LiteralString

from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding

_FOREIGN: LiteralString = """
    WITH RECURSIVE tables (oid) AS (
        SELECT unnest(%(tables)s::oid[])
        UNION SELECT i.inhrelid FROM tables AS t JOIN pg_inherits AS i ON i.inhparent = t.oid
    ), parts (of, classid, objid, what) AS (
        SELECT i.indrelid, 'pg_class'::regclass, i.indexrelid, 'an index' FROM pg_index AS i
            WHERE i.indexprs IS NOT NULL OR i.indpred IS NOT NULL
        UNION ALL SELECT s.stxrelid, 'pg_statistic_ext'::regclass, s.oid, 'extended statistics'
            FROM pg_statistic_ext AS s
        UNION ALL SELECT c.conrelid, 'pg_constraint'::regclass, c.oid, 'a constraint' FROM pg_constraint AS c
            WHERE c.contype = 'c'
        UNION ALL SELECT p.partrelid, 'pg_class'::regclass, p.partrelid, 'the partitioning'
            FROM pg_partitioned_table AS p
    )
    SELECT DISTINCT p.of::regclass::text, p.what, f.oid::regprocedure::text, r.rolname::text
    FROM parts AS p JOIN pg_depend AS d ON d.classid = p.classid AND d.objid = p.objid
    LEFT JOIN pg_operator AS o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    JOIN pg_proc AS f ON f.oid = CASE d.refclassid WHEN 'pg_proc'::regclass THEN d.refobjid ELSE o.oprcode::oid END
    JOIN pg_roles AS r ON r.oid = f.proowner
    WHERE p.of IN (SELECT oid FROM tables) AND NOT r.rolsuper AND NOT pg_has_role(r.oid, 'USAGE')
        AND r.oid <> (SELECT datdba FROM pg_database WHERE datname = current_database())
    ORDER BY 1, 2, 3
"""


async def examine_expressions(source: Connection, index: str, oids: Sequence[int]) -> list[Finding]:
    """Warn of functions of others that reading these tables may run.

    :param oids: the tables, of which partitions need not be named.
    """
    cursor = await source.execute(_FOREIGN, {"tables": list(oids)})
    return [
        Finding.warning(
            f"indexes.{index}.table",
            f"{what} of {table} calls {function}, which {owner} owns: PostgreSQL may run it with the privileges of the"
            " worker's role whenever it reads the table",
            "if you do not trust that role with all that the worker's role may read, give the function to an"
            " administrator, or drop the expression",
        )
        for table, what, function, owner in await cursor.fetchall()
    ]
