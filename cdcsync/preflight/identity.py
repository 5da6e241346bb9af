"""Which server the source is: that which a pipeline has followed, one that was promoted in its place, or another.

Source: PostgreSQL, "System Information Functions" (pg_control_system).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.config import Config
from cdcsync.errors import AnotherServer, SourceUnavailable
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.pipelines import Pipelines, PipelineState

_FOLLOW = (
    "cdcsync plan --approve-source: the worker then reads everything again with a new slot; docs/operations.md,"
    ' "After a gap", says what that costs'
)


async def connect_followed(config: Config, target: Connection, *, application_name: str) -> WatchedConnection:
    """Open a session with the host of `source.dsn` that the pipeline in a target follows. The caller closes it.

    :raises AnotherServer, SourceUnavailable, SetupError: as `connect_source`.
    """
    return await connect_source(config, await known_state(target, config), application_name=application_name)


async def known_state(target: Connection, config: Config) -> PipelineState | None:
    """Return the stored state of the pipeline; None if it never began."""
    with speaking_of("target"):
        table = sql.Identifier(config.target.schema, "pipelines").as_string(target)
        if not await fetch_value(target, "SELECT to_regclass(%s) IS NOT NULL", [table]):
            return None
        return await Pipelines(config.target.schema, config.source.slot).read(target)


async def connect_source(config: Config, state: PipelineState | None, *, application_name: str) -> WatchedConnection:
    """Open a session with the host of `source.dsn` that a pipeline follows. The caller closes it.

    :param state: of the pipeline; None if there is none yet.
    :raises AnotherServer: no host is its server, and all of them answer.
    :raises SourceUnavailable, SetupError: as `connect`; or it is a standby.
    """

    async def right(connection: WatchedConnection) -> None:
        assert connection.backend is not None
        if connection.backend.standby:
            raise standby()
        refuse_elsewhere(connection, state, config)

    return await connect(config.source.dsn, "source", application_name=application_name, right=right)


def refuse_elsewhere(source: WatchedConnection, state: PipelineState | None, config: Config) -> None:
    """Refuse a session with another server than a pipeline follows, as far as the server tells which one it is.

    :raises AnotherServer: it is one.
    """
    backend, info = source.backend, source.info
    if state is not None and backend is not None and backend.system is not None and backend.timeline is not None:
        refuse_another_server(
            f"{info.host}:{info.port}", state, backend.system, backend.timeline, config.source.slot, follow=True
        )


def standby() -> SourceUnavailable:
    """Return the error of a server that is a standby: its view of slots and WAL is only older."""
    return SourceUnavailable(
        "the server is a standby just now",
        where="source.dsn",
        hint="name all hosts, and add target_session_attrs=primary, to go straight to the primary",
    )


def refuse_another_server(
    address: str, state: PipelineState, system: str, timeline: int, name: str, *, follow: bool = False
) -> None:
    """Refuse a server that is not the one we followed, nor one that was promoted in its place.

    That holds as well while a pipeline has no checkpoint: it may be in the middle of a resync.

    :param system: the server's system identifier.
    :param follow: whether one that somebody approved is not refused.
    :raises AnotherServer: it is one.
    """
    server = f"{system}/{timeline}"
    where, approved = f"slot {name}, checkpoint {state.checkpoint}", state.approved_source == server
    if approved and follow:
        return
    if state.system_identifier is not None and state.system_identifier != system:
        raise AnotherServer(
            f"this is another cluster than before ({address} has the system identifier {system}, and it was"
            f" {state.system_identifier}): pg_upgrade made a new cluster of the old one, or source.dsn leads elsewhere",
            where=where,
            hint=f"after pg_upgrade, or to follow this cluster from now on, {_FOLLOW}; if source.dsn leads elsewhere,"
            " point it at the old cluster; if this is the source of another pipeline, give it a slot of its own with"
            " source.slot",
            server=server,
            approved=approved,
        )
    if state.timeline is not None and timeline < state.timeline:
        raise AnotherServer(
            f"the source is on timeline {timeline}, and the index has followed timeline {state.timeline}:"
            f" {address} was left behind by a promotion, or restored",
            where=where,
            hint="point source.dsn at the present primary alone, or stop this server, if it was left behind; to follow"
            f" it from now on, {_FOLLOW}",
            server=server,
            approved=approved,
        )
