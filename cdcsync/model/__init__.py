"""The terms in which the worker reasons: rows, transactions, batches, positions. No socket, no clock, no event loop.

    rows           the columns an index needs of a row, and the changes of rows
    conditions     which rows an index has, as far as their own values tell
    vectors        vectors that a search can find
    links          how a row of a related table tells its documents
    descriptions   which description of a table holds beside streamed transactions
    transactions   pgoutput messages into whole transactions
    batch          the changes that are applied together, the last one of each key
    progress       received, checkpoint, kept, acknowledged: four positions and the rules between them
    chain          what a worker last saw committed of its pipeline's row, and what continues it
    visibility     which rows of a page are older than what the stream has delivered
    lag            how long the oldest commit has been waiting
    pauses         why an index does not follow its table, and whether it may resume
    requests       requests to read a source table
    embedding      facts about an embedder that are kept in the target
    spec           a complete description of an index
    changeset      what one batch changes in one index

A file imports only from lines above its own.
"""
