"""Every row of the operations page's tables on what happens is held by a test, which this names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from cdcsync.config import parse
from tests.support.configs import configuration

ROOT = Path(__file__).parents[2]
SCENARIOS = "tests/server/scenarios/"
FINGERPRINTS = "tests/server/source/test_fingerprints.py"
CHANGES, UNSENT, REFUSED, PARTITIONS = (
    f"{SCENARIOS}test_{name}.py" for name in ("schema_changes", "unsent_changes", "refused_values", "partitions")
)

PAUSES, SILENCE, GAPS = f"{SCENARIOS}test_pauses.py", "tests/faults/test_silence.py", "tests/faults/test_gaps.py"

HELD = {
    "columns that it does not need are added, dropped, renamed, moved": (CHANGES, "a column renamed that no index"),
    "the replica identity becomes FULL, or an index on the same key": (CHANGES, "the identity made an index"),
    "labels are added to an enum type": (FINGERPRINTS, "a label is added"),
    "`TRUNCATE`": (f"{SCENARIOS}test_truncations.py", "with its rows"),
    "a key or carried column gets another type": (CHANGES, "carried columns of other types"),
    "the same, where objects of yours": (CHANGES, "test_a_view_that_others_are_built_on_keeps_its_types"),
    "the key gets a type that its values cannot be converted to": (
        REFUSED,
        "test_a_key_that_cannot_be_converted_is_a_new_load",
    ),
    "a text column gets another type, or is dropped": (UNSENT, "a column dropped and added"),
    "a label of an enum is renamed, or a composite": (UNSENT, "an attribute added"),
    "it is dropped and made anew, or renamed away and back": (CHANGES, "the table dropped and made anew"),
    "a column that it reads, or a label or attribute": (FINGERPRINTS, "two columns change places for a while"),
    "a column is added, dropped or renamed, and": (f"{SCENARIOS}test_undone.py", "row_more"),
    "a related table gets another primary key": (f"{SCENARIOS}test_undone.py", "primary_key"),
    "the unique index of its key": (f"{SCENARIOS}test_undone.py", "renumbered_named"),
    "a function that its condition calls": (f"{SCENARIOS}test_called_functions.py", "was_another_one_for_a_while"),
    "a column gets another collation": (
        f"{SCENARIOS}test_collations.py",
        "test_a_column_that_gets_another_collation",
    ),
    "it is rewritten": (UNSENT, "values by USING"),
    "the publication is edited, or the table leaves it and comes back": (UNSENT, "only inserts for a while"),
    "it leaves the publication": (CHANGES, "the table out of the publication"),
    "a partition is created or attached": (PARTITIONS, "test_rows_come_with_a_partition_that_is_attached"),
    "a partition is detached or dropped": (PARTITIONS, "test_rows_come_with_a_partition_that_is_attached"),
    "a partition is truncated by itself or rewritten": (FINGERPRINTS, "TRUNCATE public.p1"),
    "a column of the template, the key or the carried columns": (CHANGES, "a template column dropped"),
    "it gets another name or schema, or is dropped": (CHANGES, "the table moved"),
    "its replica identity or primary key": (CHANGES, "the primary key widened"),
    "a partition logs less of its old rows": (PARTITIONS, "test_what_a_partition_did_not_log_of_old_rows"),
    "other tables begin to inherit from it": (CHANGES, "a table that inherits"),
    "the publication stops sending a kind of change, or a column": (CHANGES, "test_a_publication_that_stops_sending"),
    "the worker's role may no longer read it": ("tests/server/preflight", "may not read"),
    "the table has no column": (PAUSES, "the table has no column"),
    "the table is called": (PAUSES, "the table is called"),
    "the replica identity is": (PAUSES, "the replica identity is"),
    "old rows of its partition": ("tests/unit/model/test_transactions.py", "does_not_log_what_its_root_promises"),
    "its key is": (PAUSES, "its key is"),
    "the vectors of index": (f"{SCENARIOS}test_changed_models.py", "test_a_changed_embedder_without_the_one_before"),
    "the table was dropped": (PAUSES, "the table was dropped"),
    "the table exists and has no column of vectors": (PAUSES, "the table exists and has no column of vectors"),
    "other tables inherit from the table now": (PAUSES, "other tables inherit from the table now"),
    "the publication does not send": (PAUSES, "the publication does not send"),
    "the role may not read": (PAUSES, "the role may not read"),
    "the target refuses a value": (PAUSES, "the target refuses a value"),
    "the target refuses a value …, too long": (f"{SCENARIOS}test_values.py", "test_a_key_that_the_target_cannot_take"),
    "the target refuses a value …, in a row": ("tests/server/postgres/test_errors.py", "in a row too wide for a page"),
    "… would be empty after a crash": (PAUSES, "would be empty after a crash of the target"),
    "… has triggers or rules": (PAUSES, "… has triggers or rules"),
    "… has policies that hide rows": (
        "tests/server/test_roles.py",
        "test_policies_that_an_operator_forces_on_the_worker_pause_that_index",
    ),
    "somebody began to detach it": (
        "tests/server/target/ddl/test_missing.py",
        "test_a_detachment_that_would_wait_for_a_transaction_names_it",
    ),
    "the target says, or the source says": (PAUSES, "the target says, or the source says"),
    "its load failed": (PAUSES, "test_a_load_that_the_source_ends_pauses_its_index_alone"),
    "its load was cancelled": (
        "tests/faults/test_schema_changes.py",
        "test_an_initial_load_that_was_cancelled_leaves_no_live_index",
    ),
    "its tables or views in the target have to change": (
        "tests/server/flows/setup/test_indexes.py",
        "test_a_transaction_that_uses_a_view_keeps_neither",
    ),
    "… is locked by": (
        "tests/server/scenarios/test_locks.py",
        "test_a_new_index_whose_table_is_locked_waits_alone",
    ),
    "column … of the chunks table, which": (
        "tests/server/preflight/test_dependents.py",
        "test_an_object_that_reads_the_chunks_table_itself",
    ),
    # outages
    "the source, or the connection to it": ("tests/faults/test_outages.py", "test_servers_that_restart_or_crash"),
    "no server, but the source's address": (
        "tests/faults/test_failover.py",
        "test_the_stream_follows_its_address_to_another_primary",
    ),
    "no server, but the target's address": (
        "tests/faults/test_target_failover.py",
        "test_the_worker_follows_its_targets_address_to_another_server",
    ),
    "the source's primary": ("tests/faults/test_failover.py", "test_the_index_follows_a_standby_promoted"),
    "the source, which is shut down": ("tests/faults/test_outages.py", "test_a_source_can_be_shut_down_while"),
    "the target": ("tests/faults/test_outages.py", "test_the_source_hears_of_the_worker"),
    "a free connection to a server that runs": (
        "tests/server/postgres/test_refusals.py",
        "test_a_server_without_a_free_connection_or_sender",
    ),
    "the embedder": ("tests/faults/test_provider.py", "test_an_outage_costs_vectors_their_freshness"),
    # connections
    "replication": (SILENCE, "test_a_connection_that_falls_silent"),
    "every other connection": (SILENCE, "test_a_connection_that_falls_silent"),
    "the server's end": ("tests/server/postgres/test_settings.py", "whose_host_is_gone_within_a_minute"),
    "the session that holds the pipeline's lock": (SILENCE, "test_a_standby_takes_over_from_a_worker"),
    "the other sessions of a worker that was killed, frozen or cut off": (
        "tests/faults/test_overtaken.py",
        "test_nothing_of_a_frozen_worker_comes_late",
    ),
    "the target's disk, which is full, or its writes": (
        "tests/faults/test_outages.py",
        "test_a_target_that_takes_only_reads",
    ),
    "our own old session in the target": (SILENCE, "old_session_ended"),
    "our own old sessions in transactions": ("tests/server/postgres/test_liveness.py", "lost_session_ended"),
    # gaps
    "the replication slot is gone": (GAPS, 'id="dropped"'),
    "the server has removed WAL": (GAPS, "test_a_slot_that_lost_its_wal_is_a_gap"),
    "the replication slot sends prepared transactions": (GAPS, 'id="made to send prepared transactions"'),
    "the replication slot belongs to the database": (GAPS, "test_a_slot_that_may_be_somebody_elses_is_kept"),
    "the slot is ahead of the index": (GAPS, 'id="recreated"'),
    "the source's WAL ends": (GAPS, "files put back"),
    "the source's WAL ends … before …, of which parts": (
        GAPS,
        "test_a_backup_that_ends_inside_of_what_was_applied_in_part",
    ),
    "the source's timeline … branched off … before the checkpoint": (
        "tests/faults/test_failover.py",
        "test_a_promoted_standby_that_lacks_what_is_indexed",
    ),
    "the source's timeline … branched off … before …, of which parts": (
        "tests/faults/test_failover.py",
        "test_a_failover_that_loses_a_transaction_that_was_applied_in_part",
    ),
    "the source does not tell where its timeline": (
        "tests/faults/test_failover.py",
        "test_a_promoted_standby_whose_history_is_gone",
    ),
    "the source fails each time that it decodes": (f"{SCENARIOS}test_encodings.py", "are_a_gap"),
    "the pipeline has no checkpoint": ("tests/faults/test_target_failover.py", "test_an_empty_checkpoint_beside"),
    "this is another cluster than before": (GAPS, "test_another_cluster_is_a_gap"),
    "the source is on timeline": ("tests/faults/test_failover.py", "and_not_the_primary_left_behind"),
}
"""By how the row begins: the file, and words of the test or of its case in there."""


SECTIONS = {
    "## Outages": ("What is away",),
    "## Servers that are away, and servers that say nothing": ("Connection",),
    "### What is followed, and what pauses": ("What happens to the table", "Reason"),
    "## After a gap": ("The worker says",),
}
"""The sections with such tables, and how the heads of these tables begin."""


def rows() -> list[str]:
    page, found = (ROOT / "docs/operations.md").read_text(), []
    for section, heads in SECTIONS.items():
        counts = False
        for line in page[page.index(f"\n{section}\n") + 1 :].splitlines()[1:]:
            if line.startswith("## "):
                break
            if not line.startswith("|"):
                counts = False
                continue
            cell = line.split("|")[1].strip()
            if counts and not cell.startswith("---"):
                found.append(cell)
            counts = counts or cell in heads
    return found


def holder(row: str) -> tuple[str, str] | None:
    begins = [begin for begin in HELD if row.startswith(begin)]
    return HELD[max(begins, key=len)] if begins else None


@pytest.mark.parametrize("row", rows())
def test_every_row_is_held_by_a_test(row: str) -> None:
    found = holder(row)
    assert found is not None, f"no test is named for the row {row!r}"
    path, words = found
    files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).rglob("*.py"))
    assert any(words in re.sub(r'"\s*\n\s*"', "", file.read_text()) for file in files if file != Path(__file__)), words


def test_no_row_is_named_that_is_not_there() -> None:
    assert {begin for begin in HELD if not any(row.startswith(begin) for row in rows())} == set()


def test_every_row_of_the_table_of_pauses_has_a_case_of_two_indexes() -> None:
    from tests.server.scenarios.test_pauses import CASES

    page = (ROOT / "docs/operations.md").read_text()
    table = page[page.index("| Reason | Remedy |") :].split("\n\n")[0]
    reasons = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    elsewhere = {
        "old rows of its partition": PARTITIONS,
        "the vectors of index": "tests/server/scenarios/test_changed_models.py",
        "the target refuses a value …, too long": "tests/server/scenarios/test_values.py",
        "the target refuses a value …, in a row": "tests/server/postgres/test_errors.py",
        "… has policies that hide rows": "tests/server/test_roles.py",
        "somebody began to detach it": "tests/server/target/ddl/test_missing.py",
        "its load failed": PAUSES,
        "the target says: cannot use": PAUSES,
        "its load was cancelled": "tests/faults/test_schema_changes.py",
        "its tables or views in the target": "tests/server/flows/setup/test_indexes.py",
        "… is locked by": "tests/server/scenarios/test_locks.py",
        "column …": "tests/server/preflight/test_dependents.py",
    }
    left = [one for one in reasons if not any(one.startswith(begin) for begin in (*CASES, *elsewhere))]
    assert left == []
    assert [begin for begin in CASES if not any(one.startswith(begin) for one in reasons)] == []


def of_section(heading: str) -> str:
    page = (ROOT / "docs/operations.md").read_text()
    return page[page.index(f"\n{heading}\n") :].removeprefix("\n").partition("\n## ")[0]


def first_cells(text: str) -> str:
    return "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))


def test_the_table_of_changes_has_every_key_of_an_index() -> None:
    from cdcsync.config.sections import Hnsw, Index

    keys = {*Index.__struct_fields__, *(f"hnsw.{name}" for name in Hnsw.__struct_fields__)} - {"hnsw"}
    named = set(re.findall(r"`([\w.]+)`", first_cells(of_section("## What a changed configuration does"))))
    assert keys - named == {"embedder"}  # "the embedder (another model, revision or dimensions)"
    assert named - keys == {"source.slot"}


def test_the_table_of_damaged_tables_has_every_table_that_indexes_share() -> None:
    from cdcsync.preflight.target import SHARED

    named = re.findall(r"`([a-z_]+)`", first_cells(of_section("## Damaged tables")))
    assert sorted(named) == sorted(SHARED)


def said_by_the_code() -> str:
    """Return every text of the package, each after a newline, with `…` in place of what it is filled with."""

    def text(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=str(value)):
                return value
            case ast.JoinedStr(values=values):
                return "".join(map(text, values))
            case ast.BinOp(left=left, right=right):
                return text(left) + text(right)
            case _:
                return "…"

    files = sorted((ROOT / "cdcsync").rglob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    parts |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    whole = (node for node in nodes if isinstance(node, ast.expr) and id(node) not in parts)
    return "".join("\n" + " ".join(text(node).split()) for node in whole)


def is_said(words: str, said: str) -> bool:
    """Say whether words are part of a text, or of one that is filled with another one from its beginning."""
    filled = (words.partition(f" {last}") for last in words.split()[1:])
    return words in said or any(f"{a} …" in said and f"\n{(b + c).strip()}" in said for a, b, c in filled)


def test_the_worker_says_of_gaps_what_the_table_says() -> None:
    said = said_by_the_code()
    table = of_section("## After a gap").partition("| The worker says |")[2].partition("\n\n")[0]
    for line in first_cells(table).splitlines()[1:]:
        for part in filter(None, re.split(r"…|, | or | \(", line.strip(" )"))):
            assert is_said(part.strip(" )"), said), f"{part!r} of {line!r}"


def test_words_that_the_code_does_not_say_would_be_noticed() -> None:
    said = said_by_the_code()
    assert is_said("the replication slot sends prepared transactions", said)
    assert not is_said("the replication slot has lost WAL", said)


def test_the_pages_have_the_connections_that_a_worker_opens() -> None:
    from cdcsync.preflight.connections import ON_TARGET, needed

    def count(generations: int) -> tuple[int, int]:
        wanted = needed(
            parse(configuration("dbname=nowhere"), {}, where="the test"), generations=generations, filling=0
        )
        return sum(wanted["source"].values()) + 1, sum(wanted["target"].values())  # the slot's is one more

    (source, one), (_, several) = count(1), count(4)
    assert count(5) == (source, several)
    names = {12: "twelve", 15: "fifteen"}
    readme, page = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/operations.md"))
    assert (
        f"{names[source]} on the source and {one} on the target with one index, {several} with four or more" in readme
    )
    assert f"it opens {names[source]} on the source, including the slot's." in page
    assert f"On the target it opens at most {names[sum(ON_TARGET.values())]}," in page
    assert f"makes {source + one} connections with one index and {source + several} with four or more" in page
