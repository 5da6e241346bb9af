"""The target: server, pgvector, our schema and what lies in it already.

Facts are read first; pure functions interpret them.

Source: PostgreSQL, "CREATE EXTENSION", "Privileges"; pgvector's README and changelog.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

import msgspec

from cdcsync.config import Config, QualifiedName, Target
from cdcsync.config.names import named, quote
from cdcsync.postgres.queries import fetch_one, fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.administration import allow_writes
from cdcsync.preflight.findings import Finding, noting, or_ok
from cdcsync.source.catalog import Server, read_server
from cdcsync.source.slot import MIN_VERSION
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.pipelines import Pipelines, others_begun
from cdcsync.target.registry import Registry
from cdcsync.target.version import read_version, refusal

PGVECTOR_MINIMUM = (0, 7, 0)
"""The first with halfvec."""
PGVECTOR_ADVISED = (0, 8, 4)
"""Fixes of HNSW came up to this version: parallel builds in 0.8.2, vacuuming in 0.8.3 and 0.8.4."""

SHARED = (
    "pipelines",
    "indexes",
    "dropped_indexes",
    "approvals",
    "schema_version",
    "backfills",
    "backfill_keys",
    "audits",
    "calls",
    "differences",
    "embedders",
    "evaluations",
    "failed_documents",
    "generations",
    "judged_runs",
    "tiers",
)
"""Our tables that all indexes share."""

OURS = "cdcsync"
"""How the comment of each of our relations begins."""


class Pgvector(msgspec.Struct, frozen=True):
    """pgvector in the target database.

    :ivar installed: its version in this database, None when it is not there; `schema` and `usable` go with it.
    :ivar available: the version that the server's files hold, None when there are none.
    :ivar installable: whether this role may create the extension, in the schema `public`.
    """

    installed: str | None
    schema: str | None
    usable: bool
    available: str | None
    installable: bool


class Access(msgspec.Struct, frozen=True):
    """A schema: whether it exists, and whether the role may create relations in it and use them."""

    schema: str
    exists: bool
    granted: bool


class Relation(msgspec.Struct, frozen=True):
    """A relation that exists where one of ours belongs."""

    name: QualifiedName
    kind: str
    comment: str | None
    owner: str
    owned: bool

    def of(self, marker: str) -> bool:
        """Whether its comment says that it is ours."""
        return (self.comment or "").startswith(marker)


class TargetFacts(msgspec.Struct, frozen=True):
    """The facts about the target that the checks of indexes need."""

    server: Server
    stored: dict[str, Entry]
    generations: dict[str, list[Generation]] = {}
    """The sets of vectors of each index, by its name."""
    dropped: dict[str, int] = {}
    """The highest number that a generation had of each index that was dropped, by the index's name."""
    begun: bool = False
    """Whether the pipeline has a checkpoint."""
    publication: str | None = None
    """The publication that the pipeline was last set up with."""
    elsewhere: dict[str, str | None] = {}
    """The other schemas whose pipeline has a slot of the same name, each with its source's system identifier."""


async def examine_target(connection: Connection, config: Config, findings: list[Finding]) -> TargetFacts | None:
    """Check everything on the target but the single indexes; returns None when the server could not be read."""
    schema = config.target.schema
    facts = None
    with noting(findings, "target", "target"):
        server = await read_server(connection)
        facts = TargetFacts(server, {})
        findings += or_ok(server_faults(server), "target", f"PostgreSQL {server.version_text}")
        pgvector = await read_pgvector(connection)
        state = "" if pgvector.installed else ", which run installs"
        findings += or_ok(
            pgvector_faults(pgvector, server), "target", f"pgvector {pgvector.installed or pgvector.available}{state}"
        )
        access = await read_access(connection, schema)
        denied = list(access_faults("target.schema", access, server, created=True))
        findings += denied
        relations = await read_relations(connection, schema, SHARED)
        faults = list(relation_faults("target.schema", relations, server, config))
        findings += faults
        present = any(relation.name.name == "pipelines" for relation in relations)
        faults += denied  # what is in a schema without USAGE cannot be read
        if not faults and (refused := refusal(schema, await read_version(connection, schema))) is not None:
            faults = [Finding.of(refused, "target.schema")]
            findings += faults
        if not faults:
            entries = await Registry(schema).all(connection)
            generations = await Generations(schema).all(connection)
            pipelines = Pipelines(schema, config.source.slot)
            begun = present and await pipelines.begun(connection)
            publication = await pipelines.publication(connection) if present else None
            elsewhere = {} if begun else await others_begun(connection, schema, config.source.slot)
            dropped = await Registry(schema).dropped(connection)
            facts = TargetFacts(server, entries, generations, dropped, begun, publication, elsewhere)
    return facts


