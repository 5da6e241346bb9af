"""Our tables in the target: which there are, which the role may read, and what cannot be read of them.

A status is for whoever looks for a fault, so a fault in one table must not hide the others: what cannot be read of it
is told, and the reading goes on. Only a target that does not answer ends it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import LiteralString, TypeVar, cast

from psycopg import sql

from cdcsync.errors import CdcsyncError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, answers

T = TypeVar("T")

BRIEFLY: LiteralString = "SET lock_timeout = '500ms'"
"""How long a reading waits for a table that another session has locked, such as by VACUUM FULL, before it tells so."""


async def relations(target: Connection, schema: str) -> set[str]:
    """Return the names of all tables, views and sequences in our schema.

    They are found by their dependency on the schema: pg_class has no index that begins with it, and the target may hold
    a hundred thousand tables of others.

    Source: PostgreSQL, "pg_depend".
    """
    cursor = await target.execute(
        "SELECT c.relname FROM pg_depend AS d JOIN pg_class AS c ON c.oid = d.objid"
        " WHERE d.refclassid = 'pg_namespace'::regclass"
        " AND d.refobjid = (SELECT oid FROM pg_namespace WHERE nspname = %s) AND d.classid = 'pg_class'::regclass",
        [schema],
    )
    return {cast(str, row[0]) for row in await cursor.fetchall()}


@contextmanager
def telling(target: Connection, tell: Callable[[CdcsyncError], None], *, where: str) -> Iterator[None]:
    """Tell why what is read inside cannot be read, instead of raising that.

    :raises TargetUnavailable: the target does not answer.
    """
    try:
        with speaking_of("target", where=where):
            yield
    except CdcsyncError as error:
        if not answers(target, error):
            raise
        tell(error)


class Notes:
    """Reads the tables in which workers note what a status shows.

    :param present: the names of the relations in our schema.
    :param problems: takes what cannot be read, and what to do about it.
    """

    def __init__(self, target: Connection, schema: str, present: set[str], problems: list[str]) -> None:
        self._target = target
        self._schema = schema
        self._present = present
        self._problems = problems

    async def read(self, name: str, reading: Callable[[], Awaitable[T]]) -> T | None:
        """Return what a reading of a table gives; None if the table is not there or cannot be read.

        A role that was granted tables by name need not have newer ones.
        """
        if name not in self._present:
            return None
        table = sql.Identifier(self._schema, name).as_string(self._target)

        def tell(error: CdcsyncError) -> None:
            self._problems.append(f"{table} cannot be read, and what it tells is left out: {error.with_fix}")

        with telling(self._target, tell, where=table):
            if await fetch_value(self._target, "SELECT has_table_privilege(%s::regclass, 'SELECT')", [table]):
                return await reading()
            self._problems.append(
                f"this role may not read {table}, and what it tells is left out: GRANT SELECT ON {table}"
            )
        return None
