"""One reading of both servers, by any process: nothing is written, nothing is asked of the worker.

The source is read before the target. The checkpoint that is found was then reached after the end of the WAL that it is
compared with, so a lag of 0 is never claimed wrongly; and a slot that was ahead of the checkpoint truly is.

Source: PostgreSQL, "pg_replication_slots"; "pg_locks".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import cast

import msgspec
from psycopg import sql

from cdcsync.config import Config, model_name
from cdcsync.errors import SourceUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.embedding import EmbedderState, Probe
from cdcsync.postgres.sessions import Connection, speaking_of
from cdcsync.source.catalog import Slot, current_lsn, read_slot, why_lost
from cdcsync.status.counting import count_index
from cdcsync.status.generations import read_generations
from cdcsync.status.headline import with_headlines
from cdcsync.status.model import (
    VERSION,
    BackfillState,
    BackfillStatus,
    EmbedderStatus,
    IndexStatus,
    SlotStatus,
    Status,
    WorkerStatus,
)
from cdcsync.status.progress import progress
from cdcsync.target import embedders, evaluations, judged_runs, settling
from cdcsync.target.audits import TABLE as AUDITS
from cdcsync.target.audits import Audits
from cdcsync.target.ddl.relations import Names
from cdcsync.target.failures.documents import TABLE, Listed, count_failed
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.pipelines import Pipelines, PipelineState
from cdcsync.target.registry import Entry, Registry
from cdcsync.target.requests.history import History
from cdcsync.target.version import require_upgraded

FRESH = timedelta(seconds=15)
"""How long a worker's word holds that nothing was left to apply. An idle worker gives it every 10 s."""

SAME_WRITE = timedelta(milliseconds=1)
"""Two readings of the clock in one UPDATE are microseconds apart, those of two commits are further."""

_GAP_REMEDY = 'docs/operations.md, "After a gap", says how to continue'


async def read_status(config: Config, source: Connection | None, target: Connection) -> Status:
    """Read the status from both servers.

    :param source: None when the source cannot be reached; what only it knows is None then.
    :param target: a connection in autocommit that nobody else uses meanwhile.
    :raises TargetUnavailable: the target does not answer now.
    :raises SetupError: the role may not read our tables, or the source's slots.
    """
    problems: list[str] = []
    end, slot = await _read_source(config, source)
    if end is None:
        problems.append("the source cannot be reached, so lag and slot are unknown: check that it runs")
    schema, name = config.target.schema, config.source.slot
    with speaking_of("target"):
        await require_upgraded(target, schema)
        present = await _relations(target, schema)
        pipelines = Pipelines(schema, name)
        set_up = {"pipelines", "indexes", "backfills"} <= present
        state = await pipelines.read(target) if set_up else None
        holder = await pipelines.holder(target)
        now, since = await _clock(target, holder)
        worker = WorkerStatus(None if state is None else state.worker, holder is not None, since)
        stored = _Indexes()
        if state is None:
            problems.append(f"schema {schema} of the target holds no pipeline {name}: run `cdcsync run` first")
        else:
            problems += _worker_problems(config, slot if end is not None else None, worker)
            if end is not None:
                problems += _slot_problems(name, slot, state)
            stored = await _read_indexes(target, config, present, now, problems)
        known = await _read_embedders(target, config, present, worker, now, problems)
    lag = _lag(end, state, worker, stored.oldest, now)
    status = Status(
        version=VERSION,
        read_at=now,
        pipeline=name,
        publication=config.source.publication,
        checkpoint=None if state is None or state.checkpoint is None else str(state.checkpoint),
        lag_bytes=lag.bytes,
        lag_seconds=lag.seconds,
        caught_up=lag.caught_up,
        slot=None if slot is None else _slot_status(slot),
        worker=worker,
        embedders=known,
        indexes={index: stored.found.get(index) or _absent(config, index) for index in config.indexes},
        problems=problems,
    )
    return with_headlines(status, config.worker.ready_max_lag_s)


# -- source and worker ------------------------------------------------------------------------------------------


