"""The teardown flows: remove what a pipeline left on the source, and on request the index itself; or one index.

    ask ─► see that the source's locks are free ─► in the target: rows, view, tables
        ─► on the source: publication, then slot ─► commit in the target

1. The pipeline's lock is held throughout: no worker runs meanwhile, and none can start. If a worker that is just ending
   still holds the lock or the slot, it is waited for.
2. Everything that could refuse is asked before anything is dropped.
3. Each step finds its work done or does it, so an interrupted teardown is finished by the next one. Only the rows in
   the target tell what there is on the source and which server that is, so they go last: after everything in the
   target is dropped, so that nothing there can refuse any more, the source's part is done, and then the target commits.
4. What is searched meanwhile is locked only briefly, and tried again: each search locks these tables in an order of its
   own, and none may fail by a deadlock with us or wait behind us for others.
5. While we wait on one server we hold no lock on the other. So the statement on the publication is first tried and
   rolled back, which waits for who is in its way. Once the target's tables are locked, the source has `LET_GO_S`. If
   somebody locks the publication or a table of it in between, the target rolls back, and all of this begins again.
   Without `--purge` the source has no time limit: we hold nothing but the pipeline's lock, and only workers want that.
6. The publication goes before the slot: only for the former may a lock be in the way, and an index whose slot is gone
   has to be read again.

    workers        no worker follows what is dropped
    publication    what becomes of a publication, and of the tables in it
    both_servers   one drop in the target and on the source
    one_index      `drop`
    pipeline       `teardown`

A file imports only from lines above its own.

Source: PostgreSQL, "Replication Management Functions", "DROP PUBLICATION", "Dependency Tracking".
"""
