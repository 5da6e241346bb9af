"""Problems of a file: all in one error, one for each key."""

from __future__ import annotations

import pytest

from cdcsync.config.problems import GENERAL_HINT, Problems
from cdcsync.errors import ConfigError


def raised(problems: Problems) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        problems.check("cdcsync.toml")
    assert refused.value.where == "cdcsync.toml"
    return refused.value


def test_no_problem_is_no_error() -> None:
    Problems().check("cdcsync.toml")


def test_a_single_problem_is_the_message_and_has_its_own_fix() -> None:
    problems = Problems()
    problems.add("source.dsn", "is missing", "name the database")
    error = raised(problems)
    assert (error.message, error.hint) == ("source.dsn: is missing", "name the database")


def test_several_problems_are_lines_in_the_order_found() -> None:
    problems = Problems()
    problems.add("b", "is wrong", "write 1")
    problems.add("a", "is missing")
    error = raised(problems)
    assert error.message == "2 problems\n  b: is wrong (write 1)\n  a: is missing"
    assert error.hint == GENERAL_HINT


def test_a_second_problem_of_a_key_is_left_out() -> None:
    problems = Problems()
    problems.add("a", "first")
    problems.add("a", "a consequence of the first")
    assert raised(problems).message == "a: first"