async def _read_source(config: Config, source: Connection | None) -> tuple[Lsn | None, Slot | None]:
    """Return the end of the source's WAL, None when it does not answer, and the slot."""
    if source is None:
        return None, None
    try:
        with speaking_of("source"):
            return await current_lsn(source), await read_slot(source, config.source.slot)
    except SourceUnavailable:
        return None, None


def _slot_status(slot: Slot) -> SlotStatus:
    return SlotStatus(
        name=slot.name,
        active=slot.active_pid is not None,
        wal_status=slot.wal_status,
        retained_bytes=slot.retained_bytes,
        safe_bytes=slot.safe_bytes,
        confirmed_flush=None if slot.confirmed_flush is None else str(slot.confirmed_flush),
    )


def _worker_problems(config: Config, slot: Slot | None, worker: WorkerStatus) -> Iterator[str]:
    if not worker.running:
        yield f"no worker runs for slot {config.source.slot}: start `cdcsync run`"
    if slot is None:
        return
    if slot.active_pid is not None and not worker.running:
        yield f"slot {slot.name} is read by a process that is not this pipeline's worker: source pid {slot.active_pid}"
    if slot.active_pid is None and worker.running:
        yield f"worker {worker.name} runs and is not reading slot {slot.name}: its log says why"


def _slot_problems(name: str, slot: Slot | None, state: PipelineState) -> Iterator[str]:
    if slot is None:
        if state.checkpoint is not None:
            yield f"slot {name} is gone, and with it the changes since {state.checkpoint}: {_GAP_REMEDY}"
        return
    if slot.wal_status == "lost":
        yield f"slot {name} has lost WAL that the index needs ({why_lost(slot)}): {_GAP_REMEDY}"
    elif slot.wal_status == "unreserved":
        yield (
            f"slot {name} holds more WAL than max_slot_wal_keep_size and is lost at the source's next checkpoint:"
            " let the worker catch up, or raise the setting"
        )
    if slot.confirmed_flush is not None and state.checkpoint is not None and slot.confirmed_flush > state.checkpoint:
        yield f"slot {name} is ahead of the checkpoint, at {slot.confirmed_flush}: {_GAP_REMEDY}"


# -- target -----------------------------------------------------------------------------------------------------


async def _relations(target: Connection, schema: str) -> set[str]:
    cursor = await target.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)", [schema]
    )
    return {cast(str, row[0]) for row in await cursor.fetchall()}


async def _readable(target: Connection, schema: str, tables: set[str], problems: list[str]) -> set[str]:
    """Return which of these tables the role may read: one that was granted others by name need not have newer ones."""
    readable = set()
    for name in sorted(tables):
        table = sql.Identifier(schema, name).as_string(target)
        cursor = await target.execute("SELECT has_table_privilege(%s::regclass, 'SELECT')", [table])
        if await cursor.fetchone() == (True,):
            readable.add(name)
        else:
            problems.append(f"this role may not read {table}, and what it tells is left out: GRANT SELECT ON {table}")
    return readable


async def _clock(target: Connection, holder: int | None) -> tuple[datetime, datetime | None]:
    """Return the target's time, which its rows are stamped with, and since when the lock's session exists."""
    cursor = await target.execute(
        "SELECT clock_timestamp(), (SELECT backend_start FROM pg_stat_activity WHERE pid = %s)", [holder]
    )
    return cast(tuple[datetime, datetime | None], await cursor.fetchone())


class _Lag(msgspec.Struct, frozen=True):
    bytes: int | None = None
    seconds: float | None = None
    caught_up: bool | None = None


def _lag(
    end: Lsn | None, state: PipelineState | None, worker: WorkerStatus, begun: datetime | None, now: datetime
) -> _Lag:
    """Return how far the index is behind the source.

    The end of the WAL is seldom the checkpoint itself: other databases write too, and so do we. So a worker that said
    moments ago that nothing was left counts as caught up. Otherwise the lag is the time since it last said so.
    """
    if end is None or state is None:
        return _Lag()
    if state.checkpoint is None:
        return _Lag(caught_up=False)
    behind = end.bytes_since(state.checkpoint)
    said = state.caught_up_at
    nothing_left = said is not None and state.updated_at - said < SAME_WRITE and now - said < FRESH
    if behind == 0 or (worker.running and nothing_left):
        return _Lag(behind, 0.0, True)
    start = said or begun
    return _Lag(behind, None if start is None else round(max(0.0, (now - start).total_seconds()), 3), False)


