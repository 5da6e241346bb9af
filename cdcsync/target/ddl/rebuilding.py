"""The settled tier built anew, beside the one that is searched, with what is fresh in it; then the two are exchanged.

HNSW is built many times faster than it grows, so this is how a large part of an index that has changed at once gets
into it. It leaves nothing dead behind, either.

    record changes ─► copy both tiers ─► build the indexes ─► take out what changed meanwhile ─► exchange

Meanwhile a trigger on each tier notes the chunks whose vectors are changed, moved or deleted: what it notes is
taken out of the copy, so whatever remains is what it was when it was copied. Writers wait for the exchange, which
deletes from fresh what is settled now; searches wait for its last milliseconds. The exchange itself waits, for some
minutes, for whoever reads under a snapshot from before the copy: it shows the copy without rows, and the table that it
replaces is dropped. A rebuild that was interrupted is dropped by the next one.

Source: PostgreSQL, "ALTER TABLE" (DETACH and ATTACH PARTITION), "Explicit Locking", "Caveats" (of concurrency control);
pgvector's README (Index Build Time).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import sql

from cdcsync.errors import SetupError
from cdcsync.logs import get_logger
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import first_line
from cdcsync.postgres.horizons import Horizon, Snapshot, read_horizon, snapshots
from cdcsync.postgres.locking import BRIEFLY, REPLACING_WAITS, Lock, exclusive_locks, until_locked
from cdcsync.postgres.queries import fetch_one, fetch_rows, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.building import build_settings, frugally, hnsw_method
from cdcsync.target.ddl.grants import grants_of, guarded, succeed
from cdcsync.target.ddl.names import PATH, SETTLED, Names
from cdcsync.target.ddl.tiers import COLUMN_NAMES, describe_vectors

log = get_logger()

T = TypeVar("T")

FEW = 500
"""Changes that may be left for the exchange: a few milliseconds."""

ROUNDS = 20
"""Passes over what changed meanwhile, at most: under steady load there is always some."""

SNAPSHOT_ATTEMPTS = 160
"""How often the exchange gives way to a snapshot from before the copy: some ten minutes, in which nothing settles. Then
it is made all the same. To give up the copy would lose what was built, and the next one would meet the same
transaction."""

BEGIN_ANEW = "begin a new transaction there: this one finds no settled vectors"

_OWN_INDEXES: LiteralString = """
    SELECT c.relname::text, copy.index, CASE WHEN k.oid IS NULL
        THEN format('CREATE %%sINDEX %%I ON %%s', kind.word, copy.index, %(copy)s::text) || substr(
            pg_get_indexdef(c.oid),
            1 + length(format('CREATE %%sINDEX %%I ON %%I.%%I', kind.word, c.relname, n.nspname, t.relname)))
        ELSE format('ALTER TABLE %%s ADD CONSTRAINT %%I %%s', %(copy)s::text, copy.index, pg_get_constraintdef(k.oid))
        END, CASE WHEN whole.oid IS NULL THEN format('DROP INDEX %%s', root.oid::regclass)
        ELSE format('ALTER TABLE %%s DROP CONSTRAINT %%I', whole.conrelid::regclass, whole.conname) END
    FROM (SELECT *, row_number() OVER (ORDER BY indexrelid) AS number FROM pg_index
        WHERE indrelid = to_regclass(%(settled)s)) AS i
    JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_class AS t ON t.oid = i.indrelid
    JOIN pg_namespace AS n ON n.oid = t.relnamespace
    LEFT JOIN pg_constraint AS k ON k.conindid = c.oid AND k.conrelid = t.oid AND k.contype IN ('u', 'x')
    CROSS JOIN LATERAL (SELECT coalesce(pg_partition_root(c.oid), c.oid)) AS root (oid)
    LEFT JOIN pg_constraint AS whole ON whole.conindid = root.oid AND whole.contype IN ('u', 'x')
    CROSS JOIN LATERAL (SELECT CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END) AS kind (word)
    CROSS JOIN LATERAL (SELECT %(name)s::text || '_' || i.number) AS copy (index)
    WHERE i.indisvalid AND c.relname <> ALL (%(ours)s)
