"""The rows and columns that a caller may see: the rows of its tenant, and never the column that tells tenants apart.

The tenant of a caller is held twice: by a condition that is added to every statement, and by row-level security in the
target (`target/ddl/policies`), for which the caller's tenant is set in each transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from psycopg import sql

from cdcsync.config.serving import Serve
from cdcsync.model.spec import IndexSpec
from cdcsync.serve.identity import Principal
from cdcsync.serve.problems import Problem
from cdcsync.target.ddl.policies import SETTING


class Visibility:
    """The rows and columns that callers may see. Without a bound column everybody sees everything."""

    def __init__(self, serve: Serve) -> None:
        self._column = serve.tenant.column

    def shown(self, columns: Iterable[str]) -> list[str]:
        """Return those of some columns that callers may know of."""
        return [column for column in columns if column != self._column]

    def settings(self, who: Principal) -> dict[str, str]:
        """Return the settings by which row-level security knows the caller's tenant."""
        return {SETTING: who.tenant or ""} if self._column is not None else {}

    def condition(self, who: Principal, spec: IndexSpec) -> sql.Composable:
        """Return the condition that a row is the caller's.

        :raises Problem: the index does not have the bound column.
        """
        if self._column is None:
            return sql.SQL("true")
        self._refuse_undivided(spec)
        return sql.SQL("{}::pg_catalog.text = {}").format(sql.Identifier(self._column), sql.Literal(who.tenant))

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
            raise Problem(403, "Not allowed", f"the index {spec.name} is not divided by tenants")