# -- indexes ----------------------------------------------------------------------------------------------------


class _Indexes(msgspec.Struct, frozen=True):
    """The indexes that are stored, and when the oldest of them was made."""

    found: dict[str, IndexStatus] = {}
    oldest: datetime | None = None


async def _read_indexes(
    target: Connection, config: Config, present: set[str], now: datetime, problems: list[str]
) -> _Indexes:
    schema, slot = config.target.schema, config.source.slot
    stored = (await Registry(schema).all(target)).values()
    entries = [entry for entry in stored if entry.slot == slot or entry.name in config.indexes]
    backfills = await _read_backfills(target, schema, list(config.indexes), now, problems)
    notes = {TABLE, evaluations.TABLE, judged_runs.TABLE, settling.TABLE, AUDITS}
    readable = await _readable(target, schema, notes & present, problems)
    tiers = await settling.noted(target, schema) if settling.TABLE in readable else {}
    left_out = await count_failed(target, schema) if TABLE in readable else {}
    recalls = {}
    if evaluations.TABLE in readable:
        recalls = await evaluations.latest(target, schema, {entry.name: entry.generation for entry in entries})
    judged: dict[str, list[judged_runs.Outcome]] = {}
    if judged_runs.TABLE in readable:
        judged = await judged_runs.outcomes(target, schema, list(config.indexes))
    audited = await Audits(schema).all(target) if AUDITS in readable else {}
    generations = await Generations(schema).all(target)
    builds = {}
    if any(entry.state == "building" for entry in entries):
        builds = await _builds(target, schema)
    found: dict[str, IndexStatus] = {}
    for entry in entries:
        name, generation = entry.name, entry.generation
        if name not in config.indexes:
            since = "" if entry.unfollowed_at is None else f" since {entry.unfollowed_at:%Y-%m-%d %H:%M} UTC"
            problems.append(
                f"index {name} is not in the configuration, so nothing keeps it in step{since}: put it back, or remove"
                f" it with `cdcsync drop {name}`"
            )
            continue
        if entry.slot != slot:
            problems.append(
                f"index {name} belongs to the pipeline of slot {entry.slot}: give one of the two another name"
            )
        status = IndexStatus(
            *(entry.state, entry.reason, entry.source_table, entry.view_name),
            *(entry.model, entry.dimensions, generation),
            backfill=backfills.get(name),
            recall=recalls.get(name),
            judged=judged.get(name, []),
            embedder=config.indexes[name].embedder,
            related_tables=list(entry.tables[1:]),
            where=entry.where,
            tables=list(entry.members) if config.indexes[name].tables else [],
            since={"building": entry.created_at, "live": entry.live_at, "paused": entry.paused_at}[entry.state],
        )
        if (audit := audited.get(name)) is not None:
            status = msgspec.structs.replace(
                status,
                proven_equal_at=audit.proven_at,
                undecided=audit.proven_without,
                differed_at=audit.found_at,
            )
            if audit.found_at is not None and (audit.proven_at is None or audit.proven_at < audit.found_at):
                problems.append(
                    f"index {name}: the audit found documents that differed from the source, and had them read again;"
                    " the log says of which kind (audit_found). It has not proven the index equal since"
                )
        problems += [f"index {name}: a table is left out: {why}" for _, why in sorted(entry.left_out.items())]
        own = generations.get(name, [])
        live = next((one for one in own if one.generation == generation), None)
        if live is not None and live.embedder is not None:
            status = msgspec.structs.replace(status, embedder=live.embedder)
        problems += _of_other_generations(config, name, generation, own)
        if entry.pause is not None:
            problems.append(f"index {name} is paused: {entry.pause}")
        vectors = f"{name}_vectors_{generation}"
        under_way = [builds[table] for table in (f"{vectors}_settled", f"{name}_chunks") if table in builds]
        if entry.state == "building":
            status = msgspec.structs.replace(status, reason=_waits(entry, under_way))
            if status.reason is not None:
                problems.append(f"index {name} waits to be built: {status.reason}")
        wanted = {f"{name}_chunks", vectors, f"{vectors}_fresh", f"{vectors}_settled", f"{name}_backlog"}
        if missing := sorted(wanted - present):
            lost = f"tables are missing: {', '.join(missing)}"
            problems.append(f"index {name}: {lost}; `cdcsync run` creates them, `cdcsync replay {name}` fills them")
            found[name] = msgspec.structs.replace(status, state="absent", reason=lost)
            continue
        if len(own) > 1:
            measured = evaluations.TABLE in readable
            found_of = await read_generations(target, schema, entry, own, evaluated=measured)
            status = msgspec.structs.replace(status, generations=found_of)
        counts = await count_index(target, Names(schema, name), generation)
        if counts.failed:
            failed = "1 chunk has" if counts.failed == 1 else f"{counts.failed} chunks have"
            problems.append(f"index {name}: {failed} no vector, see `cdcsync failures {name} list`")
        listed = left_out.get(name, Listed())
        seen = tiers.get(name, settling.Noted(0.0, 0.0)) if counts.fresh else None
        problems += _left_out(name, listed)
        found[name] = msgspec.structs.replace(
            status,
            **msgspec.structs.asdict(counts),
            failed_documents=listed.at_least,
            fresh_scan_ms=None if seen is None else _rounded(seen.scan_ms),
            settle_rate=None if seen is None else _rounded(seen.per_s),
        )
        built = builds.get(f"{vectors}_settled", _Build())
        found[name] = msgspec.structs.replace(found[name], progress=progress(found[name], built.blocks))
    if new := [name for name in config.indexes if name not in found]:
        does = "start the worker again with this configuration" if found else "`cdcsync run` does it when it starts"
        problems.append(f"not set up yet: {', '.join(new)}; {does}")
    return _Indexes(found, min((entry.created_at for entry in entries), default=None))


