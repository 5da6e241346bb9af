"""Sessions with a PostgreSQL server, source or target.

    refusals      why a connection could not be opened, in plain words
    sessions      connections that render every value the same way, and that come back after an outage
    liveness      connections whose far end is gone although the socket is open
    interrupts    statements that end when the worker is told to stop
    comparisons   the operators that compare keys as the server does
    conditions    conditions that a user writes in SQL

A file imports only from lines above its own.
"""
