"""What befalls an index in the target by others: the target's library, and its administrators.

`check` asks it before a start, and the watch asks it while the worker runs.
"""

from __future__ import annotations

from cdcsync.config import Config
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.collations import stored_findings
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan
from cdcsync.preflight.readers import reader_findings
from cdcsync.source.catalog import Catalog
from cdcsync.target.entries import Entry


async def surrounding_findings(
    connection: Connection, config: Config, plan: Plan, stored: Entry, catalog: Catalog | None
) -> list[Finding]:
    """Return what is to be said of what surrounds an index that exists.

    :param catalog: the source's tables; None if they could not be read.
    """
    schema = config.target.schema
    found = await stored_findings(connection, schema, plan.name, stored.relations)
    if not stored.hidden:
        tables = [] if catalog is None else [catalog.tables.get(one) for one in catalog.single(plan.index.followed)]
        secured = [one for one in tables if one is not None and one.secured]
        found += await reader_findings(connection, schema, stored, secured, config.serve.role)
    return found
