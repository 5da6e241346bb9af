"""Pauses: what an operator reads of one, and which indexes a worker leaves paused."""

from __future__ import annotations

from cdcsync.errors import IndexFault
from cdcsync.model.pauses import FIRST_DELAY_S, MOST_DELAY_S, PASSING_PAUSES, REPEATED_WITHIN_S, Pause, Pauses


def changed(index: str = "articles", *, passing: bool = False) -> IndexFault:
    return IndexFault("the column body is gone", index=index, hint="add it again", passing=passing)


def test_a_pause_says_what_is_wrong_and_what_to_do() -> None:
    assert str(Pause.of(changed())) == "the column body is gone; add it again"
    assert str(Pause("its load failed")) == "its load failed"


def test_a_pause_names_the_row_that_is_the_cause() -> None:
    error = changed()
    error.key = ("4711",)
    assert Pause.of(error).reason == "the column body is gone, of the row 4711"
    error.key = ("4711", None)
    assert Pause.of(error).reason == "the column body is gone, of the row 4711, NULL"


def test_an_index_that_was_paused_once_is_not_kept_out() -> None:
    pauses = Pauses()
    pauses.note(changed(), 0.0)
    assert pauses.standing({}, 0.0) == {}
    assert pauses.due("articles", 0.0)


def test_an_index_whose_set_up_failed_is_kept_out_at_once() -> None:
    pauses = Pauses()
    pauses.note(changed(), 0.0, refused=True)
    assert set(pauses.standing({}, 0.0)) == {"articles"}
    assert pauses.due("articles", FIRST_DELAY_S)


def test_a_cause_that_stays_is_tried_again_more_and_more_rarely_and_keeps_its_last_reason() -> None:
    pauses = Pauses()
    now, waits = 0.0, []
    for at in range(12):
        pauses.note(IndexFault(f"refused {at}", index="articles"), now)
        before = now
        if not pauses.due("articles", now):
            assert pauses.standing({}, now)["articles"] == Pause(f"refused {at}")
        while not pauses.due("articles", now):
            now += 30
        waits.append(now - before)
    assert waits[:5] == [0.0, FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S, 8 * FIRST_DELAY_S]
    assert waits[-1] == MOST_DELAY_S


def test_an_index_that_is_paused_again_much_later_is_resumed_again_at_once() -> None:
    pauses = Pauses()
    for time in range(5):
        pauses.note(changed(), time * REPEATED_WITHIN_S)
        assert pauses.standing({}, time * REPEATED_WITHIN_S) == {}


def test_a_cause_that_the_stream_has_passed_may_come_often_but_not_for_ever() -> None:
    pauses = Pauses()
    for _ in range(PASSING_PAUSES):
        pauses.note(changed(passing=True), 0.0)
    assert pauses.standing({}, 0.0) == {}
    pauses.note(changed(passing=True), 0.0)
    assert set(pauses.standing({}, 0.0)) == {"articles"}


def test_an_index_whose_cause_was_seen_to_go_is_resumed_at_once_however_often_it_was_paused() -> None:
    pauses = Pauses()
    for _ in range(3):
        pauses.note(changed(), 0.0)
    pauses.note_standing("articles", 0.0)
    assert not pauses.due("articles", 1.0)
    pauses.heal("articles")
    assert pauses.due("articles", 1.0)
    assert pauses.standing({}, 1.0) == {}


def test_what_an_attempt_that_failed_was_made_of_is_what_later_looks_are_compared_with() -> None:
    pauses = Pauses()
    pauses.note(changed(), 0.0, seen="the mood is an enum")
    assert pauses.seen["articles"] == "the mood is an enum"
    pauses.note(changed(), 0.0)
    assert pauses.seen["articles"] == "the mood is an enum"


def test_an_examination_knows_better_than_what_was_found_first() -> None:
    pauses = Pauses()
    found = {"notes": Pause("its key is gone")}
    for _ in range(2):
        pauses.note(changed("notes"), 0.0)
    assert pauses.standing(found, 0.0) == found
    assert Pauses().standing(found, 0.0) == found