async def read_pgvector(connection: Connection) -> Pgvector:
    """Return what there is of pgvector."""
    row = await fetch_one(
        connection,
        """
        SELECT i.extversion, i.nspname, coalesce(has_schema_privilege(i.extnamespace, 'USAGE'), false),
               a.default_version,
               to_regnamespace('public') IS NOT NULL AND (
                   (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
                   OR coalesce(v.trusted AND has_database_privilege(current_database(), 'CREATE'), false))
        FROM (SELECT) AS nothing
        LEFT JOIN (SELECT e.extversion, e.extnamespace, n.nspname
                   FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE extname = 'vector') i ON true
        LEFT JOIN pg_available_extensions a ON a.name = 'vector'
        LEFT JOIN pg_available_extension_versions v ON v.name = a.name AND v.version = a.default_version
        """,
    )
    return Pgvector(*row)


async def read_access(connection: Connection, schema: str) -> Access:
    """Return what the role may do in a schema."""
    row = await fetch_row(
        connection,
        "SELECT has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE')"
        " FROM pg_namespace WHERE nspname = %s",
        [schema],
    )
    return Access(schema, row is not None, row is not None and bool(row[0]))


async def read_relations(connection: Connection, schema: str, names: Sequence[str]) -> list[Relation]:
    """Return those relations of these names that exist in a schema."""
    cursor = await connection.execute(
        """
        SELECT n.nspname, c.relname, c.relkind::text, obj_description(c.oid, 'pg_class'), pg_get_userbyid(c.relowner),
               pg_has_role(c.relowner, 'USAGE')
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %s AND c.relname = ANY(%s) ORDER BY c.relname
        """,
        [schema, list(names)],
    )
    return [Relation(QualifiedName(schema_, name), *rest) for schema_, name, *rest in await cursor.fetchall()]


def server_faults(server: Server) -> Iterator[Finding]:
    """Say whether the server takes writes, and every text."""
    if server.version < MIN_VERSION:
        yield Finding.error(
            "target",
            f"PostgreSQL {server.version_text} is too old",
            f"upgrade the target to PostgreSQL {MIN_VERSION // 10000} or later",
        )
    if server.in_recovery:
        yield Finding.error(
            "target",
            "the server is a standby: it takes no writes",
            "point target.dsn at the primary; if it names several hosts, add target_session_attrs=read-write",
        )
    elif server.read_only_by is not None:
        yield Finding.error("target", "transactions are read-only here", allow_writes(server))
    if server.replica_role:
        yield Finding.error(
            "target",
            "session_replication_role is replica here, so foreign keys and triggers of our tables would not act",
            f"ALTER ROLE {quote(server.role)} RESET session_replication_role, or the same for the database",
        )
    if not server.may_use_temporary:
        yield Finding.error(
            "target",
            f"the role {quote(server.role)} may not create temporary tables, through which batches are applied",
            f"GRANT TEMPORARY ON DATABASE {quote(server.database)} TO {quote(server.role)}",
        )
    if server.encoding != "UTF8":
        yield Finding.warning(
            "target",
            f"the database's encoding is {server.encoding}: a character that it lacks stops the pipeline",
            "use a database with ENCODING 'UTF8'",
        )


