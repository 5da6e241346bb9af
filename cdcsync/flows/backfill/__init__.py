"""The backfill flow: reads a table in key order while changes stream in, without locks and without long snapshots.

    page (rows + snapshot) ─► mark in the WAL ─► the stream meets the mark ─► rows that nothing newer overtook ─► apply

A page is read in one short transaction, then a mark is written to the source's WAL. When the stream delivers the
mark, every transaction that the page's snapshot sees has been delivered before it. Those that the snapshot does not
see and that were delivered all the same have left their keys in the index's `Deliveries`: these rows are dropped,
the stream had newer ones. What is delivered after the mark is applied after the page. The cursor commits together
with the rows, so a crash repeats at most the pages in flight.

One engine serves every kind of request, one at a time: the initial load, a replay of all rows, of some or of given
keys, a resync, and the part of a verification that compares single documents. Between two pages, a request that reads a
table gives way to shorter ones of other indexes.

    preparing  documents, chunks and vectors of a page, made before its mark arrives
    pages      the readers of pages: rows in key order, given keys, keys of the index
    checking   what a verification says of a document
    pace       how large a page may be, and how soon the next one may follow
    marks      pages on their way to the target, between the engine and the stream
    engine     `Backfills`: takes requests, and reads what they ask for

A file here imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.flows.backfill.engine import Backfills

__all__ = ["Backfills"]
