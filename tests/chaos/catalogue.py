"""The catalogue: what must always hold, the code that keeps it and the tests that attack it.

docs/reliability.md is made from it: `python -m tests.chaos.catalogue` writes the page, and a test sees that it is
current. `faults` sees that every keeper and attacker exists, and that each property is attacked by a test of `make
test`, and by a known fault if it does not say why not; `idle`, that each fault of chaos and each known fault attacks a
property. A known fault names the property itself (`Mutant.breaks`), and so its finder: neither is named here again.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

import msgspec

from tests.chaos import commits, elsewhere, runs
from tests.chaos.coverage import recorded
from tests.chaos.faults import FAULTS
from tests.chaos.scenes import ELSEWHERE
from tests.mutants.faults import MUTANTS, Mutant, found

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"


class Property(msgspec.Struct, frozen=True):
    """Something that must always hold.

    :param keeper: the code that keeps it, as file:name.
    :param named: names of tests, of faults of the chaos harness and of crash points.
    :param unbroken: why no known fault breaks it.
    """

    name: str
    says: str
    keeper: str
    named: tuple[str, ...]
    unbroken: str = ""

    @property
    def mutants(self) -> list[Mutant]:
        """The known faults that break it."""
        return [one for one in MUTANTS if one.breaks == self.name]

    @property
    def attackers(self) -> list[str]:
        """What attacks it: what is named, and what finds the known faults; `SIMULATION` stands for itself."""
        finders = [SIMULATION if one.found_by == "simulation" else finder_of(one) for one in self.mutants]
        return list(dict.fromkeys((*self.named, *finders)))


SIMULATION = "simulation"


def finder_of(mutant: Mutant) -> str:
    """Return the name of the test, the fault of chaos or the crash point that finds a known fault."""
    return mutant.fault.rpartition("::")[2].partition("[")[0]


P = Property

CATALOGUE = (
    P(
        "no loss",
        "Every committed change reaches the index.",
        "target/session.py:ApplySession",
        (
            "test_kill_9_in_the_middle_of_a_stream_of_changes_loses_nothing",
            "test_an_index_equals_its_source_whatever_went_wrong",
            "kill -9",
            "disk full under the spool",
            "disk full under the target",
        ),
    ),
    P(
        "no double",
        "A document is in the index once, however often its changes are delivered.",
        "target/apply.py:IndexWriter",
        ("test_a_batch_that_is_delivered_again_changes_nothing_in_the_end", "source connections cut"),
    ),
    P(
        "no resurrection",
        "A row that was deleted does not come back by a page that was read before.",
        "model/visibility.py:Deliveries",
        ("test_changes_that_come_during_the_initial_load_win",),
    ),
    P(
        "one transaction",
        "Chunks and checkpoint of a source transaction commit together.",
        "target/session.py:ApplySession.apply",
        (
            "test_a_batch_commits_its_indexes_its_cursors_and_its_checkpoint_together",
            "batch written",
            "batch committed",
        ),
        "crash points before and after the commit kill between the two in each campaign",
    ),
    P(
        "the checkpoint is a chain",
        "It moves only from the value that this worker last saw committed.",
        "target/pipelines.py:Pipelines._move",
        (
            "test_the_checkpoint_moves_only_from_what_was_last_committed",
            "test_a_target_that_lost_confirmed_changes_under_a_worker_is_a_gap",
            "target fails over with loss",
        ),
    ),
    P(
        "acknowledged ≤ kept ≤ checkpoint ≤ received",
        "The source is told of nothing that is not committed in the target.",
        "model/progress.py:Progress",
        (
            "test_an_index_equals_its_source_whatever_went_wrong",
            "status sent",
        ),
    ),
    P(
        "a promoted standby has what its slot was told of",
        "With source and target on one server, no checkpoint is acknowledged that a standby may lack.",
        "model/progress.py:Progress.sent",
        (
            "test_a_standby_without_the_last_checkpoint_has_no_acknowledgement_of_it_if_the_index_is_in_the_source",
            "test_a_checkpoint_in_the_same_wal_is_acknowledged_once_the_source_has_sent_what_is_beyond_its_commit",
            "source fails over",
        ),
    ),
    P(
        "whole transactions",
        "The position does not move into a transaction of which a part is applied.",
        "model/batch.py:Batch",
        ("test_a_partial_transaction_leaves_the_checkpoint_and_it_never_moves_back",),
    ),
    P(
        "one writer",
        "A worker that lost its lock writes nothing behind its successor's back.",
        "target/pipelines.py:Pipelines.take_over",
        (
            "test_nothing_is_written_under_an_older_fence",
            "test_a_set_up_that_loses_the_pipelines_lock_writes_nothing_more",
            "test_nothing_of_a_frozen_worker_comes_late",
            "test_every_session_of_a_worker_with_the_target_is_admitted",
            "frozen worker overtaken",
            "standby takes over",
            "fence raised",
        ),
    ),
    P(
        "a gap is said",
        "Where changes may be missing, the worker stops or reads everything again.",
        "flows/setup/gaps.py:refuse_gap",
        (
            "test_a_slot_that_cannot_send_all_is_a_gap",
            "test_a_source_restored_from_an_older_backup_is_a_gap",
            "source fails over with loss",
        ),
    ),
    P(
        "one source",
        "Whatever is read from the source, or written to its WAL, is of the server that the stream is on.",
        "postgres/followed.py:FollowedServer",
        (
            "test_no_row_is_read_from_a_former_primary_that_is_back_while_the_stream_is_on_its_successor",
            "test_the_stream_follows_its_address_to_another_primary_although_the_one_before_runs",
            "test_sessions_elsewhere_end_when_the_stream_connects_also_amid_a_statement",
        ),
    ),
    P(
        "one target",
        "All that a worker writes goes to one server: the one that the target's address leads to.",
        "postgres/followed.py:FollowedServer",
        (
            "test_the_worker_follows_its_targets_address_to_another_server_although_the_one_before_runs",
            "test_a_former_primary_of_the_target_that_is_back_and_named_first_is_passed_over",
        ),
        "the code is that of *one source*, whose fault is put back",
    ),
    P(
        "a slot decodes what was written",
        "A slot that missed a change of tables while it was created is made again, also by the next worker.",
        "source/definitions.py:definitions_changed_since",
        (
            "test_a_slot_is_made_again_if_tables_changed_meanwhile_also_after_a_kill",
            "test_any_definition_that_decoding_looks_up_is_told_from_everything_else",
            "slot created",
        ),
    ),
    P(
        "no gap where none is",
        "After a crash, a restart or a clean failover nothing is read again.",
        "flows/setup/gaps.py:refuse_gap",
        (
            "test_the_index_follows_a_standby_promoted_amid_writes_and_not_the_primary_left_behind",
            *("source fails over", "target fails over", "source crashes", "target crashes", "stop and start"),
        ),
        "each history fails at once if a worker reports a gap that nothing caused",
    ),
    P(
        "a resync heals",
        "After a gap the index equals the source again, rows that are gone included.",
        "flows/backfill/engine.py:Backfills",
        ("test_after_a_gap_resync_heals_updates_inserts_and_deletes_alike", "forgotten position committed"),
    ),
    P(
        "newer wins",
        "A page never overwrites what the stream delivered and the page's snapshot did not see.",
        "model/visibility.py:Deliveries.hides",
        (
            "test_the_index_equals_the_source_whatever_was_written_during_load_replay_and_resync",
            "test_commits_that_are_delivered_before_they_are_visible_are_not_undone_by_older_rows",
        ),
    ),
    P(
        "large values survive",
        "A value that an update did not send is read again, never taken for NULL.",
        "model/rows.py:complete",
        ("test_unchanged_large_values_survive_updates_of_other_columns",),
    ),
    P(
        "what was rolled back never was",
        "Aborted transactions and savepoints leave nothing, streamed or not.",
        "source/spool.py:Spool.abort",
        ("test_what_replays_is_what_was_sent_and_not_rolled_back",),
    ),
    P(
        "a prepared transaction counts once it is committed",
        "Neither before nor twice.",
        "model/transactions.py:Assembler",
        (
            "test_a_prepared_transaction_counts_once_it_is_committed",
            "test_an_index_equals_its_source_whatever_went_wrong",
        ),
        "it goes the way of all transactions, whose faults are put back; histories prepare some of theirs",
    ),
    P(
        "a vector belongs to its text",
        "A vector is never stored for another text than the one it was made of.",
        "target/backlog.py:Backlog.store",
        ("test_a_vector_of_a_text_that_has_changed_meanwhile_is_not_stored", "vectors written", "vectors committed"),
    ),
    P(
        "no mixed models",
        "A query is compared with vectors of its own model alone, also while an index migrates to another.",
        "target/ddl/searching.py:put_search",
        ("test_searches_go_on_and_never_mix_models_while_an_index_migrates_and_rolls_back", "migration"),
    ),
    P(
        "whole generations",
        "A generation that is ready has a vector of each chunk's text, or a reason why not.",
        "target/filling.py:Filling",
        (
            "test_a_generation_is_whole_after_a_fill_beside_random_changes",
            "test_a_migration_goes_on_after_a_kill_at_every_step",
            "migration",
        ),
        "its vectors come through the backlog, whose faults are put back under *a vector belongs to its text*",
    ),
    P(
        "one set of chunks",
        "A search finds chunks of one template alone, also while an index migrates to others.",
        "flows/setup/exchange.py:do_what_was_asked",
        (
            "test_searches_go_on_and_never_mix_chunks_while_an_index_migrates_and_rolls_back",
            "test_a_migration_to_other_chunks_goes_on_after_a_kill_at_every_step",
            "migration to other chunks",
            "exchange of chunks committed",
        ),
    ),
    P(
        "one vector in one tier",
        "A chunk has one vector, fresh or settled, whoever writes at the same time and whoever is killed.",
        "target/settling.py:Settling.settle",
        (
            "test_whoever_writes_at_the_same_time_each_chunk_has_one_vector_in_one_tier",
            "test_each_vector_is_in_one_tier_after_a_kill_and_settles_in_the_end",
            "test_wherever_a_rebuild_is_killed_each_vector_is_in_one_tier_and_the_next_one_succeeds",
            "vectors moved",
            "move committed",
        ),
    ),
    P(
        "wait_for keeps its word",
        "Where it returns true, the index holds everything up to that position.",
        "target/ddl/shared.py:create_shared",
        (
            "test_waiting_ends_when_the_checkpoint_gets_there",
            "test_waiting_for_a_paused_or_an_unfollowed_index_is_an_error_with_the_reason",
            "test_an_index_that_is_loading_is_not_there_yet",
            "test_vectors_are_waited_for_on_request_up_to_the_same_position",
            "test_a_position_is_reached_by_the_server_that_answers",
            "test_what_is_told_of_a_search_is_of_the_server_that_answered",
        ),
    ),
    P(
        "an answer says what it lacks",
        "A search of what is paused, no longer followed or being built says so, and tells no position.",
        "target/freshness.py:read_freshness",
        (
            "test_the_position_of_an_index_that_is_not_kept_in_step_is_not_known",
            "test_of_a_generation_that_is_being_built_no_position_is_known_and_a_search_says_so",
        ),
        "its tests bring each of these states about; no second safeguard hides a fault from them",
    ),
    P(
        "embedded once",
        "No text is embedded twice, but for a call whose answer was lost, one that comes back after many others, one"
        " that a large transaction deletes and that is delivered again, and a large one that got another key while the"
        " worker was behind, if another row has its old key by the time that the worker has to read it.",
        "flows/embed/dispatcher.py:Dispatcher",
        (
            "test_texts_that_changed_while_the_worker_was_away_are_embedded_once_as_they_are_now",
            "test_a_text_that_another_generation_has_is_not_asked_for_while_its_row_is_held",
            "test_an_index_equals_its_source_whatever_went_wrong",
        ),
    ),
    P(
        "the slot does not wait for a model",
        "Text, columns and deletes stay current while an embedder is slow, wrong or away.",
        "flows/embed/loop.py:EmbedLoop",
        (
            "test_an_outage_costs_vectors_their_freshness_and_nothing_else",
            *("provider: away", "provider: error 500", "provider: 429", "provider: hangs up"),
        ),
        "chaos brings the provider back only once a text without a vector is in the index: without the property no such"
        " history ends",
    ),
    P(
        "a refused text waits alone",
        "It keeps its error; the others go on, even while an embedder hangs at it.",
        "target/backlog.py:Backlog.postpone",
        (
            "test_a_refused_text_waits_with_its_error_and_all_others_go_on",
            "test_texts_that_hang_hold_up_no_other_text_of_any_index",
            "failure of a text noted",
            "provider: too few vectors",
        ),
    ),
    P(
        "one index's fault is that index's",
        "It pauses with its reason; the others keep running.",
        "target/registry.py:Registry.pause",
        (
            "test_a_value_that_the_target_refuses_names_its_index_and_nothing_is_written",
            "broken index paused",
            "type of a carried column changed",
        ),
        "chaos breaks one index and waits for the others: without the property no such history ends",
    ),
    P(
        "silence is noticed",
        "A connection on which nothing comes any more is given up and made again.",
        "source/slot.py:SlotConnection",
        (
            "test_a_connection_that_falls_silent_is_noticed_told_of_and_made_again",
            "test_a_source_that_stays_silent_is_asked_to_reply_and_is_away_in_the_end",
            "source half-open",
            "target half-open",
        ),
        "without it no history with a half-open network ends",
    ),
    P(
        "servers may restart",
        "The worker outlives either server and finds it again.",
        "worker/streaming.py:Streaming.run",
        (
            "test_servers_that_restart_or_crash_are_found_again",
            *("source restarts", "source unreachable", "source connections cut", "source sessions ended"),
            *("target restarts", "target unreachable", "target connections cut", "target sessions ended"),
        ),
        "without it no history with a server that was away ends",
    ),
    P(
        "a server may be shut down",
        "The source stops at once, whatever of what it has sent still waits for it or for the target.",
        "flows/retention.py:watch_slot",
        (
            "test_a_source_can_be_shut_down_while_changes_that_it_has_sent_wait_for_it_or_for_the_target",
            "test_a_source_that_shuts_down_is_let_go_however_long_a_write_takes",
            "source restarts",
            "target half-open",
        ),
    ),
    P(
        "a killed worker leaves nothing behind",
        "No half-made slot, no session in a lock's queue, no index that stays invalid.",
        "source/slot.py:SlotConnection.create_slot",
        (
            "test_a_process_killed_while_its_slot_waits_for_a_transaction_leaves_no_slot_behind",
            "test_a_worker_that_is_killed_while_it_waits_for_a_lock_leaves_no_session_in_the_queue",
            "invalid search index dropped",
        ),
    ),
    P(
        "partitions are followed",
        "What comes and goes with a partition comes and goes in the index, though no message tells of it.",
        "flows/setup/differences.py:ask_for",
        (
            "test_rows_come_with_a_partition_that_is_attached_and_go_with_one_that_is_detached",
            "test_a_partition_may_be_emptied_by_itself",
            "partition detached and attached",
            "difference committed",
        ),
        "it is noticed as *an altered table is read again*, whose faults are put back",
    ),
    P(
        "an altered table is read again",
        "What altering a table or its publication does to values, without a message for any row, is noticed.",
        "source/fingerprints.py:difference",
        (
            "test_what_may_change_values_without_a_row_event_has_the_table_read_again",
            *("column added", "type of a carried column changed", "publication edited"),
            *("table of many appears", "table of many goes"),
        ),
    ),
    P(
        "the condition decides",
        "An index with a condition has exactly the rows that it holds for, whatever way they come and go.",
        "flows/follow/prepare.py:Preparer",
        ("test_rows_enter_and_leave_as_their_values_change",),
    ),
    P(
        "a batch costs what it holds",
        "It reads and writes about as many rows as it has, however many there are or wait.",
        "target/look_ups.py:LookUps",
        (),
    ),
    P(
        "no change waits for the next one",
        "What the source has sent in part, or has not told of yet, comes within moments, though nothing follows it.",
        "flows/follow/receive.py:Receiver",
        (),
    ),
    P(
        "no mixed versions",
        "No session writes to tables of a version that it does not know.",
        "target/version.py:open_target",
        (),
    ),
    P(
        "the audit finds",
        "What no rule foresaw is found by comparison, counted and read again.",
        "flows/audit/verification.py:repair_found",
        (
            "test_what_differs_is_found_counted_by_kind_and_read_again_and_the_index_is_proven_equal",
            "verify --repair in between",
            "audit finished",
        ),
        "histories damage the index by hand, and fail if that is not found",
    ),
    P(
        "any bytes",
        "Whatever a server or a provider sends gives a value or an error of ours, never another one.",
        "pgoutput/decode.py:decode",
        (
            "test_any_bytes_give_a_message_or_a_malformed_message",
            "test_any_bytes_give_a_frame_or_a_malformed_message",
            *("provider: bytes that are no text", "provider: a page of HTML", "provider: hangs up in the middle"),
            *("provider: not a number", "provider: vectors too long"),
        ),
        "the generated bytes are the faults",
    ),
)
"""All properties."""


class Test(msgspec.Struct, frozen=True):
    """A test function.

    :ivar proof: whether `make prove` alone runs it, none of its cases being one of `make test`.
    """

    file: str
    proof: bool


PROOF = re.compile(r"pytest\.mark\.proof\b(?!_)")


@cache
def tests() -> Mapping[str, Test]:
    """Return every test, by its name; of two of one name the last, see `doubtful`."""
    return {name: one for found in _by_file() for name, one in found.items()}


@cache
def doubtful() -> Collection[str]:
    """Return the names that several tests have."""
    return {name for name, count in Counter(name for found in _by_file() for name in found).items() if count > 1}


@cache
def _by_file() -> Sequence[Mapping[str, Test]]:
    return [tests_of(path) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def tests_of(path: Path) -> dict[str, Test]:
    """Return the tests of a file, by their names."""
    tree = ast.parse(path.read_text())
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == MARKS]
    every = any(PROOF.search(ast.unparse(one)) for one in marks)
    return {
        node.name: Test(
            str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name,
            every or any(PROOF.search(ast.unparse(one)) for one in node.decorator_list),
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


MARKS = "pytestmark"


def faults(properties: Sequence[Property] = CATALOGUE) -> list[str]:
    """Return what is wrong with the properties: what they name that there is not, and what attacks them too little."""
    known, others = tests(), {*FAULTS, *commits.points(), SIMULATION}
    found = []
    for one in properties:
        found += [f"{one.name}: there is no {name}" for name in one.attackers if name not in known.keys() | others]
        found += [f"{one.name}: several tests are named {name}" for name in one.attackers if name in doubtful()]
        if all(name not in known or known[name].proof for name in one.attackers):
            found.append(f"{one.name} has no attacker among the tests of `make test`")
        if bool(one.mutants) == bool(one.unbroken):
            found.append(
                f"{one.name} needs a known fault that breaks it, or the reason why there is none, and not both"
            )
        file, _, name = one.keeper.partition(":")
        path = ROOT / "cdcsync" / file
        if not path.exists() or not _has(ast.parse(path.read_text()), name.split(".")):
            found.append(f"{one.name}: there is no {one.keeper}")
    return found


def idle(properties: Sequence[Property] = CATALOGUE) -> list[str]:
    """Return the faults of chaos that attack no property, and the known faults that break none."""
    named = {name for one in properties for name in one.named}
    names = {one.name for one in properties}
    return [*sorted(FAULTS.keys() - named), *(one.name for one in MUTANTS if one.breaks not in names)]


def _has(tree: ast.AST, names: list[str]) -> bool:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == names[0]:
            return len(names) == 1 or _has(node, names[1:])
    return False


def _attacker(name: str) -> str:
    """Return how the page names an attacker."""
    if name == SIMULATION:
        return "the simulation"
    if (test := tests().get(name)) is None:
        return f"chaos: {name}"
    return f"`{test.file}::{name}`{' (proof)' if test.proof else ''}"


def page() -> str:
    """Return the page."""
    points = set(commits.points())
    by_chaos = sorted(points - ELSEWHERE.keys())
    lines = [
        "# Reliability",
        "",
        "<!-- Made by `python -m tests.chaos.catalogue`; change tests/chaos/catalogue.py instead. -->",
        "",
        "What must always hold, the code that keeps it, and what attacks it. There are seven kinds of attack:",
        "",
        "- **Tests** run with `make test`, on real PostgreSQL servers; those that are marked *proof* take long, and run"
        " with `make prove`.",
        "- **Chaos** (`make chaos SEEDS=200`): histories from seeds with real worker processes, two servers that crash"
        " and fail over, a writer and a provider. It counts each fault that took effect and each crash point at which a"
        " process died. Of 200 histories, each fault must have taken effect in one, and a process must have died in one"
        " at each crash point that histories come to; tests kill at the others (`make kills`). At the end an oracle in"
        " plain SQL compares every index with its source. `make chaos SEED=17` runs one history again: the seed decides"
        " what happens, the machine how fast.",
        "- **Simulation** (`make simulate`): the pure modules under a seeded scheduler, with a source and a target in"
        " memory. The source delivers again, streams, aborts and is promoted. The target loses answers; on a server of"
        " its own it also loses its last commits, with the checkpoint and the chain. A second worker takes over from"
        " one that stands still. It is exact: a seed always gives the same history, and a failing one is made smaller."
        " It tests the code that decides without I/O: how transactions are put together, batches, progress,"
        " visibility, the chain of commits, what a slot can still send, and the spool with its file. The flows between"
        " them, and the target's comparison, are written once more for it in `tests/simulation/worker.py`: a fault in"
        " the flows or in the SQL does not show there. It leaves out embedding, vectors, settling and builds; several"
        " indexes, pauses, related tables and conditions; a source that is restored or branches off before the"
        " checkpoint; crashes between the steps of a set-up; and a race for the pipeline's lock. Tests on servers and"
        " chaos attack those.",
        "- **Soak** (`make soak MINUTES=30`): a worker under an even load, with searches, replays, comparisons and"
        " ended sessions beside it; some of its transactions are large enough to be streamed. Memory, files, threads,"
        " sessions, the WAL that the slot holds, the spool, temporary files, dead rows and sizes are measured, and none"
        " may grow: a line is fitted through each, with its error, and `build/soak.svg` shows them. This is the picture"
        " of the run named below:",
        "",
        "  ![What a soak measured, with a line through each series](pictures/soak.svg)",
        "",
        "- **Known faults put back** (`make mutants`): each of the faults listed at the end is put into a copy of the"
        " code, one at a time, and has to be found, in the words of the property that it breaks.",
        "- **Fuzzing** (`make fuzz MINUTES=5`): arbitrary bytes for every parser, guided by the code that they reach.",
        "- **Peers** (`python bench/peers.py kills`): the same changes and the same kills, to cdcsync and to pgai.",
        "",
        f"There are {len(CATALOGUE)} properties, {len(FAULTS)} faults, {len(MUTANTS)} known faults and {len(points)}"
        f" crash points: chaos kills at {len(by_chaos)} of them, tests at the other {len(ELSEWHERE)}.",
        "",
        "## Properties",
        "",
        "| Property | Kept by | Attacked by |",
        "|---|---|---|",
    ]
    for one in CATALOGUE:
        by = [_attacker(name) for name in one.attackers]
        count = len(one.mutants)
        by.append(
            f"{count} known fault{'s' if count > 1 else ''} put back" if count else f"no known fault: {one.unbroken}"
        )
        lines.append(f"| **{one.name}**: {one.says} | `cdcsync/{one.keeper}` | {'<br>'.join(by)} |")
    campaign, deaths = recorded(), elsewhere.recorded()
    if rows := runs.table():
        lines += ["", "## Last runs", "", "| Command | Day | Came to |", "|---|---|---|", *rows]
    if rows := runs.peers():
        lines += [
            "",
            "## The same kills, to another tool",
            "",
            "Rows change at 2,000 updates a second until the last kill. In each of three rounds the worker is killed"
            " with SIGKILL five times, each time after it has begun to ask for vectors, and started again at once. When"
            " the work is done, what is stored is compared with the table and with the provider's vectors. The figures"
            " are the sums of the rounds; of documents waiting, the median.",
            "",
            f"| | {' | '.join(runs.SIDES)} |",
            "|---|---|---|",
            *rows,
        ]
    lines += [
        "",
        "## Faults of the chaos harness",
        "",
        f"The last campaign on record ran {campaign.histories} histories with {campaign.transactions:,} transactions;"
        f" {campaign.failures or 'none'} failed"
        + (
            f" in the end. {campaign.again} had failed at first, and ran again after the fault that it found was fixed"
            if campaign.again
            else ""
        )
        + ". The number is of the histories in which the fault took effect.",
        "",
    ]
    lines += [f"- {name}: {campaign.fired.get(name, 0)}" for name in sorted(FAULTS)]
    lines += [
        "",
        "## Crash points",
        "",
        "Every place that commits or acknowledges has a crash point directly after it, and a transaction has another"
        " one before its end. The process that comes to it is killed there (`CDCSYNC_CRASH_AT`), be it a worker or a"
        " command such as `migrate`.",
        "",
        f"Histories come to {len(by_chaos)} of the {len(points)}. In the last campaign on record processes died at"
        f" {len(campaign.hit.keys() & set(by_chaos))} of them; the number is of the histories in which one did.",
        "",
    ]
    lines += [f"- {name}: {campaign.hit.get(name) or 'not in that campaign'}" for name in by_chaos]
    lines += [
        "",
        f"No history comes to the other {len(ELSEWHERE)}: they need thousands of rows, an index of an earlier version,"
        " an operator who approves, replays, gives up or drops something, a tool server, or a table that is created"
        " while the slot is. A test kills the process at each, or ends its session there. `make kills` runs these tests"
        f" and counts; the numbers are of the run of {deaths.day}.",
        "",
    ]
    lines += [
        f"- {name}: `{ELSEWHERE[name]}`, {deaths.at.get(name) or 'not in that run'}" for name in sorted(ELSEWHERE)
    ]
    return "\n".join([*lines, *_known_faults()]) + "\n"


def _known_faults() -> list[str]:
    """Return the part about the known faults that are put back."""
    record = found()
    lines = [
        "",
        "## Known faults put back",
        "",
        "What finds a fault passes without it: the same test, or the same seeds. A failure counts only in the words of"
        " the property, not if something else goes wrong. The simulation looks for a fault among all its histories."
        " Chaos is pointed at the fault or the crash point that brings it out (`--only`), which a campaign reaches"
        f" once in some {len(FAULTS)} or {len(set(commits.points()) - ELSEWHERE.keys())} histories: its numbers are of"
        " such histories, and say nothing of how long a campaign would look.",
        "",
        f"The last run on record is of {record.day}; what is not said was not looked for, or not found, in that run.",
        "",
        "| Fault | Breaks | Found by | Seeds | Seen |",
        "|---|---|---|---|---|",
    ]
    by = {"simulation": "simulation", "chaos": 'chaos, `--only "{}"`', "tests": "`{}`"}
    for one in MUTANTS:
        seen = record.found.get(one.name)
        seeds, said = ("", "") if seen is None else (seen.seeds or "", seen.said.replace("|", "\\|"))
        lines.append(
            f"| {one.name} | {one.breaks} | {by[one.found_by].format(one.fault)} | {seeds} | {said and f'`{said}`'} |"
        )
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