def pgvector_faults(pgvector: Pgvector, server: Server) -> Iterator[Finding]:
    """Say whether pgvector is there, or can be made to be, and whether it is new enough."""
    where = "target"
    version = pgvector.installed or pgvector.available
    if version is None:
        yield Finding.error(
            where,
            "pgvector is not on this server",
            f"install it there (Debian's package: postgresql-{server.version // 10000}-pgvector),"
            f" then CREATE EXTENSION vector SCHEMA public in the database {quote(server.database)}",
        )
        return
    if pgvector.installed is None and not pgvector.installable:
        yield Finding.error(
            where,
            f"pgvector is not installed in the database {quote(server.database)}, and the role {quote(server.role)}"
            " may not install it",
            f"as a superuser in the database {quote(server.database)}: CREATE EXTENSION vector SCHEMA public",
        )
    if pgvector.installed is not None and not pgvector.usable:
        schema = quote(pgvector.schema or "")
        yield Finding.error(
            where,
            f"the role {quote(server.role)} may not use the schema {schema}, where pgvector is",
            f"GRANT USAGE ON SCHEMA {schema} TO {quote(server.role)}",
        )
    number, newer = version_number(version), version_number(pgvector.available or "")
    advised = ".".join(map(str, PGVECTOR_ADVISED))
    for least, make in ((PGVECTOR_MINIMUM, Finding.error), (PGVECTOR_ADVISED, Finding.warning)):
        if number < least:
            updates = pgvector.installed is not None and newer >= least
            yield make(
                where,
                f"pgvector {version} is "
                + ("too old" if least == PGVECTOR_MINIMUM else f"older than {advised}, which is advised"),
                "ALTER EXTENSION vector UPDATE"
                if updates
                else f"install pgvector {advised} or later on the server, then ALTER EXTENSION vector UPDATE",
            )
            break


def version_number(text: str) -> tuple[int, ...]:
    """Return an extension's version as numbers that compare; none for a text without any."""
    return tuple(map(int, re.findall(r"\d+", text)))


def access_faults(where: str, access: Access, server: Server, *, created: bool) -> Iterator[Finding]:
    """Say why the role could not create relations in a schema.

    :param created: `run` creates the schema when it is missing.
    """
    role, schema = quote(server.role), quote(access.schema)
    if access.exists and not access.granted:
        yield Finding.error(
            where,
            f"the role {role} may not create relations in the schema {schema}",
            f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}",
        )
    elif not access.exists and not created:
        yield Finding.error(where, f"there is no schema {schema} in the target", f"CREATE SCHEMA {schema}")
    elif not access.exists and not server.may_create:
        yield Finding.error(
            where,
            f"the schema {schema} does not exist, and the role {role} may not create it",
            f"CREATE SCHEMA {schema} AUTHORIZATION {role}",
        )


def relation_faults(where: str, relations: Sequence[Relation], server: Server, config: Config) -> Iterator[Finding]:
    """Say which relations stand where ours belong, or are ours and out of reach."""
    if foreign := [str(one.name) for one in relations if not one.of(OURS)]:
        yield Finding.error(
            where, f"these exist and are not cdcsync's: {named(foreign)}", "name another schema with target.schema"
        )
    unowned = [one for one in relations if one.of(OURS) and not one.owned]
    for owner in sorted({one.owner for one in unowned}):
        theirs = named(str(one.name) for one in unowned if one.owner == owner)
        yield Finding.error(
            where,
            f"the role {quote(server.role)} does not own {theirs}",
            f"connect as {quote(owner)}, or hand all of it over, as an administrator of the target:"
            f" {_handing_over(owner, server, config)}",
        )


def _handing_over(owner: str, server: Server, config: Config) -> str:
    """Return the command that makes the worker's role the owner of what another role made in its place."""
    variables = {"target_role": server.role, "former_role": owner}
    if config.target.schema != Target().schema:
        variables["schema"] = config.target.schema
    schemas = sorted({index.view_name.schema for index in config.indexes.values()})
    if "public" not in schemas:
        variables["view_schema"] = schemas[0]
    options = [part for name, value in variables.items() for part in ("-v", f"{name}={value}")]
    command = f"cdcsync config roles | {shlex.join(['psql', '-d', server.database, *options])}"
    # The script grants in these.
    granted = {config.target.schema, variables.get("view_schema", "public")}
    if more := [schema for schema in schemas if schema not in granted]:
        grant = f"GRANT USAGE, CREATE ON SCHEMA {', '.join(map(quote, more))} TO {quote(server.role)}"
        # Before the views are handed over: an administrator who is no superuser may hand one only to a role that could
        # create it in its schema.
        command = f"{shlex.join(['psql', '-d', server.database, '-c', grant])} && {command}"
    return command
