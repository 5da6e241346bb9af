"""Migrations: from one generation of vectors to another, without a gap in searches and without a mixed answer.

    start ─► fill ─► build HNSW ─► ready ─► compare ─► activate ◄─► rollback ─► drop

The worker fills and drops generations, as it writes all of them; a command asks for both through the table
`generations`. Which of them is live changes in one transaction, by a command.

    present   the generations that an index has
    compare   two generations beside each other
    start, switch, drop   what `cdcsync migrate` does: each checks, changes something in one transaction, and returns
              what an operator sees; done twice, it finds its work done or does the rest
    fill      the vectors of a generation, from the stored chunks; and its HNSW index
"""
