"""The index in the target: its tables, what is written to them, and how they are searched.

    version       the version of our tables
    entries       a row of the table `indexes`
    registry      the table `indexes`
    pipelines     the table `pipelines`: lease, fence, checkpoint
    generations   the table `generations`
    freshness     how far an index is, as readers see it
    approvals     the table `approvals`
    audits        the table `audits`
    calls         the record of calls of the tool server
    embedders     the table `embedders`
    evaluations   the table `evaluations`
    judged_runs   the table `judged_runs`
    beside        indexes with chunks of two generations, and the sections that they are made by
    requests/     the table `backfills`
    ddl/          relations: how they are created, upgraded and built
    vectors       vectors in pgvector's binary form
    loading       documents of a new index, copied straight into its tables
    failures/     rows and texts that failed
    look_ups      what of a batch is new to an index
    search/       searches
    snapshots     one snapshot of tables that others may replace
    waits         an application's waits for positions
    settling      from the fresh tier into HNSW
    tidying       what changed vectors leave behind in the fresh tier
    backlog       the queue of the embed loop
    filling       the vectors of another generation
    belongings    what is whose, and how it is dropped
    stage         the temporary table of a batch's rows
    keys          the keys that an index holds
    statements    the statements of apply
    apply         what one index takes from a batch
    locked_session   a connection that holds the pipeline's lock
    session       the connection that writes, under lock and fence

A file imports only from lines above its own.
"""
