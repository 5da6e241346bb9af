"""Which texts may stand where one condition in SQL belongs."""

from __future__ import annotations

import pytest

from cdcsync.errors import SetupError
from cdcsync.postgres.conditions import check_filter


@pytest.mark.parametrize("where", ["true; DROP TABLE articles", "true -- and no more", "tenant = 1 /* or 2"])
def test_more_than_one_expression_is_refused(where: str) -> None:
    with pytest.raises(SetupError, match="more than one expression") as caught:
        check_filter(where)
    assert caught.value.where == where


def test_one_condition_passes() -> None:
    check_filter("tenant = ANY('{1,2}') AND title LIKE 'a%' OR price - 1 > 2")
