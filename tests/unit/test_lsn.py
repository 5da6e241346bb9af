"""Lsn: PostgreSQL's spelling, its order, and nothing else that Python would take for a hexadecimal number."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdcsync.lsn import INVALID_LSN, Lsn

LSNS = st.integers(min_value=0, max_value=2**64 - 1).map(Lsn)


@given(LSNS)
def test_parsing_what_was_printed_gives_the_same_position(lsn: Lsn) -> None:
    again = Lsn.parse(str(lsn))

    assert again == lsn
    assert type(again) is Lsn


@given(LSNS, LSNS)
def test_positions_are_ordered_as_their_two_halves_are(one: Lsn, other: Lsn) -> None:
    def halves(lsn: Lsn) -> list[int]:
        return [int(half, 16) for half in str(lsn).split("/")]

    assert (one < other) == (halves(one) < halves(other))


@given(LSNS, LSNS)
def test_bytes_since_counts_forwards_and_never_below_zero(one: Lsn, other: Lsn) -> None:
    earlier, later = sorted((one, other))

    assert earlier + later.bytes_since(earlier) == later
    assert earlier.bytes_since(later) == 0


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("0/0", 0),
        ("16/B374D848", 0x16B374D848),
        ("16/b374d848", 0x16B374D848),
        ("FFFFFFFF/FFFFFFFF", 2**64 - 1),
        ("1/0", 2**32),
        ("00000001/00000002", 2**32 + 2),
    ],
)
def test_it_reads_what_postgresql_reads(text: str, position: int) -> None:
    assert Lsn.parse(text) == position


def test_it_prints_as_postgresql_does_without_leading_zeros_and_in_capitals() -> None:
    assert str(Lsn(0x0A0000000B)) == "A/B"
    assert f"{Lsn(0xFF)}" == "0/FF"
    assert repr(Lsn(0x1600000001)) == "Lsn('16/1')"


def test_the_invalid_position_is_zero_and_before_all_others() -> None:
    assert str(INVALID_LSN) == "0/0"
    assert Lsn(1) > INVALID_LSN


@pytest.mark.parametrize("text", ["", "/", "1", "1/", "/1", "1/2/3", "g/0", "0/g", "123456789/0", "0/123456789"])
def test_a_text_that_is_no_position_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN") as refusal:
        Lsn.parse(text)

    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("text", ["1 /2", "-1/0", "0/-1", "+1/0", "0x1/0", "1_0/0", " 1/0", "0/1 ", "0/1\n", "١/0"])
def test_python_spellings_of_numbers_are_not_positions(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        Lsn.parse(text)


@example("+1/0")
@given(st.text(alphabet="0123456789abcdefABCDEF/xX_+- \n", max_size=20))
def test_any_text_is_a_position_or_is_refused(text: str) -> None:
    try:
        lsn = Lsn.parse(text)
    except ValueError:
        return

    assert 0 <= lsn < 2**64
    assert [half.lstrip("0") or "0" for half in text.upper().split("/")] == str(lsn).split("/")
