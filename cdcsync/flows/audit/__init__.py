"""The audit flow: shows that an index equals its source, or where it does not, while both are in use.

    digests of a page, by both servers ─► suspects ─► the engine, at a mark ─► what differs ─► a replay of those keys

1. Each server computes a digest of every document of a page over its own rows. Keys whose digests differ, and keys of
   the index that the source does not have, are suspects: they may differ, or be changing just now.
2. Suspects go to the backfill engine as a request. It compares each under the snapshot-and-mark rule, as of a place in
   the stream: what it reports does differ, although rows are written meanwhile. What was equal at 1 needs no second
   look.
3. What the index must be in itself, vectors above all, is read in ranges of chunks, each under one snapshot of the
   target.
4. What differs is read again: `verify --repair` does so when asked, and the rolling audit by itself.

Not seen: whether the chunker would cut a document in other places today, as only chunking it again would tell. A
change of the chunking's configuration or of the chunker is known by its fingerprint, and has all of them cut again.

    digests       digests of a page of the source, and of the same keys in the index
    soundness     what the index must be in itself
    comparison    one step of a comparison, from wherever it was left
    verification  `verify` and `repair`: a whole comparison at once
    rolling       the same in the background, for ever, at a bounded rate
    requested     comparisons that the worker is asked for, where changes may not have been sent

A file here imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.flows.audit.comparison import FAILED, EnsureWorker
from cdcsync.flows.audit.requested import compare_for_ever
from cdcsync.flows.audit.rolling import RollingAudit
from cdcsync.flows.audit.verification import (
    Findings,
    Verification,
    missing_of,
    repair,
    require_still_searched,
    verify,
)

__all__ = [
    "FAILED",
    "EnsureWorker",
    "Findings",
    "RollingAudit",
    "Verification",
    "compare_for_ever",
    "missing_of",
    "repair",
    "require_still_searched",
    "verify",
]
