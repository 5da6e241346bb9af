"""The source server: its slot, its catalog and its tables.

    definitions   whether what decoding looks up changed
    marks         our marks in the WAL
    sizes         values that are too large to be read
    transactions  which transactions are open, and whose they are
    unreadable    rows that the server fails to read, told apart from the others
    columns       the columns of a table and their types
    conditions    conditions that someone wrote, as the server understands them
    related       the SQL that reads related tables with a table's rows
    publications  what a publication sends, and which statements it makes fail
    reads         one read: rows, and the snapshot that they were read under
    relations     the tables that are followed, as the catalog has them
    slot          the replication connection
    spool         large transactions on disk
    families      tables that are found by a pattern
    functions     what conditions go by
    statements    the SQL that reads one index's table
    catalog       everything else that is asked of the catalog
    keys          rows asked for by key, in parts if one of them cannot be read
    counts        how many rows a table has
    fitting       how many rows fit into a page
    tables        `SourceTable`: pages, rows by key, keys that are gone
    many          the same of many equal tables
    fingerprints  what an index's values are made of

A file imports only from lines above its own.
"""
