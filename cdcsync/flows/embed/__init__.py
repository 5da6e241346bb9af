"""The embed flow: from texts that wait in the backlog to vectors, at the model's pace and nobody else's.

    backlog ─► window (live lane first) ─► sorted by length, cut into batches ─► model ─► vectors

A *dispatcher* is one embedder with its queue: a local model takes one call at a time, a provider as many as it has
connections. The embed loops of all indexes that use it take turns, and apply may use it inline when it has a place
free. A text that is under way is not asked for again, whoever wants it. What an inline call does not finish within its
budget is not lost: the dispatcher keeps the result, and the loop stores it when it finds the text in the backlog.

The texts of a call that failed are *suspects*. They are asked for apart from all others, one call at a time, until it
is known which of them is at fault.

While the stream is far behind, embedding waits for a moment: what a text is now, it will not stay.

    health      whether an embedder works as a whole, and until when it is left alone
    suspects    the texts of calls that failed, and how to ask for them
    calls       one embedder's calls, and whose fault it is when one fails
    pace        how quick an embedder is, and how large its calls should be
    dispatcher  one embedder and its queue
    pages       a page's texts, embedded before it is applied
    pool        the connections that all loops share
    commits     when the source committed what waits
    loop        one index's backlog
    notes       what is known of embedders, kept in the target
    probe       notices that a provider serves another model under the same name

A file here imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.flows.embed.dispatcher import Dispatcher
from cdcsync.flows.embed.loop import EmbedLoop
from cdcsync.flows.embed.notes import note_for_ever, recall
from cdcsync.flows.embed.pool import BacklogPool
from cdcsync.flows.embed.probe import probe_for_ever

__all__ = ["BacklogPool", "Dispatcher", "EmbedLoop", "note_for_ever", "probe_for_ever", "recall"]
