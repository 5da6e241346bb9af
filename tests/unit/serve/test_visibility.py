"""What callers may see: with a bound column the rows of their tenant, and of the columns all but that one."""

from __future__ import annotations

import pytest

from cdcsync.config.serving import Serve, Tenant
from cdcsync.serve.identity import Principal
from cdcsync.serve.problems import Problem
from cdcsync.serve.visibility import Visibility
from cdcsync.target.ddl.filters import Column
from cdcsync.target.ddl.policies import SETTING
from tests.support.indexes import make_spec

ANA = Principal("ana", "3")
SPEC = make_spec()
COLUMNS = {"tenant": Column("pg_catalog.int4", "integer", {"eq": "OPERATOR(pg_catalog.=)"})}


def test_without_a_bound_column_everything_is_shown_and_asked_for_as_it_is() -> None:
    visible = Visibility(Serve())
    assert visible.shown(["id", "tenant"]) == ["id", "tenant"]
    assert visible.settings(ANA) == {}
    assert visible.condition(ANA, SPEC, COLUMNS).as_string(None) == "true"
    assert visible.bound(COLUMNS) is None
    assert visible.filter(ANA, SPEC, {"anything": 1}) == {"anything": 1}
    assert visible.divides(SPEC)


def test_a_bound_column_is_hidden_and_decided_by_the_claim() -> None:
    visible = Visibility(Serve(tenant=Tenant(column="tenant")))
    assert visible.shown(["id", "tenant"]) == ["id"]
    assert visible.settings(ANA) == {SETTING: "3"}
    own = visible.condition(ANA, SPEC, COLUMNS).as_string(None)
    assert own == "\"tenant\" OPERATOR(pg_catalog.=) '3'::pg_catalog.int4"
    assert visible.bound(COLUMNS) is COLUMNS["tenant"]
    assert visible.filter(ANA, SPEC, {"id": 7}) == {"id": 7, "tenant": "3"}


@pytest.mark.parametrize("column", ["tenant", "nothing"])
def test_a_filter_on_the_bound_column_is_told_the_same_as_one_on_none(column: str) -> None:
    visible = Visibility(Serve(tenant=Tenant(column="tenant")))
    with pytest.raises(Problem) as refused:
        visible.filter(ANA, SPEC, {column: "2"})
    assert refused.value.detail == f"the filter names a column that the index does not have: {column}"
    assert refused.value.fix == "the columns are id"


def test_an_index_without_the_bound_column_is_refused_whatever_is_asked() -> None:
    visible = Visibility(Serve(tenant=Tenant(column="room")))
    assert not visible.divides(SPEC)
    assert visible.bound(COLUMNS) is None
    for ask in (lambda: visible.filter(ANA, SPEC, {}), lambda: visible.condition(ANA, SPEC, COLUMNS)):
        with pytest.raises(Problem, match="not divided by tenants"):
            ask()
