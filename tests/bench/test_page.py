"""What docs/benchmarks.md says of the benches that ran, and of those that did not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench._all import BUDGET_S, GOALS, HERE, MORE, RUNS, asked, brought, kept, section, took, written

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
    elsewhere = kept(kept(None, found(0.9), RUN), found(1.2), LATER | {"machine": "64 processors"})

    assert elsewhere["before"] is None
    assert "64 processors" in section("drain", elsewhere)[0]
    assert kept(elsewhere, {"not_run": "it failed"}, LATER)["machine"] == "64 processors"


def test_the_last_run_of_each_other_machine_is_shown_and_each_is_compared_with_its_own() -> None:
    large = LATER | {"machine": "64 processors"}
    here = kept(kept(kept(None, found(0.9), RUN), found(1.2), large), found(0.8), LATER)
    page = section("drain", here)

    assert "| `ours` | 0.8000 | 1.00 | missed | psycopg2, same run | 0.9000 |" in page
    assert "- On 64 processors (ROUNDS=3, 2026-11-29 11:00 UTC): `ours` 1.20, met." in page
    again = section("drain", kept(here, found(1.3), large))
    assert "| `ours` | 1.30 | 1.00 | met | psycopg2, same run | 1.20 |" in again
    assert "- On 2 processors (ROUNDS=3, 2026-11-29 11:00 UTC): `ours` 0.8000, missed." in again
    assert not any(line.startswith("- On 64") for line in again)


def test_a_bench_that_was_never_run_here_keeps_nothing_of_that() -> None:
    never = kept({"machine": "2 processors", "unmeasured": "Not run."}, found(0.9), RUN)

    assert never["elsewhere"] == {}
    assert never["before"] is None


def test_another_machine_s_run_keeps_its_doubts_and_shows_only_what_is_still_measured() -> None:
    doubtful = found(0.9, undecided={"ours": "between 0.8 and 1.1"}, smaller={"ours": "2 of 20 rounds"})
    doubtful["ratios"]["gone"] = doubtful["goals"]["gone"] = 1.0
    page = section("drain", kept(kept(None, doubtful, RUN), found(1.2), LATER | {"machine": "64 processors"}))

    said = "`ours` 0.9000, undecided, between 0.8 and 1.1; not of the goal's size: 2 of 20 rounds."
    assert f"- On 2 processors (ROUNDS=3, 2026-11-28 10:04 UTC): {said}" in page


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


def test_without_names_the_goals_are_measured() -> None:
    assert asked([]) == list(GOALS)
    assert asked(["more", "gpu"]) == [*MORE, "gpu"]
    assert {"peers", "gpu", "native", "scale"} <= set(asked(["all"]))
    with pytest.raises(SystemExit, match="no bench is called drian"):
        asked(["drian"])


def test_each_run_is_of_a_script_that_there_is() -> None:
    assert all((HERE / f"{name.partition('-')[0]}.py").exists() for name in RUNS)


def test_the_page_says_how_long_the_goals_take_and_when_that_is_over_the_budget() -> None:
    within = {"drain": found(1.0, seconds=9.0), "native": found(1.0, seconds=300.0), "decode": found(1.0, seconds=5e3)}
    over = within | {"scale": found(1.0, seconds=BUDGET_S)}

    has = "`make bench` has 1,200 s for them, besides its waits for a quiet machine."
    assert took(within) == f"The benches of the goals took 309 s together; {has}"
    assert took(over).startswith("The benches of the goals took 1,509 s together, 309 s more; ")
    assert took(over) in written({name: kept(None, one, RUN) for name, one in over.items()})


def test_a_run_of_another_size_names_its_script() -> None:
    assert section("native-large", kept(None, found(0.9), RUN))[0].startswith("`bench/native.py` ROUNDS=3, ")


def test_a_bench_beside_other_work_is_marked() -> None:
    quiet = section("drain", kept(None, found(0.9, busy_before=0.02, busy_after=0.09), RUN))
    beside = section("drain", kept(None, found(0.9, busy_before=0.45, busy_after=0.12), RUN))

    assert "quiet" not in quiet[0]
    assert beside[0].endswith("other work took 45% of the processors before it and 12% of the processors after it.")


def test_a_ratio_that_the_run_cannot_decide_has_no_verdict() -> None:
    page = section("writes", kept(None, found(1.2, undecided={"ours": "between 0.91 and 1.25"}), RUN))

    assert any("| undecided, between 0.91 and 1.25 |" in line for line in page)
    assert not any("| met" in line for line in page)


def test_what_a_reader_has_to_know_of_a_ratio_stands_below_the_ratios() -> None:
    page = section("native", kept(None, found(0.2, notes={"ours": "the worker is one thread"}), RUN))

    assert "- `ours`: the worker is one thread." in page
    assert not any("nobody has said why" in line for line in page)


def test_a_missed_goal_without_a_reason_is_named() -> None:
    assert "- Missed, and nobody has said why: `ours`." in section("native", kept(None, found(0.2), RUN))
    assert not any("nobody" in line for line in section("native", kept(None, found(1.2), RUN)))


def test_a_bench_that_ran_on_another_machine_is_kept_by_its_last_line() -> None:
    line = json.dumps({"bench": "gpu", "figures": {}, "ratios": {"ours": 0.5}, "goals": {"ours": 0.9}, "against": {}})
    first = kept(None, {"not_run": "torch sees no accelerator here"}, RUN)
    page = section("gpu", kept(first, brought(line), {"at": "2026-11-30 11:00 UTC", "machine": "1 NVIDIA H200"}))

    assert page[0] == "`bench/gpu.py`, 2026-11-30 11:00 UTC, 1 NVIDIA H200."
    assert any("| `ours` | 0.5000 | 0.9000 | missed |" in line for line in page)
