"""The attributes of a hit: those of its index's columns, and its own."""

from __future__ import annotations

from cdcsync.target.ddl.hits import OWN, attribute_of, wanted_attributes
from tests.support.indexes import make_spec


def test_a_hit_has_key_and_carried_columns_and_then_what_the_search_says_of_it() -> None:
    spec = make_spec(key={"tenant": "bigint", "id": "uuid"}, carried={"status": "text"})
    assert wanted_attributes(spec) == {"tenant": "bigint", "id": "uuid", "status": "text"} | OWN


def test_a_column_that_is_called_as_one_of_a_hits_own_attributes_keeps_apart_from_it() -> None:
    spec = make_spec(carried={"score": "numeric(3,1)"})
    assert attribute_of("score") == "carried_score"
    assert list(wanted_attributes(spec)) == ["id", "carried_score", *OWN]
