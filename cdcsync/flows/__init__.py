"""The flows of a pipeline: each reads top to bottom in the order that data moves.

    blocked      waits for transactions of others
    embed/       from the backlog to vectors
    backfill/    reading tables while changes stream in
    follow/      from the slot to the target
    replay       requests to read rows again
    dry_run      what reading rows again would embed, and cost
    build        HNSW and keyword indexes after a load
    setup/       what is created before following starts; gaps; partitions
    plan         what `run` would do, and what that embeds
    retention    how much WAL the slot holds of what it may
    address      whether the source's address still leads to the server that is followed
    heartbeat    a message now and then, which shows that an idle pipeline moves
    truncations  tables with new files that a TRUNCATE of the stream explains
    watch        changes that the stream does not report
    settle       moves vectors into HNSW when they have not changed for a while
    words        how often words occur, for keyword search
    audit/       comparing an index with its source
    evaluate/    search recall, and how well judged questions are answered
    migrate/     from one generation of vectors to another
    teardown/    removing what was created

A file imports only from lines above its own.
"""