def _of_other_generations(config: Config, name: str, live: int, generations: Sequence[Generation]) -> Iterator[str]:
    """Say what an operator should do about the vectors that an index has beside those that searches use."""
    wanted, names = config.indexes[name].embedder, {one.generation: one.embedder for one in generations}
    for one in generations:
        if one.generation != live and one.embedder not in config.embedders and one.state != "dropping":
            yield (
                f"index {name}: no [embedders] section makes the vectors of generation {one.generation} ({one.model}),"
                f" so what changes gets none there; put it back, or free it: cdcsync migrate {name} drop"
            )
        if one.reason is not None:
            yield (
                f"index {name}: generation {one.generation} could not be filled, which is tried again: {one.reason}; to"
                f" give it up: cdcsync migrate {name} drop"
            )
    if names.get(live) not in (None, wanted) and wanted not in names.values():
        yield (
            f"index {name}: the configuration asks for the embedder {wanted}, and the index goes on with"
            f" {names[live]}; to migrate: cdcsync migrate {name} start"
        )


class _Build(msgspec.Struct, frozen=True):
    """The build of a search index that is under way.

    :ivar blocks: how many blocks it has read, and how many there are.
    :ivar waits_for: the process ID of the session whose transaction it waits for.
    """

    blocks: tuple[int, int] | None = None
    waits_for: int | None = None


def _waits(entry: Entry, builds: Sequence[_Build]) -> str | None:
    """Return why a building index cannot be built right now, and how to help."""
    for build in builds:
        if build.waits_for is not None:
            return (
                f"the build waits for the open transaction of the target's session with pid {build.waits_for}; end"
                " that transaction, or wait for it"
            )
    return None if builds else entry.reason


async def _builds(target: Connection, schema: str) -> dict[str, _Build]:
    """Return the builds of search indexes that are under way, by the name of the table.

    Source: PostgreSQL, "CREATE INDEX Progress Reporting"; pgvector, "Indexing Progress".
    """
    cursor = await target.execute(
        "SELECT c.relname, p.blocks_done, p.blocks_total,"
        " CASE WHEN starts_with(p.phase, 'waiting for ') THEN nullif(p.current_locker_pid, 0) END"
        " FROM pg_stat_progress_create_index AS p JOIN pg_class AS c ON c.oid = p.relid"
        " WHERE p.datname = current_database()"
        " AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %s)",
        [schema],
    )
    return {
        cast(str, name): _Build((done, total) if total else None, pid)
        for name, done, total, pid in await cursor.fetchall()
    }