"""
"""The indexes of the settled tier that are not ours, those of its parent among them: the name of each, its name on the
copy, the statement that creates it there, and the one that drops it."""

_BUILT_ON: LiteralString = """
    WITH parts (class, oid) AS (
        SELECT 'pg_class'::regclass, to_regclass(%(settled)s)::oid
        UNION ALL SELECT 'pg_class'::regclass, indexrelid FROM pg_index WHERE indrelid = to_regclass(%(settled)s)
        UNION ALL SELECT 'pg_constraint'::regclass, oid FROM pg_constraint WHERE conrelid = to_regclass(%(settled)s)
        UNION ALL SELECT 'pg_type'::regclass, unnest(ARRAY[t.oid, t.typarray]) FROM pg_type AS t
            WHERE typrelid = to_regclass(%(settled)s)
    ), built (class, oid, column_no) AS (
        SELECT d.classid, d.objid, d.objsubid FROM pg_depend AS d
        JOIN parts AS p ON d.refclassid = p.class AND d.refobjid = p.oid
        -- What depends on it in another way as well is dropped with it.
        GROUP BY 1, 2, 3 HAVING bool_and(d.deptype = 'n')
    )
    SELECT DISTINCT o.type || ' ' || o.identity, CASE
        WHEN k.oid IS NOT NULL THEN format('ALTER TABLE %%s DROP CONSTRAINT %%I', k.conrelid::regclass, k.conname)
        WHEN a.attname IS NOT NULL THEN format('ALTER TABLE %%s DROP COLUMN %%I', a.attrelid::regclass, a.attname)
        ELSE 'DROP ' || upper(o.type) || ' ' || o.identity END
    FROM built AS b LEFT JOIN pg_rewrite AS r ON b.class = 'pg_rewrite'::regclass AND r.oid = b.oid
    LEFT JOIN pg_constraint AS k ON b.class = 'pg_constraint'::regclass AND k.oid = b.oid
    LEFT JOIN pg_attribute AS a ON b.class = 'pg_class'::regclass AND a.attrelid = b.oid AND a.attnum = b.column_no
        AND b.column_no > 0
    CROSS JOIN LATERAL pg_identify_object(CASE WHEN r.oid IS NULL THEN b.class ELSE 'pg_class'::regclass END,
        coalesce(r.ev_class, b.oid), b.column_no) AS o
    ORDER BY 1
