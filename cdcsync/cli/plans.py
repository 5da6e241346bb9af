"""Plans as the commands print them: whole for `plan`, a few lines at the end of `check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.text import Text

    from cdcsync.flows.plan import ConfigurationPlan, Embedding, IndexPlan, Spare

_MARKS = {
    "created": ("+", "green"),
    "read again": ("~", "yellow"),
    "compared": ("~", "yellow"),
    "changed": ("~", "yellow"),
    "paused": ("!", "bold red"),
    "unchanged": ("·", "dim"),
}


def print_summary(found: ConfigurationPlan) -> None:
    """Print what `run` would do, a line for each index with which it would do something."""
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console()
    if found.empty:
        out.print("`run` would change nothing")
        return
    for one in found.indexes:
        if one.action == "unchanged":
            continue
        mark, style = _MARKS[one.action]
        embeds = "" if one.embedding is None else f"; {embedding_text(one.embedding)}"
        waits = "; waits for an approval" if one.approval == "needed" else ""
        out.print(Text.assemble((mark, style), " ", (plain(one.index), "bold"), f": {_action(one)}{embeds}{waits}"))
    for spare in found.unfollowed:
        out.print(Text.assemble(("-", "red"), " ", _spare(spare)))
    out.print("`cdcsync plan` tells what `run` would do in full")


def print_plan(found: ConfigurationPlan) -> None:
    """Print a plan for people."""
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console()
    for created in found.created:
        out.print(Text.assemble(("+", "green"), f" {plain(created)}"))
    for one in found.indexes:
        mark, style = _MARKS[one.action]
        out.print(Text.assemble((mark, style), " ", (plain(one.index), "bold"), f": {_action(one)}"))
        for line in _details(one):
            out.print(Text.assemble("    ", line))
    for spare in (*found.unfollowed, *found.generations):
        out.print(Text.assemble(("-", "red"), " ", _spare(spare)))
    out.print(Text("nothing to do" if found.empty else "this is what `cdcsync run` would do", "bold"))


def _action(one: IndexPlan) -> str:
    from cdcsync.cli.printing import plain

    because = plain("; ".join(one.because))
    match one.action:
        case "unchanged":
            return "as it is"
        case "changed" if one.remaining and not one.rebuilt:
            return "continues as it is"
        case "changed":
            return "changed without reading its table"
        case "created" if one.rows is not None:
            return f"created from {one.rows:,} rows"
        case "read again" if one.rows is not None:
            return f"{one.rows:,} rows read again: {because}"
        case action:
            return f"{action}: {because}"


def _details(one: IndexPlan) -> Iterator[str | Text]:
    from rich.text import Text

    from cdcsync.cli.printing import plain

    for change in one.changes:
        if str(change) not in one.because:
            yield plain(str(change))
    if one.embedding is not None:
        yield embedding_text(one.embedding)
    if one.rebuilt:
        yield f"built again: {plain(', '.join(one.rebuilt))}"
    yield from map(plain, one.remaining)
    if one.approval == "given":
        yield "approved"
    if one.remedy is not None:
        waits = "waits for approval: " if one.approval == "needed" else ""
        yield Text.assemble((f"{waits}fix:", "green"), f" {plain(one.remedy)}")


def embedding_text(found: Embedding) -> str:
    """Return what a load embeds, in words."""
    if not found.texts:
        return "embeds nothing: every text has its vector"
    about = "about " if found.estimated else ""
    parts = [f"embeds {about}{found.texts:,} texts of {found.documents:,} documents", f"some {found.tokens:,} tokens"]
    if found.price is not None:
        parts.append(f"price {found.price:,.2f}")
    if found.seconds is not None:
        parts.append(f"about {found.seconds:,.0f} s")
    return ", ".join(parts)


def _spare(spare: Spare) -> str:
    from cdcsync.cli.printing import plain

    size = f"{spare.bytes / 1024**2:,.1f} MiB"
    if spare.generation is not None:
        return f"{plain(spare.index)}: generation {spare.generation}, {size}, is not in use; {spare.command}"
    since = "from now on" if spare.since is None else f"since {spare.since:%Y-%m-%d %H:%M} UTC"
    return f"{plain(spare.index)}: no longer followed {since}, {size}; to remove it: {spare.command}"
