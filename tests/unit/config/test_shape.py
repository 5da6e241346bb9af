"""What a section's docstring says of its keys."""

from __future__ import annotations

import msgspec
import pytest

import cdcsync.config  # noqa: F401  (defines the sections)
from cdcsync.config.shape import Section, descriptions, summary


class Kettle(Section, frozen=True, kw_only=True):
    """Boils water.

    :param litres: how much it holds,
        at most.
    :param lid: whether it has one.
    """

    litres: int
    lid: bool = True


def test_the_lines_of_a_docstring_are_the_descriptions_of_the_keys() -> None:
    assert summary(Kettle) == "Boils water."
    assert descriptions(Kettle) == {"litres": "how much it holds, at most.", "lid": "whether it has one."}


def test_a_section_refuses_keys_that_it_does_not_have() -> None:
    with pytest.raises(msgspec.ValidationError, match="spout"):
        msgspec.convert({"litres": 1, "spout": 2}, Kettle)


def sections(kind: type[Section]) -> set[type[Section]]:
    """Return the sections that a file can have: those that no other one is derived from."""
    below = kind.__subclasses__()
    return {one for each in below for one in sections(each)} if below else {kind}


@pytest.mark.parametrize(
    "section", sorted((one for one in sections(Section) if one.__module__.startswith("cdcsync.")), key=str), ids=str
)
def test_every_key_of_every_section_is_described(section: type[Section]) -> None:
    assert summary(section)
    assert set(section.__struct_fields__) == set(descriptions(section))