"""
"""What keeps the settled tier from being dropped, and the statement that removes each."""


class Emptied(Exception):
    """A tier was emptied while it was copied: the copy is worth nothing."""


class Rebuild:
    """One rebuild of an index's settled tier, over a connection in autocommit that nobody else uses meanwhile."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        names = Names(schema, spec.relations)
        self._connection = connection
        self._schema = schema
        self._spec = spec
        self._names = names
        bare = names.rebuild_name(spec.generation)
        self._parts: dict[str, sql.Composable] = {
            **names.tiers(spec.generation),
            "vectors": names.vectors(spec.generation),
            "settled_bare": sql.Identifier(names.settled_name(spec.generation)),
            "copy": sql.Identifier(schema, bare),
            "changed": sql.Identifier(schema, f"{bare}_changed"),
            "note": sql.Identifier(schema, f"{bare}_note"),
            "path": sql.SQL(PATH),
            "trigger": sql.Identifier("cdcsync_rebuild"),
            "key": sql.Identifier(f"{bare}_pkey"),
            "hash": sql.Identifier(f"{bare}_hash"),
            "hnsw": sql.Identifier(f"{bare}_hnsw"),
            "tier": sql.Literal(SETTLED),
            "backlog": names.backlog,
            "generation": sql.Literal(spec.generation),
            "marker": sql.Literal(f"cdcsync index {spec.name}: a rebuild of its settled vectors"),
        }
        self._files: tuple[object, ...] = ()
        """The files of both tiers: another one means that the tier was emptied."""
        self._own: list[tuple[str, str, str, str]] = []
        """An operator's indexes, as `_OWN_INDEXES` finds them."""
        self._copied: Horizon | None = None
        """The moment since which snapshots have what was copied."""
        self._snapshot_attempts = 0
        """How often the exchange has given way to older ones."""
        self._waited_for: set[str] = set()
        """The transactions that used the tiers when the exchange was last tried."""

    async def run(self) -> int:
        """Rebuild and exchange; returns how many fresh vectors became settled.

        :raises SetupError: an operator gave the settled tier row-level security or columns, which the copy would lack,
            or built something on it.
        :raises psycopg.Error: nothing has changed; what is left behind is dropped by the next rebuild or start.
        :raises Emptied: likewise.
        """
        await self.clear()
        await self._refuse_losses()
        await self._until_locked(self.record)
        await self._fill()
        await self._build()
        for _ in range(ROUNDS):
            if await self._follow() < FEW:
                break
        return await self._until_locked(self._exchange)

    async def clear(self, attempts: int | None = None) -> None:
        """Drop what an earlier rebuild left behind, once nobody uses the tiers; see `abandon`.

        :param attempts: how often that is tried at most.
        :raises LockNotAvailable, DeadlockDetected: somebody used them each time.
        """
        await self._until_locked(self.abandon, attempts)

    async def _until_locked(self, change: Callable[[], Awaitable[T]], attempts: int | None = None) -> T:
        table = self._parts["settled"].as_string(self._connection)
        vacuumed = Vacuumed(self._connection, [(self._schema, self._spec.relations)])
        return await until_locked(change, table=table, attempts=attempts, vacuumed=vacuumed)

    async def abandon(self) -> None:
        """Drop what an earlier rebuild left behind, if it did."""
        present = await fetch_value(
            self._connection,
            "SELECT to_regclass(%s) IS NOT NULL",
            [self._parts["changed"].as_string(self._connection)],
        )
        if not present:
            return
        async with self._connection.transaction():
            await self._run(
                BRIEFLY + "; LOCK TABLE {fresh}, {settled} IN SHARE ROW EXCLUSIVE MODE;"
                " DROP TRIGGER IF EXISTS {trigger} ON {fresh}; DROP TRIGGER IF EXISTS {trigger} ON {settled};"
                " DROP FUNCTION IF EXISTS {note}(); DROP TABLE {changed};"
                " ALTER TABLE {settled} RESET (autovacuum_enabled)"
            )
            # The copy has an operator's own value as settled had it.
            if own := dict(await self._options("copy")).get("autovacuum_enabled"):
                await self._run("ALTER TABLE {settled} SET (autovacuum_enabled = {own})", own=sql.Literal(own))
            await self._run("DROP TABLE IF EXISTS {copy}")
            crash_point("rebuild dropped")
        crash_point("rebuild gone")

    async def forget(self) -> None:
        """Drop the rest of a rebuild whose tiers are gone, with their triggers, in the caller's transaction."""
        await self._run("DROP TABLE IF EXISTS {copy}, {changed}; DROP FUNCTION IF EXISTS {note}()")

    async def record(self) -> None:
        """Create the copy, and have both tiers note what changes from now on."""
        async with self._connection.transaction():
            # Writers commit their work before we get the lock: it will be copied.
            await self._run(BRIEFLY + "; LOCK TABLE {fresh}, {settled} IN SHARE ROW EXCLUSIVE MODE")
            await self._run(
                "CREATE TABLE {copy} (LIKE {settled} INCLUDING DEFAULTS INCLUDING STORAGE INCLUDING COMPRESSION,"
                " CONSTRAINT cdcsync_tier CHECK (tier = {tier})) {options}",
                options=_clause(await self._options("settled")),
            )
            await self._run(
                # Unlogged, because a publication of all tables would refuse to have rows deleted that have no key.
                "CREATE UNLOGGED TABLE {changed} (chunk_id bigint NOT NULL);"
                # A vacuum of what is about to be dropped would only be in the way.
                " ALTER TABLE {settled} SET (autovacuum_enabled = off);"
                " COMMENT ON TABLE {copy} IS {marker}; COMMENT ON TABLE {changed} IS {marker};"
                " CREATE FUNCTION {note}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = {path}"
                " AS $body$ BEGIN INSERT INTO {changed} VALUES (coalesce(OLD.chunk_id, NEW.chunk_id)); RETURN NULL;"
                " END $body$; COMMENT ON FUNCTION {note}() IS {marker};"
                " CREATE TRIGGER {trigger} AFTER UPDATE OR DELETE ON {fresh} FOR EACH ROW EXECUTE FUNCTION {note}();"
                " CREATE TRIGGER {trigger} AFTER INSERT OR UPDATE OR DELETE ON {settled}"
                " FOR EACH ROW EXECUTE FUNCTION {note}()"
            )
            self._files = await self._tier_files()
            crash_point("rebuild written")
        crash_point("rebuild begun")

    async def _options(self, table: str) -> list[tuple[str, str]]:
        """Return the storage parameters of a table, an operator's own among them, and their values."""
        return await fetch_rows(
            self._connection,
            "SELECT o.prefix || option_name, option_value FROM pg_class c CROSS JOIN LATERAL ("
            " SELECT '' AS prefix, c.reloptions AS options UNION ALL"
            " SELECT 'toast.', reloptions FROM pg_class WHERE oid = c.reltoastrelid) AS o"
            " CROSS JOIN pg_options_to_table(o.options) WHERE c.oid = to_regclass(%s)",
            [self._parts[table].as_string(self._connection)],
        )

    async def _fill(self) -> None:
        """Copy both tiers as they are now, but for what is about to be replaced."""
        await self._run(
            "INSERT INTO {copy} (chunk_id, content_hash, embedding, stored_at)"
            " SELECT chunk_id, content_hash, embedding, stored_at FROM {settled} UNION ALL"
            " SELECT chunk_id, content_hash, embedding, stored_at FROM {fresh} AS f WHERE NOT EXISTS"
            " (SELECT FROM {backlog} AS b WHERE b.chunk_id = f.chunk_id AND b.generation = {generation})"
        )
        crash_point("tiers copied")
        self._copied = await read_horizon(self._connection)

    async def _build(self) -> None:
        await self._run("ALTER TABLE {copy} ADD CONSTRAINT {key} PRIMARY KEY (chunk_id)")
        crash_point("copy has its key")
        await self._run("CREATE INDEX {hash} ON {copy} (content_hash)")
        crash_point("copy has its hashes")
        self._own = await fetch_rows(
            self._connection,
            _OWN_INDEXES,
            {
                "settled": self._parts["settled"].as_string(self._connection),
                "copy": self._parts["copy"].as_string(self._connection),
                "name": self._names.rebuild_name(self._spec.generation),
                "ours": list(self._our_indexes.values()),
            },
        )
        # Otherwise those of the parent would be built by the exchange, while searches wait. HNSW takes the longest.
        for name, _, create, drop in self._own:
            try:
                await self._create(sql.SQL(create))
            except (psycopg.IntegrityError, psycopg.ProgrammingError) as error:
                raise SetupError(
                    f"the index {name} cannot be built on the table that takes the settled tier's place:"
                    f" {first_line(error)}",
                    where=f"index {self._spec.name}",
                    hint=f"vectors are inserted one by one until it is dropped: {drop}",
                ) from error
        method = await hnsw_method(self._connection, self._spec)
        await self._create(self._sql("CREATE INDEX {hnsw} ON {copy} USING {method}", method=method))
        crash_point("copy has its graph")
        await self._run("ANALYZE {copy}")

    async def _create(self, index: sql.SQL | sql.Composed) -> None:
        """Build an index of the copy, with fewer processes and less memory if the server lacks it."""
        await frugally(self._spec, lambda less: self._create_with(index, less))

    async def _create_with(self, index: sql.SQL | sql.Composed, frugal: Mapping[str, str]) -> None:
        async with build_settings(self._connection, self._spec, frugal):
            await self._connection.execute(index)

    @property
    def _our_indexes(self) -> dict[str, str]:
        """The names of our indexes on the copy, and those that they have on settled."""
        names, number = self._names, self._spec.generation
        bare = names.rebuild_name(number)
        return {
            f"{bare}_pkey": names.key_name(number, SETTLED),
            f"{bare}_hash": names.hash_name(number, SETTLED),
            f"{bare}_hnsw": names.hnsw_name(number),
        }

    async def _follow(self) -> int:
        """Take out of the copy what changed, and put in what came to settled; returns how many changes there were."""
        async with self._connection.transaction():
            changes = await self._take_out()
            crash_point("changes taken out")
        crash_point("copy follows")
        return changes

    async def _take_out(self) -> int:
        chunks = [row[0] for row in await (await self._run("DELETE FROM {changed} RETURNING chunk_id")).fetchall()]
        if chunks:
            await self._run("DELETE FROM {copy} WHERE chunk_id = ANY(%s)", arguments=[chunks])
            await self._run(
                "INSERT INTO {copy} (chunk_id, content_hash, embedding, stored_at)"
                " SELECT chunk_id, content_hash, embedding, stored_at FROM {settled} WHERE chunk_id = ANY(%s)",
                arguments=[chunks],
            )
        return len(chunks)

    async def _exchange(self) -> int:
        """Exchange the tiers, unless that would be in vain: writers wait for each attempt.

        :raises LockNotAvailable: somebody reads under a snapshot from before the copy, in which that is empty, and has
            not been waited for long enough; a transaction from before the last attempt is still open; or this attempt
            was in vain.
        """
        await self._follow()
        older = await snapshots(self._connection, before=self._copied)
        if older and self._snapshot_attempts < SNAPSHOT_ATTEMPTS:
            self._snapshot_attempts += 1
            raise _in_the_way(older[0])
        *_, vectors = self._names.written(self._spec.generation)
        users = await exclusive_locks(self._connection, [vectors], modes=REPLACING_WAITS)
        for one in users:
            if one.transaction in self._waited_for:
                raise _in_the_way(one)
        self._waited_for.clear()
        self._waited_for.update(one.transaction for one in users)
        moved = await self.switch()
        if older:
            log.warning(
                "snapshots_overtaken", index=self._spec.name, transactions=[str(one) for one in older], fix=BEGIN_ANEW
            )
        return moved

    async def switch(self) -> int:
        """Put the copy in the place of the settled tier; returns how many vectors left fresh."""
        connection, spec, names = self._connection, self._spec, self._names
        async with connection.transaction():
            await self._run(BRIEFLY + "; LOCK TABLE {fresh}, {settled} IN SHARE ROW EXCLUSIVE MODE")
            if await self._tier_files() != self._files:
                raise Emptied
            await self._refuse_losses()
            await self._take_out()
            moved = await self._run("DELETE FROM {fresh} AS f USING {copy} AS c WHERE c.chunk_id = f.chunk_id")
            grants = await grants_of(connection, names.settled(spec.generation))
            # From here on searches wait. They lock the parent first, so it comes first here.
            await self._run("LOCK TABLE {vectors} IN ACCESS EXCLUSIVE MODE")
            await self._run(
                "DROP TRIGGER {trigger} ON {fresh};"
                " ALTER TABLE {vectors} DETACH PARTITION {settled}; DROP TABLE {settled}; DROP FUNCTION {note}();"
                " DROP TABLE {changed}; ALTER TABLE {copy} RENAME TO {settled_bare};"
                " ALTER TABLE {vectors} ATTACH PARTITION {settled} FOR VALUES IN ({tier});"
                " ALTER TABLE {settled} DROP CONSTRAINT cdcsync_tier"
            )
            for old, new in [*self._our_indexes.items(), *((copied, name) for name, copied, *_ in self._own)]:
                await self._run(
                    "ALTER INDEX {schema}.{old} RENAME TO {new}",
                    schema=names.schema,
                    old=sql.Identifier(old),
                    new=sql.Identifier(new),
                )
            await succeed(connection, names.settled(spec.generation), grants)
            await describe_vectors(connection, self._schema, spec)
            crash_point("tiers exchanged")
        crash_point("exchange committed")
        return moved.rowcount

    async def _refuse_losses(self) -> None:
        settled = self._names.settled(self._spec.generation)
        columns = await fetch_rows(
            self._connection,
            "SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0"
            " AND NOT attisdropped AND attname <> ALL (%s) ORDER BY attnum",
            [settled.as_string(self._connection), list(COLUMN_NAMES)],
        )
        if columns:
            raise SetupError(
                f"{settled.as_string(self._connection)} has columns of your own"
                f" ({', '.join(one for (one,) in columns)}), whose values a table in its place would lack",
                where=f"index {self._spec.name}",
                hint="vectors are inserted one by one until it has none: drop them, and keep the values in a table of"
                " yours",
            )
        if await guarded(self._connection, settled):
            raise SetupError(
                f"{settled.as_string(self._connection)} has row-level security of your own, which a table in its place"
                " would lack",
                where=f"index {self._spec.name}",
                hint="vectors are inserted one by one until it has none; each search is held to that of the chunks",
            )
        table = settled.as_string(self._connection)
        if built := await fetch_rows(self._connection, _BUILT_ON, {"settled": table}):
            both = self._names.vectors(self._spec.generation).as_string(self._connection)
            drops = "; ".join(drop for _, drop in built)
            raise SetupError(
                f"{', '.join(one for one, _ in built)}: built on {table}, and in the way of a table in its place",
                where=f"index {self._spec.name}",
                hint=f"vectors are inserted one by one until that is dropped: {drops}. Build on {both} instead, which"
                " has the fresh vectors as well",
            )

    async def _tier_files(self) -> tuple[object, ...]:
        return await fetch_one(
            self._connection,
            "SELECT pg_relation_filenode(%s::regclass), pg_relation_filenode(%s::regclass)",
            [self._parts[tier].as_string(self._connection) for tier in ("fresh", "settled")],
        )

    async def _run(
        self, statement: LiteralString, *, arguments: list[object] | None = None, **parts: sql.Composable
    ) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        return await self._connection.execute(self._sql(statement, **parts), arguments)

    def _sql(self, statement: LiteralString, **parts: sql.Composable) -> sql.Composed:
        return sql.SQL(statement).format(**self._parts, **parts)


def _in_the_way(one: Lock | Snapshot) -> psycopg.errors.LockNotAvailable:
    """Return the error by which an attempt ends because of somebody else."""
    return psycopg.errors.LockNotAvailable(f"{one}; {one.remedy}")


def _clause(options: Sequence[tuple[str, str]]) -> sql.Composable:
    """Return the clause of CREATE TABLE that gives a table these storage parameters."""
    if not options:
        return sql.SQL("")
    named = (
        sql.SQL("{} = {}").format(sql.SQL(".").join(map(sql.Identifier, name.split("."))), sql.Literal(value))
        for name, value in options
    )
    return sql.SQL("WITH ({})").format(sql.SQL(", ").join(named))
