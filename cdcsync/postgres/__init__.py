"""Sessions with a PostgreSQL server, source or target.

    passfile      libpq's password file where systemd hands it over
    texts         what PostgreSQL can hold as text
    refusals      why a connection could not be opened, in plain words
    interrupts    statements that end when the worker is told to stop
    liveness      connections whose far end is gone although the socket is open
    poolers       whether the pooler before a server shares sessions between its clients
    settings      what a session is opened with, and set to: it renders every value the same way
    errors        what the driver's errors mean for the pipeline
    logins        finding the addresses of the hosts, and logging in to the first that is the right server
    sessions      connections that come back after an outage
    followed      the server that a worker's main session is on, where all others have to be
    queries       one row, one value, or rows as text
    estimates     about how many rows a table has
    autovacuums   autovacuums that are to give way
    horizons      snapshots from before a moment
    locking       locks that nobody else has to suffer for
    temporary     temporary tables of sessions that live for weeks
    pool          a few sessions shared by the tasks of an application
    comparisons   the operators that compare keys as the server does
    collations    whether a library sorts otherwise than indexes were sorted

A file imports only from lines above its own.
"""
