"""Preflight: proves that a configuration can work before anything is created or changed.

    findings         `Finding`; how a failed check becomes one
    administration   the SQL that prepares a database for a worker
    source           the source's server, role, slot and publication
    tables           each index's table, its columns and its key
    proposal         an index over a table, for `init`
    expressions      functions that reading a table runs
    sending          what the publication sends, and which of the application's writes it makes fail
    target           the target's server, pgvector and our schema
    types            the columns' types in the target
    indexes          each index: its model, what is stored of it, and its `IndexSpec`
    families         an index over many equal tables
    related          an index's related tables
    collations       keys that the servers sort otherwise than they did
    readers          who reads an index past row-level security
    surroundings     what may befall an index in the target by others; the watch asks it too
    generations      the vectors of an index, if the configuration asks for others
    beside           its chunks, likewise, and those that stand beside them
    following        whether each index can follow its table; the watch asks it too
    dependents       objects of users on an index whose columns change
    layout           where an index lies: its tables, its view, its keyword search
    embedders        the models
    machine          this machine's disk and network
    connections      how many connections the servers have left
    hosts            whether a DSN of several hosts leads to the primary only
    identity         which server the source is, and whether an index followed it
    report           `Report`, `refuse`
    examination      `examine`, all of it in order

Every check only reads. A failed check does not keep the next from running, so that one run reports all there is to fix.
Code outside this package imports from here. A file in it imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.preflight.embedders import (
    build_embedders,
    examine_embedders,
    examine_rerankers,
    local_models,
    unpinned,
)
from cdcsync.preflight.examination import examine
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.report import Report, refuse

__all__ = [
    "Finding",
    "Report",
    "build_embedders",
    "examine",
    "examine_embedders",
    "examine_rerankers",
    "local_models",
    "refuse",
    "unpinned",
]
