"""The terms in which the worker reasons: rows, transactions, batches, positions. No socket, no clock, no event loop.

    rows          the columns an index needs of a row, and the changes of rows
    conditions    which rows an index has, as far as their own values tell
    transactions  messages of pgoutput into whole transactions
    batch         the changes that are applied together, the last one of each key
    progress      received, checkpoint, acknowledged: three positions and the rules between them
    visibility    which rows of a page are older than what the stream has delivered
    spec          one index as it is to be
    changeset     what one batch changes in one index

A file imports only from lines above its own.
"""
