"""The result of an examination, and its consequences."""

from __future__ import annotations

import msgspec

from cdcsync.config import Index
from cdcsync.errors import SetupError
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan
from cdcsync.source.catalog import Catalog


class Report(msgspec.Struct):
    """All findings, in the order of the checks, and the indexes as they are to be.

    :ivar specs: complete, in the configuration's order, if there is no error; else those that could be made.
    :ivar broken: indexes that exist and cannot be kept up any more, with the reason; they are paused, and
        keep no other index from going on. Also new ones that wait, because somebody holds their tables locked.
    :ivar plans: what is known of each configured index, the broken ones included.
    :ivar catalog: the reading of the source that everything rests on; None if there is none.
    :ivar target_reached: whether a session with the target could be opened.
    :ivar indexes: the sections that the indexes are made by, those beside others included; see `target/beside`.
    """

    findings: list[Finding]
    specs: list[IndexSpec]
    broken: dict[str, Pause] = {}
    plans: list[Plan] = []
    catalog: Catalog | None = None
    indexes: dict[str, Index] = {}
    target_reached: bool = True

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop the pipeline."""
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def passes(self) -> bool:
        """Whether nothing but servers that are away keeps the pipeline from starting."""
        return bool(self.errors) and all(finding.passes for finding in self.errors)


def refuse(report: Report) -> None:
    """Return when no finding is an error.

    :raises SetupError: there are errors; a single one is the message, several are its blocks.
    """
    match report.errors:
        case []:
            return
        case [only]:
            raise SetupError(only.message, where=only.where, hint=only.hint)
        case errors:
            blocks = [f"{len(errors)} problems keep this configuration from working"]
            for finding in errors:
                fix = f"\n    fix: {finding.hint}" if finding.hint else ""
                blocks.append(f"  {finding.where}: {finding.message}{fix}")
            raise SetupError("\n\n".join(blocks), hint="correct all of these, then run `cdcsync check` again")
