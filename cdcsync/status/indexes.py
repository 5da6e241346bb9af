"""The indexes as the target has them: their states, tables, backfills, builds and what an operator should do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import cast

import msgspec

from cdcsync.config import Config, QualifiedName
from cdcsync.config.names import own_name
from cdcsync.errors import CdcsyncError
from cdcsync.model.pauses import Pause
from cdcsync.postgres.sessions import Connection
from cdcsync.status.builds import Build, Builds, generation_waits, index_waits, read_builds
from cdcsync.status.counting import count_index
from cdcsync.status.generations import hindrance, read_generations
from cdcsync.status.model import (
    BackfillState,
    BackfillStatus,
    IndexStatus,
)
from cdcsync.status.progress import progress
from cdcsync.status.tables import Notes, telling
from cdcsync.target import evaluations, judged_runs, settling
from cdcsync.target.audits import TABLE as AUDITS
from cdcsync.target.audits import Audit, Audits
from cdcsync.target.ddl.relations import Names
from cdcsync.target.entries import Entry
from cdcsync.target.evaluations import Recall
from cdcsync.target.failures.documents import TABLE, Listed, count_failed
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History


class Indexes(msgspec.Struct, frozen=True):
    """The indexes that are stored, and when the oldest of them was made.

    :ivar written: the tables that are written for each index, in all generations, and for its other chunks.
    """

    found: dict[str, IndexStatus] = {}
    oldest: datetime | None = None
    written: dict[str, list[QualifiedName]] = {}


class _Noted(msgspec.Struct, frozen=True):
    """What the tables that all indexes share tell of each; what cannot be read of them is empty.

    :ivar beside: the entries of the chunks that stand beside an index, by the index's name.
    :ivar left_out: rows without a document; None if they cannot be read. The other chunks of an index have a name of
        their own.
    :ivar recalls: None if this role may not know them.
    """

    beside: dict[str, Entry]
    backfills: dict[str, BackfillStatus]
    tiers: dict[str, settling.Noted]
    left_out: dict[str, Listed] | None
    recalls: dict[str, Recall] | None
    judged: dict[str, list[judged_runs.Outcome]]
    audited: dict[str, Audit]
    generations: dict[str, list[Generation]]
    builds: Builds


async def read_indexes(
    target: Connection,
    config: Config,
    present: set[str],
    now: datetime,
    problems: list[str],
    *,
    waiting: Mapping[str, Pause],
) -> Indexes:
    """Return the status of each index of the configuration that is stored, and add their problems to `problems`.

    :param present: the names of the relations in our schema.
    :param waiting: why indexes that have no row of their own yet are paused.
    """
    schema, slot = config.target.schema, config.source.slot
    stored = (await Registry(schema).all(target)).values()
    entries = [entry for entry in stored if not entry.hidden and (entry.slot == slot or entry.name in config.indexes)]
    beside = {own_name(entry.name): entry for entry in stored if entry.hidden}
    noted = await _read_noted(target, config, present, entries, beside, now, problems)
    found: dict[str, IndexStatus] = {}
    for entry in entries:
        if entry.name not in config.indexes:
            since = "" if entry.unfollowed_at is None else f" since {entry.unfollowed_at:%Y-%m-%d %H:%M} UTC"
            problems.append(
                f"index {entry.name} is not in the configuration, so nothing keeps it in step{since}: put it back, or"
                f" remove it with `cdcsync drop {entry.name}`"
            )
            continue
        found[entry.name] = await _read_index(target, config, entry, noted, present, problems)
    for name, pause in waiting.items():
        if name in config.indexes and name not in found:
            problems.append(f"index {name} is paused: {pause}")
            found[name] = msgspec.structs.replace(
                absent(config, name), state="paused", reason=str(pause), since=pause.since
            )
    if new := [name for name in config.indexes if name not in found]:
        does = "start the worker again with this configuration" if found else "`cdcsync run` does it when it starts"
        problems.append(f"not set up yet: {', '.join(new)}; {does}")
    written: dict[str, list[QualifiedName]] = {name: [] for name in found}
    for entry in stored:
        if (name := own_name(entry.name)) in written:
            generations = {entry.generation, *(one.generation for one in noted.generations.get(entry.name, []))}
            written[name] += Names(schema, entry.relations).written(*generations)
            written[name].append(QualifiedName(schema, f"{entry.relations}_words"))
    return Indexes(found, min((entry.created_at for entry in entries), default=None), written)


async def _read_noted(
    target: Connection,
    config: Config,
    present: set[str],
    entries: Sequence[Entry],
    beside: dict[str, Entry],
    now: datetime,
    problems: list[str],
) -> _Noted:
    """Read the tables that all indexes share."""
    schema, names = config.target.schema, list(config.indexes)
    notes = Notes(target, schema, present, problems)
    backfills: dict[str, BackfillStatus] = {}
    generations: dict[str, list[Generation]] = {}
    builds: Builds = {}

    def tell(error: CdcsyncError) -> None:
        problems.append(f"{error.where} cannot be read, and what it tells is left out: {error.with_fix}")

    with telling(target, tell, where=f"{schema}.backfills"):
        backfills = await _read_backfills(target, schema, names, now, problems)
    with telling(target, tell, where=f"{schema}.generations"):
        generations = await Generations(schema).all(target)
    filling = any(one.state == "filling" for some in generations.values() for one in some)
    if filling or any(entry.state == "building" for entry in (*entries, *beside.values())):
        with telling(target, tell, where="pg_stat_progress_create_index"):
            builds = await read_builds(target, schema)
    numbers = {entry.name: entry.generation for entry in entries}
    return _Noted(
        beside=beside,
        backfills=backfills,
        tiers=await notes.read(settling.TABLE, lambda: settling.noted(target, schema)) or {},
        left_out=await notes.read(TABLE, lambda: count_failed(target, schema)) if TABLE in present else {},
        recalls=await notes.read(evaluations.TABLE, lambda: evaluations.latest(target, schema, numbers)),
        judged=await notes.read(judged_runs.TABLE, lambda: judged_runs.outcomes(target, schema, names)) or {},
        audited=await notes.read(AUDITS, lambda: Audits(schema).all(target)) or {},
        generations=generations,
        builds=builds,
    )


async def _read_index(
    target: Connection, config: Config, entry: Entry, noted: _Noted, present: set[str], problems: list[str]
) -> IndexStatus:
    """Return the status of an index, and add its problems to `problems`: one is that its tables cannot be read."""
    name, generation, schema = entry.name, entry.generation, config.target.schema
    if entry.slot != config.source.slot:
        problems.append(f"index {name} belongs to the pipeline of slot {entry.slot}: give one of the two another name")
    listed = (noted.left_out or {}).get(name, Listed())
    status = IndexStatus(
        *(entry.state, entry.reason, entry.source_table, entry.view_name),
        *(entry.model, entry.dimensions, generation),
        backfill=noted.backfills.get(name),
        recall=(noted.recalls or {}).get(name),
        judged=noted.judged.get(name, []),
        embedder=config.indexes[name].embedder,
        related_tables=list(entry.tables[1:]),
        where=entry.where,
        tables=list(entry.members) if config.indexes[name].tables else [],
        since={"building": entry.created_at, "live": entry.live_at, "paused": entry.paused_at}[entry.state],
        failed_documents=None if noted.left_out is None else listed.at_least,
    )
    if (audit := noted.audited.get(name)) is not None:
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
    own, other = noted.generations.get(name, []), noted.beside.get(name)
    if other is not None:
        own = own + noted.generations.get(other.name, [])
        problems += _of_other_chunks(
            name,
            entry,
            other,
            (noted.left_out or {}).get(other.name, Listed()),
            index_waits(other, noted.builds),
        )
    live = next((one for one in own if one.generation == generation), None)
    if live is not None and live.embedder is not None:
        status = msgspec.structs.replace(status, embedder=live.embedder)
    problems += _of_other_generations(config, entry, own, noted.builds)
    if entry.pause is not None:
        problems.append(f"index {name} is paused: {entry.pause}")
    if entry.state == "building":
        status = msgspec.structs.replace(status, reason=index_waits(entry, noted.builds))
        if status.reason is not None:
            problems.append(f"index {name} waits to be built: {status.reason}")
    stem = entry.relations
    vectors = f"{stem}_vectors_{generation}"
    wanted = {f"{stem}_chunks", vectors, f"{vectors}_fresh", f"{vectors}_settled", f"{stem}_backlog"}
    if missing := sorted(wanted - present):
        lost = f"tables are missing: {', '.join(missing)}"
        problems.append(f"index {name}: {lost}; `cdcsync run` creates them, `cdcsync replay {name}` fills them")
        return msgspec.structs.replace(status, state="absent", reason=lost)
    problems += _left_out(name, listed)
    unreadable: list[CdcsyncError] = []
    with telling(target, unreadable.append, where=f"index {name}"):
        status = await _counted(target, schema, entry, status, own, noted)
        if status.failed:
            failed = "1 chunk has" if status.failed == 1 else f"{status.failed} chunks have"
            problems.append(f"index {name}: {failed} no vector, see `cdcsync failures {name} list`")
    for error in unreadable:
        problems.append(f"index {name} cannot be read, so its figures are not known: {error.with_fix}")
        status = msgspec.structs.replace(status, unreadable=error.with_fix)
    return status


async def _counted(
    target: Connection, schema: str, entry: Entry, status: IndexStatus, own: Sequence[Generation], noted: _Noted
) -> IndexStatus:
    """Return the status of an index with the figures of its tables."""
    if len(own) > 1:
        other = noted.beside.get(entry.name)
        of_other = (noted.left_out or {}).get(other.name, Listed()) if other is not None else Listed()
        measured = noted.recalls is not None
        generations = await read_generations(
            target, schema, entry, own, noted.builds, other=other, left_out=of_other, evaluated=measured
        )
        status = msgspec.structs.replace(status, generations=generations)
    counts = await count_index(target, Names(schema, entry.relations), entry.generation, filled=True)
    seen = noted.tiers.get(entry.name, settling.Noted(0.0, 0.0)) if counts.fresh else None
    status = msgspec.structs.replace(
        status,
        **msgspec.structs.asdict(counts),
        fresh_scan_ms=None if seen is None else _rounded(seen.scan_ms),
        settle_rate=None if seen is None else _rounded(seen.per_s),
    )
    built = noted.builds.get(Names(schema, entry.relations).settled_name(entry.generation), Build())
    return msgspec.structs.replace(status, progress=progress(status, built.blocks))


def _of_other_generations(
    config: Config, entry: Entry, generations: Sequence[Generation], builds: Builds
) -> Iterator[str]:
    """Say what an operator should do about the vectors that an index has beside those that searches use."""
    name, live = entry.name, entry.generation
    wanted, names = config.indexes[name].embedder, {one.generation: one.embedder for one in generations}
    for one in generations:
        if one.generation != live and one.embedder not in config.embedders and one.state != "dropping":
            yield (
                f"index {name}: no [embedders] section makes the vectors of generation {one.generation} ({one.model}),"
                f" so what changes gets none there; put it back, or free it: cdcsync migrate {name} drop"
            )
        if not one.of_other_chunks and (reason := generation_waits(entry, one, builds)) is not None:
            give_up = f"; to give it up: cdcsync migrate {name} drop" if one.state == "filling" else ""
            yield f"index {name}: {hindrance(one.generation, reason)}{give_up}"
    if names.get(live) not in (None, wanted) and wanted not in names.values():
        yield (
            f"index {name}: the configuration asks for the embedder {wanted}, and the index continues with"
            f" {names[live]}; to migrate: cdcsync migrate {name} start"
        )


def _of_other_chunks(name: str, entry: Entry, other: Entry, listed: Listed, why: str | None) -> Iterator[str]:
    """Say what an operator should do about the chunks that stand beside an index; what both have is said once.

    :param why: why they cannot be built now, where that is so.
    """
    which = f"generation {other.generation}, which has chunks of its own,"
    if other.pause is not None and (entry.pause is None or other.pause.reason != entry.pause.reason):
        yield f"index {name}: {which} is paused: {other.pause}"
    elif other.state == "building" and why is not None:
        yield f"index {name}: {which} waits to be built: {why}"
    yield from _left_out(name, listed, of=f" of generation {other.generation}")


def _left_out(name: str, listed: Listed, *, of: str = "") -> Iterator[str]:
    if listed.documents or listed.unlisted:
        rows = "1 row is" if listed.documents == 1 else f"{listed.documents} rows are"
        more = ", and more than are listed" if listed.unlisted else ""
        yield f"index {name}: {rows} left out{more}: no document{of} could be made; see `cdcsync failures {name} list`"


def absent(config: Config, name: str) -> IndexStatus:
    """Return the status of an index that `run` has yet to set up."""
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
                passed = (now - one.started_at).total_seconds()
                rate = one.rows_done / passed if passed > 0 else None
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
