"""The verify flow: shows that an index equals its source, or where it does not, while both are in use.

    sums per bucket of keys, by the servers ─► rows of buckets that differ ─► candidates ─► the engine, at a mark

1. Both servers sum a hash of every document per bucket of its key, in whatever order they like. Only the rows of
   buckets whose sums differ are looked at, and give candidates: documents that may differ, or that were just changing.
   Neither sum needs to be of one moment, as nothing is concluded from a candidate.
2. The candidates go to the backfill engine as a request. It compares each under the snapshot-and-mark rule, as of a
   place in the stream: what it reports differs, whatever is written meanwhile. What was equal at 1 needs no second
   look.
3. What the index must be in itself, vectors above all, is read under one snapshot of the target.

`repair` asks for a replay of exactly the keys that were found.

Not seen: whether the chunker would cut a document in other places today, as only chunking it again would tell. A
change of the chunking's configuration or of the chunker is known by its fingerprint, and has all of them cut again.

    digests       the sums, and the rows behind them
    soundness     what the index must be in itself
    verification  `verify`, `repair`, the schedule

A file here imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.flows.audit.verification import FAILED, Verification, repair, verify, verify_for_ever

__all__ = ["FAILED", "Verification", "repair", "verify", "verify_for_ever"]
