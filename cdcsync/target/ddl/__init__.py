"""The relations in the target: how they are created, upgraded and built.

    names         the names of an index's relations
    bm25          the index by which pg_textsearch ranks words
    policies      row-level security for the tool server's role
    grants        grants and options, which outlive the relation
    locking       exclusive locks that no search waits for
    views         how views are made and follow their index
    chunks_view   the view of all chunks
    tiers         one index's vectors, and the rules for writing them
    relations     one index's other tables
    generations   the vectors of other generations, and the switch from one to another
    rebuilding    the settled vectors built anew, beside those that are searched
    upgrading     the vectors table of earlier versions becomes two tiers
    shared        the tables that all indexes share
    building      HNSW and keyword indexes
    missing       what somebody dropped of all that

A file imports only from lines above its own.
"""
