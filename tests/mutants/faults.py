"""Known faults, to be put back one at a time: each is a change of one place in the package's source.

A place that has moved or changed makes the patch fail, loudly: the fault has to be put where the code is now.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

PACKAGE = Path(__file__).parents[2] / "cdcsync"

FOUND = Path(__file__).with_name("found.json")
"""What the last run that was recorded found."""

Finder = Literal["simulation", "chaos", "tests"]


UNEQUAL = r"^Wrong: .+ is .+ in the target and .+ in the source"
"""The words of the simulation when the target does not equal the source."""


DIFFERS = r"in vain for (\w+), \('live', ''\): \1:"
"""The words of a scene in which an index is live, and differs from its table for as long as the scene waits."""


class Mutant(msgspec.Struct, frozen=True):
    """A fault: what stands in a file in place of what.

    :param breaks: the property that it breaks, by its name in tests/chaos/catalogue.py.
    :param found_by: what has to notice it.
    :param fault: of chaos, the fault or the crash point that brings it out; of tests, the one that fails. Tests are
        for what a second safeguard hides from histories, so that only the first one's own test can tell.
    :param words: a pattern of the property's words: a failure that says anything else does not count as finding it.
    """

    name: str
    breaks: str
    file: str
    old: str
    new: str
    found_by: Finder = "simulation"
    fault: str = ""
    words: str = UNEQUAL

    def apply(self, package: Path) -> None:
        """Put the fault into a copy of the package.

        :raises LookupError: the code is not what it was when the fault was described.
        """
        path = package / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise LookupError(f"{self.name}: {self.file} has {text.count(self.old)} times: {self.old!r}")
        path.write_text(text.replace(self.old, self.new))


MUTANTS = (
    Mutant(
        "the commit record's beginning is stored instead of its end",
        "whole transactions",
        "model/transactions.py",
        "return (Committed(message.end_lsn, message.commit_time_us),)",
        "return (Committed(message.commit_lsn, message.commit_time_us),)",
        words=r"^Wrong: the checkpoint \S+ is not the end of a transaction",
    ),
    Mutant(
        "what was received is acknowledged, not what is committed",
        "acknowledged ≤ kept ≤ checkpoint ≤ received",
        "model/progress.py",
        "self.acknowledged = self.kept\n        return",
        "self.acknowledged = self.received\n        return",
        words=r"^Wrong: \S+ was acknowledged, beyond the checkpoint",
    ),
    *(
        Mutant(
            name,
            "a promoted standby has what its slot was told of",
            "model/progress.py",
            old,
            new,
            words=r"^Wrong: \S+ was acknowledged, and the standby's checkpoint",
        )
        for name, old, new in (
            (
                "what a standby of one server for source and target may lack is acknowledged",
                "        if wal_end is None:\n",
                "        if True:\n",
            ),
            (
                "on one server, a checkpoint counts as kept where its commit was written, not where it ended",
                "self._commits.append((wal_end, self.checkpoint))",
                "self._commits.append((wal_end, lsn or self.checkpoint))",
            ),
            (
                "on one server, the checkpoint that a connection begins with is acknowledged at once",
                "self.kept = checkpoint if committed_before is None else INVALID_LSN",
                "self.kept = checkpoint",
            ),
        )
    ),
    Mutant(
        "the checkpoint moves past a transaction of which a part is applied",
        "whole transactions",
        "model/batch.py",
        ".add(change)\n        self.partial = True\n",
        ".add(change)\n        self.end_lsn = Lsn(change.lsn + 5)\n        self.partial = True\n",
    ),
    Mutant(
        "a transaction is skipped by the end of its commit record",
        "no loss",
        "model/transactions.py",
        "self._skipping = message.final_lsn < self._checkpoint",
        "self._skipping = message.final_lsn <= self._checkpoint + 10",
        # A mark may be what is skipped: its page waits for it for ever.
        words=rf"{UNEQUAL}|^Wrong: it does not come to an end",
    ),
    Mutant(
        "a page is written over a newer row",
        "newer wins",
        "model/visibility.py",
        "return xid is not None and not snapshot.sees(xid)",
        "return False",
    ),
    Mutant(
        "a page ignores a TRUNCATE that it does not see",
        "no resurrection",
        "model/visibility.py",
        "if self._truncated is not None and not snapshot.sees(self._truncated):\n            return True",
        "if False:\n            return True",
    ),
    Mutant(
        "visibility goes by the order of ids, not by what runs",
        "newer wins",
        "model/visibility.py",
        "return whole < self.xmin or (whole < self.xmax and whole not in self.running)",
        "return whole < self.xmax",
    ),
    Mutant(
        "transaction ids do not wrap",
        "newer wins",
        "model/visibility.py",
        "        distance = (xid - self.xmax) % XID_SPAN\n        if distance >= XID_SPAN // 2:\n"
        "            distance -= XID_SPAN\n        return self.xmax + distance",
        "        return xid",
    ),
    Mutant(
        "transactions delivered before a read are not suspects",
        "newer wins",
        "model/visibility.py",
        "unseen = [xid for xid in self._suspects if not snapshot.sees(xid)]",
        "unseen: list[int] = []",
    ),
    Mutant(
        "what is remembered is forgotten when a read ends",
        "newer wins",
        "model/visibility.py",
        "        if self._keys is not None:\n            self.suspect(self._keys.values())\n        if self._truncated",
        "        if self._truncated",
    ),
    Mutant(
        "more keys than are remembered are forgotten",
        "newer wins",
        "model/visibility.py",
        "            self.suspect(self._keys.values())\n            self._keys.clear()",
        "            self._keys.clear()",
    ),
    Mutant(
        "more suspects than are told apart are forgotten",
        "newer wins",
        "model/visibility.py",
        "            self._suspect_span = (before + min(ages)) % XID_SPAN, (before + max(ages)) % XID_SPAN\n",
        "",
    ),
    Mutant(
        "an applied page forgets what other snapshots do not see",
        "newer wins",
        "model/visibility.py",
        "self._keys = {key: xid for key, xid in self._keys.items() if xid in hidden} if hidden else {}",
        "self._keys = {}",
    ),
    Mutant(
        "a moved key leaves its old document behind",
        "no double",
        "model/batch.py",
        "            self._put(Delete(change.shape, change.moved_from, change.xid, change.lsn))\n",
        "            pass\n",
    ),
    Mutant(
        "the first change of a key wins",
        "no loss",
        "model/batch.py",
        "        self.filled.pop(change.key, None)\n        self.live[change.key] = change",
        "        self.filled.pop(change.key, None)\n        self.live.setdefault(change.key, change)",
    ),
    Mutant(
        "what came before a TRUNCATE in its batch stays",
        "no resurrection",
        "model/batch.py",
        "                self.live.clear()\n",
        "",
    ),
    Mutant(
        "rows of a page that came before a TRUNCATE in its batch stay",
        "no resurrection",
        "model/batch.py",
        "                self.live.clear()\n                self.filled.clear()\n",
        "                self.live.clear()\n",
    ),
    Mutant(
        "a large value that did not change is taken for known",
        "large values survive",
        "model/rows.py",
        "return UNCHANGED not in row\n",
        "return True\n",
    ),
    Mutant(
        "an update that moves a key is taken for one that does not",
        "no double",
        "model/rows.py",
        "return Upsert(self.shape, key, row, xid, lsn, before if before != key else None)",
        "return Upsert(self.shape, key, row, xid, lsn)",
    ),
    Mutant(
        "what an aborted savepoint wrote is kept",
        "what was rolled back never was",
        "source/spool.py",
        "        start = transaction.forget(subxid)\n        if start is None:",
        "        start = transaction.forget(subxid)\n        if True:",
    ),
    Mutant(
        "a spooled transaction outlives its connection",
        "what was rolled back never was",
        "source/spool.py",
        '        """Throw everything away."""\n        for xid in list(self._open):\n            self.drop(xid)\n',
        '        """Throw everything away."""\n',
        words="^Wrong: what was spooled for another connection is kept",
    ),
    Mutant(
        "a worker that was overtaken writes behind its successor's back: no fence",
        "one writer",
        "target/pipelines.py",
        ", commits = commits + 1 WHERE slot = %s AND fence = %s",
        ", commits = commits + 1 WHERE slot = %s AND %s::bigint IS NOT NULL",
        "tests",
        "tests/server/target/test_pipelines.py::test_who_was_taken_over_while_it_waited_commits_nothing",
        r"assert \[\] == \[True\]",
    ),
    Mutant(
        "the slot's connection stays open until the write in hand has ended",
        "a server may be shut down",
        "flows/follow/stream.py",
        "                async with slot:\n",
        "                if slot is not None:\n",
        "tests",
        "tests/unit/flows/follow/test_stream.py::test_a_source_that_shuts_down_is_let_go_however_long_a_write_takes",
        r"assert \(False, \[\]\) == \(True, \[\]\)",
    ),
    Mutant(
        "a search is answered by a session of which nobody asked whether it holds the position",
        "wait_for keeps its word",
        "index.py",
        "if position is not None and not await self._holds(connection, spec.name, position):",
        "if position is not None and position < 0:",
        "tests",
        "tests/server/test_index.py::test_a_position_is_reached_by_the_server_that_answers",
        "DID NOT RAISE NotReached",
    ),
    Mutant(
        "a set-up writes over a connection that the pipeline's lock does not depend on",
        "one writer",
        "worker/pipeline.py",
        "        target = self.session.connection\n",
        "        from cdcsync.postgres.sessions import connect\n\n"
        '        target = await connect(config.target.dsn, "target", works=True)\n',
        "tests",
        "tests/faults/test_overtaken.py::test_a_set_up_that_loses_the_pipelines_lock_writes_nothing_more",
        r"assert \[\(\{",
    ),
    Mutant(
        "the embed, settle, build and other sessions of a worker have no fence",
        "one writer",
        "postgres/sessions.py",
        "                await admit(connection, side)\n",
        "                pass\n",
        "tests",
        "tests/faults/test_overtaken.py::test_every_session_of_a_worker_with_the_target_is_admitted",
        "AssertionError: cdcsync ",
    ),
    Mutant(
        "who takes over leaves the sessions of the worker before",
        "one writer",
        "target/locked_session.py",
        "                    if left := await self._pipelines.end_overtaken(connection, self._held, spared()):",
        "                    if left := list[int]():",
        "tests",
        "tests/faults/test_overtaken.py::test_nothing_of_a_frozen_worker_comes_late",
        r"assert not \(?\{",
    ),
    Mutant(
        "a command that does a worker's work leaves the fence where it was",
        "one writer",
        "flows/setup/exchange.py",
        "        lease = await pipelines.take_over(connection)\n"
        '        crash_point("fence raised by a command")\n'
        "        await pipelines.end_overtaken(connection, lease)\n",
        '        crash_point("fence raised by a command")\n',
        "tests",
        "tests/faults/test_overtaken.py::"
        "test_a_worker_whose_chunks_were_exchanged_or_dropped_meanwhile_stands_by_and_continues[activate]",
        r"assert (\d+) > \1",
    ),
    Mutant(
        "a checkpoint moves from what this worker never committed: no chain",
        "the checkpoint is a chain",
        "target/pipelines.py",
        " AND commits = %s AND checkpoint IS NOT DISTINCT FROM %s::pg_lsn RETURNING",
        " AND concat(%s::bigint, %s::pg_lsn) IS NOT NULL RETURNING",
        "tests",
        "tests/server/target/test_pipelines.py::test_the_checkpoint_moves_only_from_what_was_last_committed",
        "DID NOT RAISE TargetRewound",
    ),
    Mutant(
        "a target that went back is taken for what this worker left",
        "the checkpoint is a chain",
        "model/chain.py",
        "    if found not in (held, proposed):\n",
        "    if False:\n",
        "chaos",
        "target fails over with loss",
        r"^Broken: .*(documents (missing|of another text|not in the source)|reports no target_rewound)",
    ),
    Mutant(
        "fingerprints are ignored",
        "an altered table is read again",
        "source/fingerprints.py",
        '(compare="nothing is known of what its values were made of")\n    name = str(table.name)\n',
        "()\n    return Difference()\n    name = str(table.name)\n",
        "tests",
        "tests/server/source/test_fingerprints.py"
        "::test_what_may_change_values_without_a_row_event_has_the_table_read_again",
        r"where None = Difference\(reread=None",
    ),
    Mutant(
        "what was altered and altered back is no change",
        "an altered table is read again",
        "source/fingerprints.py",
        "    if altered := _altered(was, is_):\n",
        "    if altered := _altered(was, was):\n",
        "tests",
        "tests/server/scenarios/test_undone.py"
        "::test_an_index_equals_its_table_after_what_was_altered_and_altered_back[swapped_down]",
        DIFFERS,
    ),
    Mutant(
        "a table's name tells whose rows it has, and not its OID",
        "an altered table is read again",
        "model/transactions.py",
        "        shapes = self._tables.get(self._known.get(relation.oid, name), ())\n",
        "        shapes = self._tables.get(name) or self._tables.get(self._known.get(relation.oid, name), ())\n",
        "tests",
        "tests/server/scenarios/test_undone.py"
        "::test_an_index_equals_its_table_after_what_was_altered_and_altered_back[tables_down]",
        DIFFERS,
    ),
    Mutant(
        "a slot is used though tables changed while it was created",
        "a slot decodes what was written",
        "flows/setup/start.py",
        "            if not await definitions_changed_since(source, first):\n                break\n",
        "            if True:\n                break\n",
        "tests",
        "tests/server/flows/setup/test_start.py"
        "::test_a_slot_that_cannot_decode_a_table_is_doubted_then_a_gap_and_another_slot_takes_its_place",
        "in vain for the event slot_doubtful",
    ),
    Mutant(
        "a page follows one that was given up",
        "no loss",
        "flows/backfill/marks.py",
        "            self._lost.add(pending.request.id)\n",
        "",
        "tests",
        "tests/unit/flows/backfill/test_marks.py"
        "::test_no_page_follows_one_that_was_given_up_until_the_request_is_served_again",
        "DID NOT RAISE SourceUnavailable",
    ),
    Mutant(
        "what others made meanwhile is not looked for again",
        "embedded once",
        "flows/embed/dispatcher.py",
        "                yield Made(recent, {})\n                continue  #",
        "                yield Made(recent, {})\n                #",
        "tests",
        "tests/unit/flows/embed/test_dispatcher.py"
        "::test_a_text_that_another_call_makes_while_its_caller_stores_others_is_not_asked_for_again",
        r"assert \(\[\[b'a'\]\], .* == \(\[\[b'a'\], \[b",
    ),
    Mutant(
        "suspects are asked for beside each other",
        "a refused text waits alone",
        "flows/embed/calls.py",
        "        async with self._apart:\n",
        "        async with anyio.Lock():\n",
        "tests",
        "tests/unit/flows/embed/test_suspects.py::test_what_hangs_takes_one_place_and_no_other_text_waits_for_it",
        r"assert \(1, False\) == \(1, True\)",
    ),
    Mutant(
        "rows that are gone stay after a gap",
        "a resync heals",
        "flows/backfill/pages.py",
        "return Page(snapshot, [(key, None) for key in absent],",
        "return Page(snapshot, [],",
        "chaos",
        "forgotten position committed",
        r"^Broken: .*documents not in the source",
    ),
    Mutant(
        "a row that leaves the condition stays",
        "the condition decides",
        "flows/follow/prepare.py",
        "            if holds is False:\n                deleted.append(change.key)\n",
        "            if holds is False:\n",
        "tests",
        "tests/server/scenarios/test_where.py::test_rows_enter_and_leave_as_their_values_change",
        r"in vain for \w+: orphaned \[",
    ),
    Mutant(
        "a condition that only the source decides is taken to hold",
        "the condition decides",
        "flows/follow/prepare.py",
        "if holds is None or not complete(change.row):",
        "if not complete(change.row):",
        "chaos",
        "provider: error 500",
        r"^Broken: .*documents not in the source",
    ),
    Mutant(
        "a load reads the rows that the condition leaves out",
        "the condition decides",
        "model/spec.py",
        "for one in (self.row_filter, self.where and self.where.text) if one]",
        "for one in (self.row_filter,) if one]",
        "chaos",
        "kill -9",
        r"^Broken: .*documents not in the source",
    ),
    Mutant(
        "vectors of one model are stored for another one too",
        "no mixed models",
        "target/apply.py",
        "along = bool(changes.vectors) and self._same_model(one)",
        "along = bool(changes.vectors)",
        "tests",
        "tests/server/target/test_filling.py::test_a_page_gives_vectors_to_some_chunks_and_queues_the_others",
        "assert 0 == 1",
    ),
    Mutant(
        "a move to the settled tier takes a vector that changed meanwhile",
        "one vector in one tier",
        "target/settling.py",
        " AND f.xmin::text = c.version FOR UPDATE",
        " AND c.version IS NOT NULL FOR UPDATE",
        "tests",
        "tests/server/target/test_settling.py::test_a_change_that_commits_during_a_move_wins",
        r"assert \[\('(new|a)', 'set.* == \[\('(new|a)', 'fre",
    ),
    Mutant(
        "a new vector leaves the one before it in the settled tier",
        "one vector in one tier",
        "target/backlog.py",
        'await self._connection.execute(self._sql("DELETE FROM {settled} WHERE chunk_id = ANY(%s)"), [chunks])',
        "pass",
        "chaos",
        "move committed",
        r"^Broken: .*(vectors twice|vectors of another text)",
    ),
    Mutant(
        "a vector that is stored ends the wait of other texts too",
        "a vector belongs to its text",
        "target/backlog.py",
        ' AND chunk_id = ANY (ARRAY(SELECT chunk_id FROM due)))"\n',
        ' AND EXISTS (SELECT FROM due))"\n',
        "chaos",
        "vectors committed",
        r"^Broken: .*(chunks without a vector|vectors of another text)",
    ),
    Mutant(
        "a batch reads all that waits",
        "a batch costs what it holds",
        "target/look_ups.py",
        "        await self._connection.execute(BY_INDEX)\n",
        "",
        "tests",
        "tests/server/target/test_reads.py::test_a_batch_reads_about_as_many_rows_as_it_has",
        r"assert \{\('\w+', .*\} == \{\}",
    ),
    Mutant(
        "a source that fell quiet is not nudged",
        "no change waits for the next one",
        "flows/follow/receive.py",
        "                if self._nudge_due == math.inf:\n",
        "                if self._nudge_due == 0:\n",
        "tests",
        "tests/unit/flows/follow/test_receive.py::test_a_source_that_fell_quiet_is_nudged_however_much_it_had_sent",
        r"assert 1 > 1",
    ),
    Mutant(
        "generations are dropped as they were before an exchange",
        "one set of chunks",
        "flows/setup/indexes.py",
        "            if entry is None or (entry.generation, entry.stem) != (spec.generation, spec.stem):\n",
        "            if entry is None:\n",
        "tests",
        "tests/server/flows/setup/test_exchange.py"
        "::test_a_worker_that_examined_before_an_exchange_drops_nothing_of_what_stands_there_since",
        r"assert \(1, 'ready'",
    ),
    Mutant(
        "a partition is taken to log what its root promises",
        "large values survive",
        "model/rows.py",
        '    if lacking or (root.replica_identity == "f" and part.replica_identity != "f"):\n',
        "    if False:\n",
        "tests",
        "tests/server/scenarios/test_partitions.py"
        "::test_what_a_partition_did_not_log_of_old_rows_for_a_while_is_not_taken_for_null",
        DIFFERS,
    ),
    Mutant(
        "a text that another generation has is asked for while its row is held",
        "embedded once",
        "flows/embed/loop.py",
        "return waiting - taken, waiting & taken",
        "return waiting, set()",
        "tests",
        "tests/server/flows/embed/test_overlap.py"
        "::test_a_text_that_another_generation_has_is_not_asked_for_while_its_row_is_held",
        "assert 1 == 0",
    ),
    Mutant(
        "a session that is left behind in the midst of a COPY keeps its snapshot",
        "a killed worker leaves nothing behind",
        "postgres/liveness.py",
        " OR a.wait_event IN ('ClientRead', 'ClientWrite'))",
        ")",
        "tests",
        "tests/server/postgres/test_liveness.py"
        "::test_a_transaction_that_is_left_behind_is_ended_whatever_the_server_waits_for",
        "TimeoutError",
    ),
    Mutant(
        "a session that is on another server than the stream is used",
        "one source",
        "postgres/followed.py",
        "        if self._server is None or self.is_on(connection):\n",
        "        if True:\n",
        "tests",
        "tests/server/postgres/test_followed.py::test_a_session_elsewhere_is_refused_and_makes_the_stream_connect_again",
        "DID NOT RAISE SourceUnavailable",
    ),
    Mutant(
        "a source that was restored is taken for one that crashed",
        "a gap is said",
        "flows/setup/proof.py",
        "        elif frame.payload[0] in _ROWS and now_us != last_us:\n            found = False\n",
        "",
        "tests",
        "tests/server/flows/setup/test_proof.py"
        "::test_the_last_transaction_proves_the_history_unless_rows_were_changed_after_it[a row was changed after it]",
        "assert True is False",
    ),
    Mutant(
        "a slot that sends nothing again is proof, wherever it begins",
        "a gap is said",
        "flows/setup/proof.py",
        "there = state.commit_lsn is not None and state.commit_lsn <= slot.confirmed_flush",
        "there = state.commit_lsn is not None",
        "tests",
        "tests/server/flows/setup/test_proof.py"
        "::test_what_was_applied_before_the_slots_position_is_there_unless_rows_were_changed_after_it",
        "assert not True",
    ),
    Mutant(
        "another server is read whole without an approval",
        "a gap is said",
        "flows/setup/gaps.py",
        "return gap.approved if isinstance(gap, AnotherServer) else config",
        "return (isinstance(gap, AnotherServer) and gap.approved) or config",
        "tests",
        "tests/unit/flows/setup/test_gaps.py::test_only_an_approval_makes_the_worker_follow_another_server[resync]",
        "assert True is False",
    ),
    Mutant(
        "a command writes to tables of a newer version",
        "no mixed versions",
        "target/version.py",
        "            await _require_known(connection, target.schema)\n",
        "            pass\n",
        "tests",
        "tests/server/target/test_version.py::test_a_session_that_may_write_is_refused_by_tables_of_a_newer_version",
        "DID NOT RAISE SetupError",
    ),
    Mutant(
        "a worker writes on to a target that went back",
        "the checkpoint is a chain",
        "model/chain.py",
        "    if found not in (held, proposed):\n",
        "    if False:\n",
        words=rf"{UNEQUAL}|^Wrong: \S+ was acknowledged, beyond the checkpoint",
    ),
    Mutant(
        "a target that went back to the same checkpoint is taken for what this worker left",
        "the checkpoint is a chain",
        "model/chain.py",
        "    if found not in (held, proposed):\n",
        "    if found.checkpoint not in (held.checkpoint, proposed and proposed.checkpoint):\n",
    ),
    Mutant(
        "a commit whose answer was lost counts as one that was not made",
        "the checkpoint is a chain",
        "model/chain.py",
        "    if found not in (held, proposed):\n",
        "    if found != held:\n",
        words="^Wrong: a target that did not go back is said to have",
    ),
    Mutant(
        "a worker that was overtaken takes what its successor wrote for a target that went back",
        "one writer",
        "model/chain.py",
        "    if fence > held.fence:\n",
        "    if False:\n",
        words="^Wrong: a worker that was overtaken is told that the target went back",
    ),
    Mutant(
        "a slot that is ahead of a target that went back is no gap",
        "a gap is said",
        "flows/setup/gaps.py",
        "    if slot.confirmed_flush is not None and slot.confirmed_flush > state.checkpoint:\n",
        "    if False:\n",
        words=rf"{UNEQUAL}|^Wrong: \S+ was acknowledged, beyond the checkpoint",
    ),
)
"""All of them."""


class Found(msgspec.Struct, frozen=True):
    """What finding a fault took.

    :ivar seeds: of histories, the last of which failed; 0 where a test did.
    :ivar said: the words of that failure, without what differs from run to run.
    """

    seeds: int
    said: str


class Record(msgspec.Struct, frozen=True):
    """One run: what it did not look for, or did not find, is not in it.

    :ivar day: when it ran, in UTC.
    """

    day: str
    found: dict[str, Found]


def found(path: Path = FOUND) -> Record:
    """Return what the last run that was recorded found, by the names of the faults."""
    return msgspec.json.decode(path.read_bytes(), type=Record)
