"""Transaction ids: used up, and how many a session's temporary tables hold back."""

from __future__ import annotations

from tests.support.servers import Database

USED = 50


def use_transactions(database: Database) -> None:
    """Use up `USED` transaction ids."""
    for _ in range(USED):
        database.execute("SELECT pg_current_xact_id()")


def held_back(database: Database) -> dict[str, int]:
    """Return the temporary tables, with those of their TOAST, that are as old as what was used up."""
    found = database.execute(
        "SELECT oid::regclass::text, age(relfrozenxid) FROM pg_class"
        " WHERE relpersistence = 't' AND relkind IN ('r', 't') AND age(relfrozenxid) >= %s",
        [USED],
    )
    return dict(found)
