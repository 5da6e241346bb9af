"""Migrations: from one generation of vectors to another, without a gap in searches and without a mixed answer.

    start ─► fill ─► build HNSW ─► ready ─► compare ─► activate ◄─► rollback ─► drop

The worker fills and drops generations, as it writes all of them; a command asks for both through the table
`generations`. Which of them is live changes in one transaction, by a command.

    fill       the vectors of a generation, from the stored chunks; and its HNSW index
    compare    two generations beside each other
    commands   what `cdcsync migrate` does
"""
