"""The rows and columns that a caller may see: the rows of its tenant, and never the column that tells tenants apart.

The tenant of a caller is held twice: by a condition that is added to every statement, and by row-level security in the
target (`target/ddl/policies`), for which the caller's tenant is set in each transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn

import msgspec
import structlog
from psycopg import sql

from cdcsync.config.serving import Serve
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.serve.identity import Principal
from cdcsync.serve.problems import Problem
from cdcsync.target.ddl.filters import Column, read_value
from cdcsync.target.ddl.policies import SETTING

log = structlog.get_logger()

CUT = ("pg_catalog.name", 'pg_catalog."char"')
"""The types that take a longer text than they hold, and cut it."""

CLAIMS = 10_000
"""Claims of which an index remembers what they are as values: some hundred bytes each."""


async def read_claim(connection: Connection, column: Column, claim: str) -> str | None:
    """Return the text of the value that a claim is of a column's type, such as `1` for `01`; None if it is none."""
    value = await read_value(connection, column, claim)
    # These types cut a text that is too long for them, without a word: it would be the value of somebody else.
    return None if column.type in CUT and value != claim else value


class Visibility:
    """The rows and columns that callers may see. Without a bound column everybody sees everything."""

    def __init__(self, serve: Serve) -> None:
        self._column = serve.tenant.column
        self._claim = serve.tenant.claim
        self._read: dict[tuple[str, str], str] = {}
        self._told: set[tuple[str, str]] = set()

    def bound(self, columns: Mapping[str, Column]) -> Column | None:
        """Return the bound column, out of those that an index has; None if none is bound, or it does not have it."""
        return None if self._column is None else columns.get(self._column)

    async def held_to(
        self, who: Principal, index: str, column: Column, lend: Callable[[], AbstractAsyncContextManager[Connection]]
    ) -> Principal:
        """Return a caller whose tenant is written as the server writes values of the bound column's type.

        :param lend: lends a session in autocommit, if the claim is a new one.
        :raises Problem: the claim is no value of this type; the log tells that once.
        """
        asked = column.type, who.tenant or ""
        value = self._read.get(asked)
        if value is None:
            async with lend() as connection:
                value = await read_claim(connection, column, asked[1])
            if value is None:  # now: a value may be added to an enum
                self._refuse(index, column, asked)
            if len(self._read) >= CLAIMS:
                self._read.clear()
            self._read[asked] = value
        return msgspec.structs.replace(who, tenant=value)

    def _refuse(self, index: str, column: Column, asked: tuple[str, str]) -> NoReturn:
        """Refuse a claim that is no value of the bound column's type; the log tells of each once."""
        if asked not in self._told:
            if len(self._told) >= CLAIMS:
                self._told.clear()
            self._told.add(asked)
            fix = f"give the caller a token whose {self._claim} is a value of that type"
            log.warning("claim_not_a_value", index=index, column=self._column, type=column.shown, fix=fix)
        raise Problem(
            403,
            "Not allowed",
            f"the token's {self._claim} is none that the index {index} can have",
            "ask for a token with another one",
        )

    def shown(self, columns: Iterable[str]) -> list[str]:
        """Return those of some columns that callers may know of."""
        return [column for column in columns if column != self._column]

    def settings(self, who: Principal) -> dict[str, str]:
        """Return the settings by which row-level security knows the caller's tenant."""
        return {SETTING: who.tenant or ""} if self._column is not None else {}

    def condition(self, who: Principal, spec: IndexSpec, columns: Mapping[str, Column]) -> sql.Composable:
        """Return the condition that a row is the caller's, as the caller's filter and the policy compare it.

        :raises Problem: the index does not have the bound column.
        """
        if self._column is None:
            return sql.SQL("true")
        self._refuse_undivided(spec)
        return columns[self._column].equals(self._column, sql.Literal(who.tenant))

    def filter(self, who: Principal, spec: IndexSpec, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the caller's filter along with what its claims add.

        :raises Problem: it names a column that the caller does not know of, or the index does not have the bound one.
        """
        if self._column is None:
            return dict(wanted)
        self._refuse_undivided(spec)
        columns = self.shown(sorted(spec.shape.key + spec.shape.carried))
        if unknown := [name for name in wanted if name not in columns]:
            raise Problem(
                422,
                "The call cannot be answered",
                f"the filter names a column that the index does not have: {unknown[0]}",
                f"the columns are {', '.join(columns)}",
            )
        return {**wanted, self._column: who.tenant}

    def divides(self, spec: IndexSpec) -> bool:
        """Say whether the index has the bound column, if one is bound: its worker may not have added it yet."""
        return self._column in (None, *spec.shape.key, *spec.shape.carried)

    def _refuse_undivided(self, spec: IndexSpec) -> None:
        """Refuse an index without the bound column: nobody can tell what is the caller's."""
        if not self.divides(spec):
            raise Problem(
                403,
                "Not allowed",
                f"the index {spec.name} is not divided by tenants",
                "search another index, or ask the server's operator for the tenants' column in this one",
            )
