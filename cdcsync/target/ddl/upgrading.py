"""From one table of vectors to two tiers, in place: nothing is read again, and no search fails meanwhile.

The table that is there becomes the settled tier, with its vectors and its HNSW index. It takes three steps, each of
which leaves a working index: two columns with a constant default, which rewrite nothing; the proof that all rows
belong to that tier, which reads the table and excludes nobody; and the exchange of names, which takes milliseconds.
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.logs import get_logger
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.locking import BRIEFLY, until_locked
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.grants import grants_of, succeed
from cdcsync.target.ddl.names import FRESH, SETTLED, Names
from cdcsync.target.ddl.relations import create_view
from cdcsync.target.ddl.tiers import COLUMNS, OPTIONS, create_vectors, stored_type, vector_type

log = get_logger()

PROOF_NAME = "cdcsync_tier"
"""The constraint by which the server knows, without looking, that the table is a partition of the settled tier."""
PROOF = sql.Identifier(PROOF_NAME)


async def upgrade_vectors(connection: Connection, schema: str, spec: IndexSpec, attempts: int | None = None) -> bool:
    """Divide the vectors table of the spec's generation into tiers where it is still one table.

    Needs a connection in autocommit. Returns whether there was anything to do.

    :param attempts: how often each of its locks is asked for at most.
    :raises LockNotAvailable, DeadlockDetected: somebody was in its way each time; what it has done stays done.
    """
    vectors = Names(schema, spec.relations).vectors(spec.generation)
    name = vectors.as_string(connection)
    row = await fetch_row(
        connection, "SELECT oid::int8 FROM pg_class WHERE oid = to_regclass(%s) AND relkind = 'r'", [name]
    )
    if row is None or await stored_type(connection, vectors) != spec.vector_type:
        return False
    log.info("tiers_begin", index=spec.name, table=name)
    vacuumed = Vacuumed(connection, [(schema, spec.relations)])
    for change in (
        lambda: _add_columns(connection, vectors),
        lambda: _prove(connection, vectors),
        lambda: _exchange(connection, schema, spec, row[0]),
    ):
        await until_locked(change, table=name, attempts=attempts, vacuumed=vacuumed)
    log.info("tiers_ready", index=spec.name, table=name)
    return True


async def _add_columns(connection: Connection, vectors: sql.Identifier) -> None:
    async with connection.transaction():
        await connection.execute(BRIEFLY)
        proof = await fetch_row(
            connection,
            "SELECT FROM pg_constraint WHERE conrelid = to_regclass(%s) AND conname = %s",
            [vectors.as_string(connection), PROOF_NAME],
        )
        if proof is None:
            await connection.execute(
                sql.SQL(
                    "ALTER TABLE {} ADD COLUMN IF NOT EXISTS tier text NOT NULL DEFAULT {tier},"
                    " ADD COLUMN IF NOT EXISTS stored_at timestamptz NOT NULL DEFAULT now(),"
                    " ADD CONSTRAINT {} CHECK (tier = {tier}) NOT VALID, SET (" + OPTIONS[SETTLED] + ")"
                ).format(vectors, PROOF, tier=sql.Literal(SETTLED))
            )
        crash_point("tier columns written")
    crash_point("tier columns committed")


async def _prove(connection: Connection, vectors: sql.Identifier) -> None:
    async with connection.transaction():
        await connection.execute(BRIEFLY)
        await connection.execute(sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(vectors, PROOF))
        crash_point("tier proof written")
    crash_point("tier proven")


async def _exchange(connection: Connection, schema: str, spec: IndexSpec, oid: int) -> None:
    names, view = Names(schema, spec.relations), spec.config.view_name
    vectors, settled = names.vectors(spec.generation), names.settled(spec.generation)
    async with connection.transaction():
        await connection.execute(BRIEFLY)
        # In the order in which a search takes its locks: the view, then what it reads.
        present = await fetch_row(
            connection,
            "SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE n.nspname = %s AND c.relname = %s AND c.relkind = 'v'",
            [view.schema, view.name],
        )
        if present is not None:
            await connection.execute(
                sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(view.schema, view.name))
            )
        await connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(vectors))
        grants = await grants_of(connection, vectors)
        dependents = await _dependents(connection, spec, oid)
        await connection.execute(
            sql.SQL("ALTER TABLE {} RENAME TO {}").format(vectors, sql.Identifier(names.settled_name(spec.generation)))
        )
        await connection.execute(
            sql.SQL("CREATE TABLE {} (" + COLUMNS + ") PARTITION BY LIST (tier)").format(
                vectors, vector=await vector_type(connection, spec), tier=sql.Literal(FRESH)
            )
        )
        await connection.execute(
            sql.SQL("ALTER TABLE {} ATTACH PARTITION {} FOR VALUES IN ({})").format(
                vectors, settled, sql.Literal(SETTLED)
            )
        )
        await connection.execute(sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(settled, PROOF))
        await create_vectors(connection, schema, spec)
        await succeed(connection, vectors, grants)
        await create_view(connection, schema, spec)
        crash_point("tiers written")
    crash_point("tiers committed")
    if dependents:
        log.warning("views_read_settled_only", index=spec.name, views=dependents, fix="create these views again")


async def _dependents(connection: Connection, spec: IndexSpec, oid: int) -> list[str]:
    """Return the views, other than the index's own, that read the vectors table itself.

    They follow the table, not its name, so they will not see what is fresh.
    """
    view = spec.config.view_name
    cursor = await connection.execute(
        "SELECT DISTINCT format('%%I.%%I', n.nspname, c.relname) FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid"
        " JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = %s AND (n.nspname, c.relname) <> (%s, %s)"
        " ORDER BY 1",
        [oid, view.schema, view.name],
    )
    return [name for (name,) in await cursor.fetchall()]
