"""One snapshot of an index's tables, for several statements that read them.

PostgreSQL takes a transaction's snapshot before it locks the tables that the first statement reads. If that
statement has to wait for an exchange of tables (`ddl/rebuilding`), the snapshot is older than the tables: it shows both
what the exchange deleted and the copies of it, which were committed before. A table that was truncated meanwhile looks
empty.

So the tables are locked first. LOCK TABLE takes no snapshot; the first statement after it does, and from then on
nobody can replace these tables. A statement at Read Committed needs none of this, as PostgreSQL takes the snapshot that
it runs under once it has its locks. The search function has the snapshot of its caller, so it takes each chunk once.

Source: PostgreSQL, "Transaction Isolation" (Repeatable Read), "Caveats" (of concurrency control), "LOCK".
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.postgres.sessions import Connection


async def hold_snapshot(connection: Connection, *tables: sql.Identifier) -> None:
    """Give the transaction one snapshot of these tables, under which it can only read.

    :param tables: in the order in which who empties or replaces them locks them: the backlog, the chunks, vectors.
    """
    await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    await connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.SQL(", ").join(tables)))
