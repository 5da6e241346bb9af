"""Search: the chunks or documents nearest to a query, by vector, by words, or by both.

    arguments     what no search can use
    values        values of an index's columns, as answers have them
    words         how often words occur, which the keyword leg weights them by
    nearest       the search by vector alone, to measure recall with
    stored        an index as the target has it
    query         search: calls the function

Code outside this package imports from here. A file in it imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.target.ddl.nearness import FUSION, MAX_HITS
from cdcsync.target.ddl.searching import drop_search, put_search
from cdcsync.target.search.arguments import (
    Mode,
    check_arguments,
    check_opening,
    check_switch,
    check_text,
    check_wait,
    check_whole,
)
from cdcsync.target.search.nearest import Effort, nearest_statement, tune, usual_effort
from cdcsync.target.search.query import (
    NO_SETTINGS,
    TIMEOUT_S,
    Filter,
    Hit,
    Plan,
    check_condition,
    refusal,
    search,
)
from cdcsync.target.search.stored import served_now, stored_spec
from cdcsync.target.search.values import load_values, value_in_path, written_value
from cdcsync.target.search.words import count_words

__all__ = [
    "FUSION",
    "MAX_HITS",
    "NO_SETTINGS",
    "TIMEOUT_S",
    "Effort",
    "Filter",
    "Hit",
    "Mode",
    "Plan",
    "check_arguments",
    "check_condition",
    "check_opening",
    "check_switch",
    "check_text",
    "check_wait",
    "check_whole",
    "count_words",
    "drop_search",
    "load_values",
    "nearest_statement",
    "put_search",
    "refusal",
    "search",
    "served_now",
    "stored_spec",
    "tune",
    "usual_effort",
    "value_in_path",
    "written_value",
]
