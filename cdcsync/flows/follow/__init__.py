"""The stream flow: from the slot to the target, exactly once.

    sight        readings of the source that see what was delivered
    related      the documents that a change of related rows concerns
    prepare      changes into documents, chunks and the vectors that are available already
    next_batch   prepares a batch while the one before it is written
    open_batch   between receiving and applying: a batch, room for more, a position
    receive      the slot's connection: frames into events, statuses on time
    apply        the target's transaction: a batch is committed, whatever is away meanwhile
    accounts     what a committed batch means for metrics and for the embedders
    stream       receiver and applier over one open batch, for one connection

A file imports only from lines above its own.
"""
