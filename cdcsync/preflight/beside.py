"""What is to be said of an index with chunks of two generations, or with others than the configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cdcsync.config import Index
from cdcsync.config.differences import CONTENTS, as_stored, index_changes
from cdcsync.preflight.findings import Finding
from cdcsync.target.beside import is_met_by, without_declined
from cdcsync.target.entries import Entry


def beside_findings(name: str, section: Index, own: Entry, other: Entry | None) -> Iterator[Finding]:
    """Say that an index has other chunks than the file asks for, or those of two generations, and what to do.

    :param section: the file's.
    """
    where = f"indexes.{name}"
    if other is None:
        if (kept := without_declined(section, own)) != section:
            yield Finding.warning(
                where,
                "the configuration asks for other chunks, as it did when some were dropped"
                f" ({_changes(as_stored(kept), section)}); the index keeps those that it has",
                f"write these keys as the index has them; or, to have such chunks again: cdcsync migrate {name} start",
            )
        return
    if is_met_by(section, other):
        if other.state == "live":
            yield Finding.warning(
                where,
                f"the configuration asks for the chunks of generation {other.generation}, and generation"
                f" {own.generation} is live",
                f"to switch: cdcsync migrate {name} activate",
            )
        else:
            yield Finding.ok(
                where,
                f"generation {other.generation}, which has chunks of its own, is being filled beside the live one",
            )
    elif not is_met_by(section, own):
        yield Finding.warning(
            where,
            f"the configuration asks for other chunks or vectors than generation {own.generation}, which is live, and"
            f" generation {other.generation} beside it have ({_changes(own.configuration or {}, section)});"
            " both stay as they are",
            f"to give one up: cdcsync migrate {name} drop; then to begin anew: cdcsync migrate {name} start",
        )


def _changes(has: Mapping[str, Any], section: Index) -> str:
    changed = index_changes(has, section)
    return ", ".join(dict.fromkeys(one.key.split(".")[0] for one in changed if one.key.split(".")[0] in CONTENTS))
