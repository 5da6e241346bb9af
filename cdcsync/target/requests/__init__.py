"""Backfill requests: rows of the table `backfills`, which any process writes and the worker serves.

Requests of one index are served in the order they came, one at a time. A paused one lets those behind it pass. Between
two pages, a load gives way to short requests of other indexes, and resumes after them.

    tables       the tables, and what is read of them
    history      questions: what is open, and how an index was loaded
    queue        the worker's side: what is served, and how far it is
    submission   asking for a backfill
    rebuilds     asking for documents of related rows to be rebuilt

A file imports only from lines above its own.
"""
