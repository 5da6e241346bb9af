"""The structure of a status, and its page in the documentation."""

from __future__ import annotations

import re

import msgspec
import pytest

from cdcsync.status import (
    BackfillStatus,
    Event,
    Freshness,
    Headline,
    IndexStatus,
    Progress,
    SlotStatus,
    Status,
    WorkerStatus,
)
from cdcsync.status.generations import GenerationStatus
from cdcsync.status.model import EmbedderStatus
from cdcsync.target.evaluations import Recall
from cdcsync.target.judged_runs import Outcome
from tests import ROOT
from tests.support.statuses import STATUS

DOCUMENT = ROOT / "docs" / "status.md"


@pytest.mark.parametrize(
    "struct",
    [
        *(Status, SlotStatus, WorkerStatus, IndexStatus, Recall, Outcome, BackfillStatus, EmbedderStatus),
        *(Headline, Progress, Freshness, Event, GenerationStatus),
    ],
)
def test_the_documentation_tells_every_field_and_no_other(struct: type[msgspec.Struct]) -> None:
    section = DOCUMENT.read_text().split(f"\n## {struct.__name__}\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(struct.__struct_fields__)


def test_the_documentation_tells_every_state() -> None:
    text = DOCUMENT.read_text()
    for struct in (IndexStatus, BackfillStatus):
        for field in msgspec.structs.fields(struct):
            for value in getattr(field.type, "__args__", ()):
                assert not isinstance(value, str) or f"`{value}`" in text


def test_json_has_every_field_even_without_a_value() -> None:
    found = msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(STATUS, lag_seconds=None)))
    assert list(found) == list(Status.__struct_fields__)
    assert found["lag_seconds"] is None
    assert found["read_at"] == "2026-05-04T12:00:00Z"
    assert set(found["indexes"]["articles"]) == set(IndexStatus.__struct_fields__)
    assert msgspec.json.decode(msgspec.json.encode(STATUS), type=Status) == STATUS
