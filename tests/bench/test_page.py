"""What docs/benchmarks.md says of the benches that ran, and of those that did not."""

from __future__ import annotations

from typing import Any

import pytest

from bench._all import GOALS, MORE, asked, kept, remembered, section, written

RUN = {"at": "2026-11-28 10:04 UTC", "machine": "2 processors", "postgresql": "18", "python": "3.11.7"}
LATER = RUN | {"at": "2026-11-29 11:00 UTC"}


def found(ratio: float, **more: Any) -> dict[str, Any]:
    """Return what a bench says, with one ratio."""
    said = {"bench": "drain", "figures": {"rows_per_s": 1000.0}, "ratios": {"ours": ratio}, "goals": {"ours": 1.0}}
    run = {"seconds": 9.0, "load": 1.5, "arguments": "ROUNDS=3"}
    return {**said, "against": {"ours": "psycopg2, same run"}, "smaller": {}, **run, **more}


def test_a_row_names_the_other_side_and_the_last_value() -> None:
    first = kept(None, found(0.9), RUN)
    page = section("drain", kept(first, found(1.2), LATER))

    assert "| `ours` | 1.20 | 1.00 | met | psycopg2, same run | 0.9000 |" in page
    assert page[0].startswith("`bench/drain.py` ROUNDS=3, 2026-11-29 11:00 UTC, 2 processors, PostgreSQL 18")
    assert page[0].endswith("Last time: 2026-11-28 10:04 UTC.")


def test_a_run_of_another_size_is_not_what_a_run_is_compared_with() -> None:
    first = kept(None, found(0.9, arguments="ROUNDS=1"), RUN)

    assert kept(first, found(1.2), LATER)["before"] is None


def test_a_run_on_another_machine_is_not_what_a_run_is_compared_with() -> None:
    first = kept(None, found(0.9), RUN)
    elsewhere = kept(first, found(1.2), LATER | {"machine": "64 processors"})

    assert elsewhere["before"] is None
    assert "64 processors" in section("drain", elsewhere)[0]
    assert kept(elsewhere, {"not_run": "it failed"}, LATER)["machine"] == "64 processors"


def test_a_run_below_the_goals_size_says_so_beside_the_verdict() -> None:
    page = section("scale", kept(None, found(1.2, smaller={"ours": "100,000 of 1,000,000 rows"}), RUN))

    assert any("| met; not of the goal's size: 100,000 of 1,000,000 rows |" in line for line in page)


def test_a_bench_that_is_not_run_keeps_its_figures_and_their_date() -> None:
    first = kept(None, found(0.9), RUN)
    page = section("drain", kept(first, {"not_run": "it failed"}, LATER))

    assert page[0] == "Not run on 2026-11-29 11:00 UTC: it failed."
    assert any("2026-11-28 10:04 UTC" in line for line in page[1:])
    assert any(line.startswith("| `ours` | 0.9000 |") for line in page)


def test_a_bench_that_runs_again_is_no_longer_said_not_to_have_run() -> None:
    failed = kept(kept(None, found(0.9), RUN), {"not_run": "it failed"}, LATER)

    assert "unmeasured" not in kept(failed, found(1.0), LATER)


def test_a_bench_that_never_ran_is_named_with_the_reason() -> None:
    page = written({"peers": kept(None, {"not_run": "pgai is not installed here"}, RUN)})

    assert page.endswith("## peers\n\nNot run on 2026-11-28 10:04 UTC: pgai is not installed here.\n")


def test_the_head_says_what_the_servers_do_without() -> None:
    assert "`fsync = off`" in written({})


def test_benches_that_shared_one_date_keep_it() -> None:
    assert remembered({**RUN, "benches": {"drain": {"figures": {}}}}) == {"drain": {"figures": {}, **RUN}}
    assert remembered({**LATER, "benches": {"drain": dict(RUN)}}) == {"drain": RUN}
    assert remembered({}) == {}


def test_benches_that_shared_one_machine_keep_it() -> None:
    drain = {"figures": {}, "at": RUN["at"]}
    assert remembered({"machine": "m", "benches": {"drain": drain}}) == {"drain": drain | {"machine": "m"}}


def test_without_names_the_goals_are_measured() -> None:
    assert asked([]) == list(GOALS)
    assert asked(["more", "gpu"]) == [*MORE, "gpu"]
    assert {"peers", "gpu", "native", "scale"} <= set(asked(["all"]))
    with pytest.raises(SystemExit, match="no bench is called drian"):
        asked(["drian"])
