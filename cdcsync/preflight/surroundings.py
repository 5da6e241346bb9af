"""What befalls an index in the target by others: the target's library, and its administrators.

`check` asks it before a start, and the watch asks it while the worker runs.
"""

from __future__ import annotations

from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.collations import stored_findings
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan
from cdcsync.target.entries import Entry


async def surrounding_findings(connection: Connection, schema: str, plan: Plan, stored: Entry) -> list[Finding]:
    """Return what is to be said of what surrounds an index that exists.

    :param schema: that of our own tables.
    """
    return await stored_findings(connection, schema, plan.name, stored.relations)
