"""Migrations: from one generation of vectors to another, without a gap in searches and without a mixed answer.

    start ─► fill ─► build HNSW ─► ready ─► compare ─► activate ◄─► rollback ─► drop

The worker fills and drops generations, as it writes all of them; a command asks for both through the table
`generations`. Which of them is live changes in one transaction, by a command.

    present   the generations that an index has
    compare   two generations beside each other
    models    whether the configurations of worker and command have an embedder for a generation
    beside    `migrate start` to other chunks
    start     `migrate start`
    switch    `migrate activate` and `rollback`
    drop      `migrate drop`
    withdrawal  requests whose command was interrupted
    fill      the vectors of a generation, from the stored chunks; and its HNSW index

The commands check, change something in one transaction, and return what an operator sees. Done twice, they find their
work done or do the rest. A file imports only from lines above its own.
"""
