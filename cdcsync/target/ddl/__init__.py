"""The relations in the target: how they are created, upgraded and built.

    names         the names of an index's relations
    views         the search view, and following it when it is renamed
    relations     one index's tables
    shared        the tables that all indexes share
    building      HNSW and keyword indexes

A file imports only from lines above its own.
"""