async def _read_embedders(
    target: Connection,
    config: Config,
    present: set[str],
    worker: WorkerStatus,
    now: datetime,
    problems: list[str],
) -> dict[str, EmbedderStatus]:
    """Return the state of each embedder, by the word of the worker that runs."""
    readable = await _readable(target, config.target.schema, {embedders.TABLE} & present, problems)
    noted = {}
    if readable and worker.running:
        noted = await embedders.read_embedders(target, config.target.schema, config.source.slot)
    probes = await embedders.read_probes(target, config.target.schema, config.source.slot) if readable else {}
    found = {}
    for name in config.embedders:
        state = noted.get(name, EmbedderState())
        trouble, loads = state.problem, state.loads_wait_until
        if trouble is not None:
            problems.append(f"embedder {name}: {trouble}")
        elif loads is not None and loads > now:
            until = f"{loads:%Y-%m-%d %H:%M} UTC"
            problems.append(f"embedder {name}: texts of loads wait until {until}, as tokens_per_day is nearly used up")
        probe = probes.get(name)
        if probe is not None and probe.changed:
            problems.append(f"embedder {name}: {_changed(name, probe)}")
        status = EmbedderStatus(
            tokens_today=state.tokens if state.day == now.astimezone(UTC).date() else 0,
            loads_wait_until=loads,
            model=model_name(config.embedders[name]),
            drift=None if probe is None else round(probe.drift, 6),
            probed_at=None if probe is None else probe.checked_at,
        )
        if trouble is not None:
            status = msgspec.structs.replace(
                status,
                problem=trouble.message,
                hint=trouble.hint,
                since=trouble.since,
                tried_again_at=trouble.until,
            )
        found[name] = status
    return found


def _changed(name: str, probe: Probe) -> str:
    return (
        f"it makes other vectors of the same text than on {probe.made_at:%Y-%m-%d} (cosine distance {probe.drift:.3f}),"
        " so the provider serves another model under the same name: name a fixed version of the model, or embed each of"
        ' its indexes again; docs/embedders.md, "Another model under the same name", says how'
    )


def _left_out(name: str, listed: Listed) -> Iterator[str]:
    if listed.documents or listed.unlisted:
        rows = "1 row is" if listed.documents == 1 else f"{listed.documents} rows are"
        more = ", and more than are listed" if listed.unlisted else ""
        yield f"index {name}: {rows} left out{more}: no document could be made; see `cdcsync failures {name} list`"


def _absent(config: Config, name: str) -> IndexStatus:
    index = config.indexes[name]
    return IndexStatus(
        *("absent", "not set up yet: `cdcsync run` does it", str(index.table_name), str(index.view_name)),
        embedder=index.embedder,
    )


async def _read_backfills(
    target: Connection, schema: str, indexes: list[str], now: datetime, problems: list[str]
) -> dict[str, BackfillStatus]:
    """Return each index's backfill that runs, or else the next one."""
    found = {}
    for one in await History(schema).present(target, indexes):
        if not one.ended:
            rate = None
            if one.state == "running" and one.phase == "rows" and one.rows_done and one.started_at is not None:
                rate = one.rows_done / max(1e-6, (now - one.started_at).total_seconds())
            eta_s = max(0, one.rows_total - one.rows_done) / rate if rate and one.rows_total is not None else None
            found[one.index] = BackfillStatus(
                *(one.id, one.kind, cast(BackfillState, one.state), one.phase, one.rows_done, one.rows_total),
                *(_rounded(rate), _rounded(eta_s)),
            )
        elif one.state == "failed":
            problems.append(
                f"index {one.index}: its last {one.kind} failed ({one.error});"
                f" `cdcsync replay {one.index}` starts another"
            )
    return found


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else round(figure, 1)
