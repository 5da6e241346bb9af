"""What befalls an index in the target by others: the target's library, and its administrators.

`check` asks it before a start, and the watch asks it while the worker runs. Nothing of an index depends on the answer:
where there is none, that is told, and the index is followed all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cdcsync.config import Config
from cdcsync.errors import IndexFault
from cdcsync.postgres.errors import speaking_of
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
    :raises TargetUnavailable: the target does not answer now.
    """
    schema = config.target.schema
    found: list[Finding] = []
    with _looking(found, plan.name, "the collations of its indexes"):
        found += await stored_findings(connection, schema, plan.name, stored.relations)
    if not stored.hidden:
        tables = [] if catalog is None else [catalog.tables.get(one) for one in catalog.single(plan.index.followed)]
        secured = [one for one in tables if one is not None and one.secured]
        with _looking(found, plan.name, "who may read it"):
            found += await reader_findings(connection, schema, stored, secured, config.serve.role)
    return found


@contextmanager
def _looking(found: list[Finding], index: str, what: str) -> Iterator[None]:
    where = f"indexes.{index}"
    try:
        with speaking_of("target", where=where, index=index):
            yield
    except IndexFault as error:
        found.append(Finding.warning(where, f"{what} cannot be looked at: {error.message}", error.hint))
