"""The watch: what the stream does not tell, asked of the source from time to time while it flows.

    tables     can each index follow its table, and is the table, and what has it sent, what it was
    relations  has the target all that each index should have there, and are our tables still of our version

The tables are read all at once, and judged by the functions that `check` uses: an index that `check` would refuse is
paused, and one that was paused is resumed once `check` would accept it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import anyio
import msgspec
import structlog

from cdcsync.backoff import Backoff, Failure
from cdcsync.config import Config
from cdcsync.config.names import beside_name, own_name
from cdcsync.errors import (
    IndexFault,
    RunError,
    SetupError,
    TablesChanged,
    Unavailable,
)
from cdcsync.flows.build import pause_after
from cdcsync.flows.setup.differences import (
    ask_for,
    difference_of,
    note_fingerprint,
    present_fingerprint,
    stored_fingerprint,
)
from cdcsync.flows.setup.indexes import outdated
from cdcsync.flows.truncations import Truncations
from cdcsync.logs import Told
from cdcsync.lsn import Lsn
from cdcsync.model.pauses import Pause, Pauses
from cdcsync.model.requests import Request
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import exclusive_locks
from cdcsync.postgres.sessions import Session
from cdcsync.preflight import Finding
from cdcsync.preflight.families import followed_catalog
from cdcsync.preflight.following import following_findings, seen_fingerprint
from cdcsync.preflight.indexes import Plan, vector_faults
from cdcsync.preflight.surroundings import surrounding_findings
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import Catalog, read_catalog
from cdcsync.target.approvals import Approvals
from cdcsync.target.ddl.grants import settings_to_note
from cdcsync.target.ddl.missing import missing_relations, unsafe_tables
from cdcsync.target.ddl.searching import RENAMED, search_outdated
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation, Generations, any_ends
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History
from cdcsync.target.version import read_version, refusal

log = structlog.get_logger()

WATCH_S = 5.0
"""How often the catalog is asked."""

NUDGED_S = 0.05
"""How long after a nudge it is asked: a commit may be delivered a moment before it is visible."""

AWAITED_S = 1.0
"""How often it is asked while the stream may still bring a TRUNCATE that would explain what was seen."""

RELATIONS_S = 60.0
"""How often it is looked whether somebody dropped a relation of an index in the target."""


class _Stored(msgspec.Struct, frozen=True):
    """The rows of the indexes, and the last load of each, as they are stored now."""

    entries: dict[str, Entry]
    loads: Mapping[str, Request]


class Watch:
    """Watches the tables of all configured indexes, those that are followed and those that are paused."""

    def __init__(
        self,
        config: Config,
        plans: Sequence[Plan],
        specs: Sequence[IndexSpec],
        pauses: Pauses,
        pause: Callable[[IndexFault], None],
        *,
        deliveries: Mapping[str, Deliveries],
        received: Callable[[], Lsn],
        unapproved: Mapping[str, str],
    ) -> None:
        """Make the watch of a pipeline.

        :param plans: the facts known about each configured index.
        :param specs: the indexes that are followed.
        :param pause: takes the reason why an index that is followed has to be paused.
        :param deliveries: what the stream has delivered for each index.
        :param received: says how far the stream has been received.
        :param unapproved: the changes that indexes wait for an approval of.
        """
        self._config = config
        self._plans = plans
        self._specs = {spec.name: spec for spec in specs}
        self._pauses = pauses
        self._pause = pause
        self._truncations = Truncations(deliveries, received)
        self._unapproved = unapproved
        self._ailing = {plan.name for plan in plans if plan.unfit}
        """The indexes whose tables had a fault when they were last looked at."""
        self._noted: set[str] = set()
        """The followed indexes whose loads were found to have failed."""
        self._relations_due = anyio.current_time() + RELATIONS_S
        for plan in plans:
            # A start logs what its examination warns of, as the watch does.
            logged = {_known_by(one, plan.name) for one in plan.findings if one.level == "warning" and not one.fails}
            pauses.warned.setdefault(plan.name, logged)
        self._nudged = anyio.Event()
        self._surroundings: dict[str, list[Finding]] = {}
        """What was found in the target when it was last looked at, by index."""
        self.problems: dict[str, str] = {}
        """Harm that the publication does to the application's writes, by index."""

    def look(self) -> None:
        """Look at the tables now: the stream has described one of them again."""
        self._nudged.set()

    async def run(self) -> None:
        """Watch the tables until cancelled.

        :raises TablesChanged: an index needs to be examined again, or can be followed again.
        :raises RunError: a newer version of cdcsync has upgraded our tables.
        """
        told = Told()

        def failed(failure: Failure) -> None:
            if told.anew(failure.error):
                log.warning("watch_waits", error=str(failure.error), fix=failure.error.hint)

        # A table that is dropped while its columns are read is an error of the set-up; the next look tells more.
        backoff = Backoff(failed, most=WATCH_S, errors=(Unavailable, SetupError), waits="the tables are not watched")
        async with (
            Session(self._config.source.dsn, "source", application_name="cdcsync watch") as source,
            Session(self._config.target.dsn, "target", application_name="cdcsync watch") as target,
        ):
            while True:
                self._nudged = anyio.Event()
                async with backoff:
                    # Whoever asks for something in the target need not wait for the source.
                    stored = await self._look_at_target(target)
                    await self._look_at_tables(source, target, stored)
                    backoff.succeeded()
                    told.over()
                    with anyio.move_on_after(AWAITED_S if self._truncations.awaited else WATCH_S):
                        await self._nudged.wait()
                        await anyio.sleep(NUDGED_S)

    async def _look_at_target(self, target: Session) -> _Stored:
        """Return what is stored of the indexes, and see that nobody asks for anything that only a start can do.

        :raises TablesChanged: somebody does.
        :raises RunError: a newer version of cdcsync has upgraded our tables.
        """
        schema = self._config.target.schema
        with speaking_of("target"):
            connection = await target.connection()
            if (newer := refusal(schema, await read_version(connection, schema))) is not None:
                raise RunError.of(newer)
            entries = await Registry(schema).all(connection)
            generations = await Generations(schema).all(connection)
            loads = await History(schema).last_loads(connection)
        for plan in self._plans:
            if (entry := entries.get(plan.name)) is not None:
                self._look_beside(plan.name, entries, generations)
                if plan.name in self._specs and entry.state != "paused":
                    self._look_at_generations(self._specs[plan.name], entry, generations.get(plan.name, []))
        return _Stored(entries, loads)

    async def _look_at_tables(self, source: Session, target: Session, stored: _Stored) -> None:
        config, entries, loads = self._config, stored.entries, stored.loads
        known = [oid for entry in entries.values() for oid in entry.oids.values()]
        wanted = {table for plan in self._plans for table in plan.index.followed}
        with speaking_of("source"):
            expressions = {text for plan in self._plans for text in plan.index.expressions}
            catalog = await read_catalog(
                await source.connection(), config.source.publication, wanted, known, expressions
            )
        wanted = set(catalog.single(wanted))
        for plan in self._plans:
            entry = entries.get(plan.name)
            if plan.locked:
                await self._look_at_locks(source, catalog, plan)
            if entry is None:
                self._look_at_new(plan.name)
                continue
            seen = followed_catalog(plan, catalog, wanted, entry)
            findings = following_findings(plan, seen, wanted, entry)
            error = next((finding for finding in findings if finding.level == "error"), None)
            if error is not None and error.locked:
                continue  # nothing can be said of it now
            if plan.name not in self._surroundings or anyio.current_time() >= self._relations_due:
                with speaking_of("target", where=f"index {plan.name}", index=plan.name):
                    around = await surrounding_findings(await target.connection(), config, plan, entry, catalog)
                self._surroundings[plan.name] = around
            self._note_problems(plan.name, [*findings, *self._surroundings.get(plan.name, ())])
            if plan.name in self._specs and entry.state == "live" and plan.name in loads:
                entry = await self._look_at_load(target, entry, loads[plan.name])
            if entry.state != "paused":
                self._pauses.seen.pop(plan.name, None)
            if plan.name in self._specs and entry.state != "paused":
                members = set(seen.members.get(plan.index.table_name, ()))
                if error is None and (
                    members != self._specs[plan.name].members.keys() or plan.reasons != entry.left_out
                ):
                    raise TablesChanged("tables appeared or went", where=f"index {plan.name}")
                await self._look_at_followed(source, target, self._specs[plan.name], entry, seen, error)
            elif entry.state == "paused":
                await self._look_at_paused(target, plan, entry, seen, error)
            if error is None:
                self._ailing.discard(plan.name)
            else:
                self._ailing.add(plan.name)
        if anyio.current_time() >= self._relations_due:
            self._relations_due = anyio.current_time() + RELATIONS_S

    async def _look_at_locks(self, source: Session, catalog: Catalog, plan: Plan) -> None:
        """See whether the tables of an index that could not be examined are still locked.

        :raises TablesChanged: they are not.
        """
        with speaking_of("source"):
            locks = await exclusive_locks(await source.connection(), catalog.single(plan.index.followed))
        if not locks:
            self._pauses.heal(plan.name)
            raise TablesChanged("nobody holds its tables locked any more", where=f"index {plan.name}")

    def _look_at_new(self, index: str) -> None:
        """See that an index that could not be set up is tried again.

        :raises TablesChanged: it is time for that.
        """
        if index not in self._specs and self._pauses.due(index, anyio.current_time()):
            raise TablesChanged("it may be set up now", where=f"index {index}")

    async def _look_at_load(self, target: Session, entry: Entry, load: Request) -> Entry:
        """Pause a live index that was to be read again, after a gap for one, and that has not been; returns its entry.

        One that is loaded for the first time is `flows/build`'s.
        """
        pause = pause_after(load)
        if pause is None:
            return entry
        registry = Registry(self._config.target.schema)
        with speaking_of("target", where=f"index {entry.name}", index=entry.name):
            await registry.pause(await target.connection(), entry.name, pause)
            crash_point("failed load noted")
        log.error("load_ended", index=entry.name, state=load.state)
        return msgspec.structs.replace(entry, state="paused", reason=str(pause))

    def _look_at_generations(self, spec: IndexSpec, entry: Entry, generations: Sequence[Generation]) -> None:
        """See that the index has the generations of vectors that this pipeline writes, and searches use the same one.

        :raises TablesChanged: a migration has begun, was activated, rolled back or ended.
        """
        wanted = {one.generation for one in generations if one.state != "dropping"} | {entry.generation}
        dropping = any_ends(generations)
        other = (entry.generation, entry.stem) != (spec.generation, spec.stem)
        if other or wanted != {one.generation for one in spec.generations} or dropping:
            raise TablesChanged("the index has other generations of vectors", where=f"index {spec.name}")

    def _look_beside(
        self, index: str, entries: Mapping[str, Entry], generations: Mapping[str, Sequence[Generation]]
    ) -> None:
        """See that what stands beside an index is followed, and that nobody asks for its activation, or its end.

        :raises TablesChanged: it is not, or somebody does.
        """
        name = beside_name(index)
        other, known = entries.get(name), any(plan.name == name for plan in self._plans)
        asked = other is not None and other.activation_asked_at is not None
        ends = other is not None and any_ends(generations.get(name, ()))
        if (other is not None) != known or asked or ends:
            raise TablesChanged("a migration to other chunks has moved on", where=f"index {index}")

    def _note_problems(self, index: str, findings: Sequence[Finding]) -> None:
        """Note what fails by the table's fault, and log each warning once for as long as there is reason for it."""
        known = self._pauses.warned
        warnings = {_known_by(one, index): one for one in findings if one.level == "warning"}
        if index != own_name(index):
            # The other side of the index has the same table.
            warnings = {by: one for by, one in warnings.items() if by not in known.get(own_name(index), ())}
        anew = [one for by, one in warnings.items() if by not in known.get(index, ())]
        known[index] = set(warnings)
        self.problems.pop(index, None)
        if failing := [one.said for one in warnings.values() if one.fails]:
            self.problems[index] = "; ".join(failing)
        if said := [one.said for one in anew if one.fails]:
            log.error("writes_fail", index=index, problems=said)
        for one in anew:
            if not one.fails:
                log.warning("preflight", where=one.where, problem=one.message, fix=one.hint)

    async def _look_at_followed(
        self, source: Session, target: Session, spec: IndexSpec, entry: Entry, catalog: Catalog, error: Finding | None
    ) -> None:
        if error is not None:
            if spec.name not in self._ailing:
                where = str(spec.shape.table)
                self._pause(IndexFault(error.sentence, index=spec.name, where=where, hint=error.hint, passing=True))
            return
        if outdated(catalog, [spec]):
            raise TablesChanged("the table, or how it is sent, is not what it was", where=f"index {spec.name}")
        if entry.state == "live" and anyio.current_time() >= self._relations_due:
            schema = self._config.target.schema
            with speaking_of("target", where=f"index {spec.name}", index=spec.name):
                connection = await target.connection()
                if missing := await missing_relations(connection, schema, spec):
                    raise TablesChanged(str(missing), where=f"index {spec.name}")
                if await search_outdated(connection, schema, spec):
                    raise TablesChanged(RENAMED, where=f"index {spec.name}")
                settings = await settings_to_note(connection, schema, spec.name)
                await Registry(schema).note_settings(connection, spec.name, settings)
                crash_point("settings noted")
        now = present_fingerprint(catalog, spec)
        if now is None or now == stored_fingerprint(entry):
            return
        found = difference_of(catalog, spec, entry, now)
        if found.reread or found.called:
            raise TablesChanged(found.reread or found.compare or "", where=f"index {spec.name}")
        said = [await self._truncations.explain(source, spec, one) for one in found.emptied]
        if None in said and False not in said:
            return
        if said and all(said):
            found = msgspec.structs.replace(found, compare=None)
        self._truncations.forget(spec.name)
        schema = self._config.target.schema
        with speaking_of("target", where=f"index {spec.name}", index=spec.name):
            connection = await target.connection()
            async with connection.transaction():
                # If the stream has brought rows of another partition since, the next look will see that.
                if await note_fingerprint(connection, schema, spec.name, now, before=entry):
                    await ask_for(connection, schema, spec.name, found)
                crash_point("difference written")
            crash_point("difference committed")

    async def _look_at_paused(
        self, target: Session, plan: Plan, entry: Entry, catalog: Catalog, error: Finding | None
    ) -> None:
        """Resume an index whose cause is gone; where nothing tells that, try it from time to time."""
        now, name = anyio.current_time(), plan.name
        if error is not None:
            pause = Pause(error.sentence, error.hint)
            if name in self._specs or entry.reason == str(pause):
                return
            # Only the present faults have to be corrected.
            with speaking_of("target", where=f"index {name}", index=name):
                await Registry(self._config.target.schema).pause(await target.connection(), name, pause)
                crash_point("reason of a pause corrected")
            return
        if name in self._unapproved:
            with speaking_of("target", where=f"index {name}"):
                approvals = Approvals(self._config.target.schema)
                if await approvals.given(await target.connection(), name, self._unapproved[name]):
                    raise TablesChanged("what it embeds is approved", where=f"index {name}")
            return
        if now >= self._relations_due:
            with speaking_of("target", where=f"index {name}"):
                unsafe = bool(
                    await unsafe_tables(await target.connection(), self._config.target.schema, entry.relations)
                )
            if not unsafe and name in self._pauses.unsafe:
                self._pauses.heal(name)
            (self._pauses.unsafe.add if unsafe else self._pauses.unsafe.discard)(name)
        present = seen_fingerprint(plan, catalog, entry)
        # The stored one would not do: an index that cannot be set up keeps it, and it may be an earlier version's.
        changed = present != self._pauses.seen.get(name, plan.seen)
        self._pauses.seen[name] = present
        migrated = bool(plan.unlike) and not any(vector_faults(plan, entry))
        if name in self._ailing or changed or migrated:
            self._pauses.heal(name)
        elif name in self._specs and name not in self._noted:
            # A load of it has ended without success.
            self._noted.add(name)
            self._pauses.note_standing(name, now)
        if self._pauses.due(name, now) and entry.pause is not None and not entry.pause.needs_a_start:
            raise TablesChanged("it may be followed again", where=f"index {name}")


def _known_by(finding: Finding, index: str) -> tuple[str, str | None]:
    """Return by what a finding is known when it is made again; its message may hold figures that change."""
    return finding.where.replace(index, own_name(index)), finding.hint
