"""Pauses: what an operator reads of one, and which indexes a worker leaves paused."""

from __future__ import annotations

from cdcsync.errors import SchemaChanged
from cdcsync.model.pauses import PASSING_PAUSES, RESUME_AGAIN_S, Pause, Pauses


def changed(index: str = "articles", *, passing: bool = False) -> SchemaChanged:
    return SchemaChanged("the column body is gone", index=index, hint="add it again", passing=passing)


def test_a_pause_says_what_is_wrong_and_what_to_do() -> None:
    assert str(Pause.of(changed())) == "the column body is gone; add it again"
    assert str(Pause("its load failed")) == "its load failed"


def test_a_pause_names_the_row_that_is_the_cause() -> None:
    error = changed()
    error.row = "4711"
    assert Pause.of(error).reason == "the column body is gone, of the row 4711"


def test_an_index_that_was_paused_once_is_not_kept_out() -> None:
    pauses = Pauses()
    pauses.note(changed(), 0.0)
    assert pauses.standing({}) == {}


def test_an_index_that_is_paused_again_soon_stays_paused_with_the_last_reason() -> None:
    pauses = Pauses()
    pauses.note(changed(), 0.0)
    pauses.note(SchemaChanged("its key is gone", index="articles"), RESUME_AGAIN_S - 1)
    pauses.note(changed("notes"), RESUME_AGAIN_S - 1)
    assert pauses.standing({}) == {"articles": Pause("its key is gone")}


def test_an_index_that_is_paused_again_much_later_is_resumed_again() -> None:
    pauses = Pauses()
    for time in range(5):
        pauses.note(changed(), time * RESUME_AGAIN_S)
    assert pauses.standing({}) == {}


def test_a_cause_that_the_stream_has_passed_may_come_often_but_not_for_ever() -> None:
    pauses = Pauses()
    for _ in range(PASSING_PAUSES):
        pauses.note(changed(passing=True), 0.0)
    assert pauses.standing({}) == {}
    pauses.note(changed(passing=True), 0.0)
    assert set(pauses.standing({})) == {"articles"}


def test_a_table_that_is_found_unfit_keeps_its_index_out_from_the_first_time_on() -> None:
    found = {"notes": Pause("its key is gone")}
    assert Pauses().standing(found) == found
