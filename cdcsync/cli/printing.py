"""The output of the commands: results on standard output, errors on standard error, colours on a terminal.

Colours follow rich's rules: none into files and pipes, none with NO_COLOR. Texts from databases are printed as they
are, except that control characters, with which a text could take over the terminal, become a dot.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cdcsync.cli.streams import OutputLost
from cdcsync.errors import CdcsyncError
from cdcsync.process.terminals import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cdcsync.preflight import Finding
    from cdcsync.status import Status
    from cdcsync.target.search import Hit

MARKS = ("\ue000", "\ue001")
"""The marks that the server puts around matched words: characters for private use, which texts do not have."""

BAR = 10
"""Characters of the bar that shows each leg's share of a score."""

SHOWN_LINES = 4
"""Lines of a chunk that are shown: enough to recognise it; --json has all of it."""

SHOWN_CHARACTERS = 400
"""Characters of a chunk that are shown, for text without line breaks."""

_VECTOR = re.compile(r"\[[-+.,e\d]{40,}\]")
"""A vector in a plan, which would fill the screen."""

_ACTED_ON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""C1 controls, breaks of lines and paragraphs, and what changes the direction of writing."""

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def console(*, errors: bool = False, wrap: bool = False) -> Console:
    """Return a console on standard output, or on standard error.

    :param wrap: fit the terminal's width, for tables; else lines stay whole, for searching in what was printed.
    """
    from cdcsync.cli.consoles import Harmless

    return Harmless(stderr=errors, highlight=False, soft_wrap=not wrap)


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on a terminal, while the block runs, that something is being waited for. It is gone afterwards."""
    shown = console(errors=True)
    if not shown.is_terminal or shown.is_dumb_terminal:
        yield
        return
    with shown.status(text):
        yield


def print_line(*parts: str) -> None:
    """Print the parts of a record on a line of its own: a part that others wrote can begin no other line."""
    print("  ".join(map(harmless, parts)))


def print_json(value: Any, *, indent: bool = True) -> None:
    """Print a value as JSON on standard output; what JSON has no form for becomes its text.

    A terminal would act on some characters that JSON lets stand. They are escaped, which is the same to a program.
    """
    import msgspec

    encoded = msgspec.json.encode(value, enc_hook=str)
    text = (msgspec.json.format(encoded, indent=2) if indent else encoded).decode()
    print(_ACTED_ON.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def error_text(error: CdcsyncError) -> Text:
    """Return an error's lines: what, where and the fix, as far as it has them."""
    return three_lines(error.message, error.where, error.hint)


def three_lines(message: str, where: str | None, fix: str | None) -> Text:
    """Return what is wrong, where, and the fix, a line each."""
    from rich.text import Text

    lines = [Text.assemble(("error:", "bold red"), f" {plain(message)}")]
    if where:
        lines.append(Text.assemble(("where:", "bold"), f" {plain(where)}"))
    if fix:
        lines.append(Text.assemble(("fix:  ", "bold green"), f" {plain(fix)}"))
    return Text("\n").join(lines)


def print_warning(message: str) -> None:
    """Print to standard error what should be known of what standard output gets."""
    from rich.text import Text

    console(errors=True).print(Text.assemble(("warning:", "bold yellow"), f" {plain(message)}"))


def print_error(text: Text) -> None:
    """Print to standard error, after what standard output still holds."""
    # Lost output is not the first error.
    with contextlib.suppress(OutputLost):
        sys.stdout.flush()
    console(errors=True).print(text)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print each finding with its mark, and the fix of those that need one; `print_verdict` sums them up."""
    from rich.text import Text

    out = console()
    for finding in findings:
        mark, style = _MARKS[finding.level]
        out.print(Text.assemble((mark, style), " ", (plain(finding.where), "bold"), f": {plain(finding.message)}"))
        if finding.hint:
            out.print(Text.assemble(("  fix:", "green"), f" {plain(finding.hint)}"))


def print_verdict(findings: Sequence[Finding], options: str) -> None:
    """Print what the findings come to, and what to do next.

    :param options: what follows the name of a command to name the same configuration.
    """
    from rich.text import Text

    out = console()
    errors = sum(finding.level == "error" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    if errors:
        counted = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
        out.print(Text(f"{counted}. Correct the errors, then run again: cdcsync check{options}", "bold red"))
    else:
        passed = f"No errors, {_count(warnings, 'warning')}" if warnings else "All checks passed"
        out.print(Text(f"{passed}. Start the worker with: cdcsync run{options}", "bold green"))


def print_status(status: Status) -> None:
    """Print a status as tables."""
    from cdcsync.status import render_table

    console(wrap=True).print(render_table(status))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_hits(
    hits: Sequence[Hit], *, indexes: Sequence[str] | None = None, first: int = 1, explain: bool = False
) -> None:
    """Print hits, the best first, with the part of their text that matches, or its beginning.

    :param indexes: the index that each hit is of, where there are several.
    :param first: the place of the first of them, after those that were skipped.
    :param explain: also print the places in both legs and how well the words match.
    """
    from rich.text import Text

    out = console()
    if not hits:
        out.print("nothing was found")
    for at, hit in enumerate(hits):
        key = ", ".join(named(name, value) for name, value in hit.key.items())
        if indexes is not None:
            key = f"{indexes[at]} {key}"
        figures = [f"score {hit.score:.4f}"]
        if hit.distance is not None:
            figures.append(f"distance {hit.distance:.4f}")
        if hit.text_rank is not None:
            figures.append(f"text rank {hit.text_rank}")
        if explain and hit.vector_rank is not None:
            figures.append(f"vector rank {hit.vector_rank}")
        if explain and hit.text_score is not None:
            figures.append(f"text score {hit.text_score:.3f}")
        carried = [named(name, value) for name, value in hit.carried.items()]
        out.print(
            Text.assemble(
                f"{first + at:>3}  ",
                (key, "bold"),
                f"  chunk {hit.chunk_no}  " if hit.chunk_no else "  ",
                ("  ".join(figures), "cyan"),
                *shares(hit),
                ("  its vector is not up to date" if hit.stale else "", "yellow"),
                f"\n     {'  '.join(carried)}" if carried else "",
            )
        )
        out.print(matched(hit))


def named(name: str, value: Any) -> str:
    """Return a column with its value: NULL as `--filter` asks for it, arrays and JSON as JSON, as `--json` has them."""
    import msgspec

    if value is None:
        return f"{plain(name)} is null"
    if isinstance(value, bool | list | dict):
        value = msgspec.json.encode(value, enc_hook=str).decode()
    return f"{plain(name)}={plain(str(value))}"


def shares(hit: Hit) -> list[str | tuple[str, str]]:
    """Return a bar of how much of a score comes from the vector leg and from the keyword leg; empty for one leg.

    Both weigh the same, as in all searches from the command line.
    """
    from cdcsync.target.search import FUSION

    if hit.vector_rank is None or hit.text_rank is None:
        return []
    by_vector, by_text = 1 / (FUSION + hit.vector_rank), 1 / (FUSION + hit.text_rank)
    width = round(BAR * by_vector / (by_vector + by_text))
    # Of two characters: there may be no colours.
    return ["  meaning ", ("█" * width, "blue"), ("▒" * (BAR - width), "magenta"), " words"]


def matched(hit: Hit) -> Text:
    """Return the part of a hit's text in which words matched, those in bold; else the beginning of its text."""
    from rich.text import Text

    opening, closing = MARKS
    if not hit.headline or opening not in hit.headline:
        return Text(excerpt(hit.content, indent="     "), "dim")
    text = Text("     ", "dim")
    for piece in hit.headline.replace("\n", " ").split(opening):
        word, found, rest = piece.partition(closing)
        if found:
            text.append(plain(word), "not dim bold")
        text.append(plain(rest if found else piece))
    return text


def print_plan(title: str, lines: Sequence[str]) -> None:
    """Print how the server executed a statement."""
    from rich.text import Text

    out = console()
    out.print(Text(f"\n{title}", "bold"))
    out.print(Text("\n".join(f"     {_VECTOR.sub('[…]', line)}" for line in lines), "dim"))


def excerpt(content: str, *, indent: str = "", lines: int = SHOWN_LINES) -> str:
    """Return the beginning of a text, on at most so many lines."""
    cut = plain(content[:SHOWN_CHARACTERS])
    kept = [line.rstrip() for line in cut.splitlines() if line.strip()]
    more = " …" if len(kept) > lines or len(content) > SHOWN_CHARACTERS else ""
    return "\n".join(indent + line for line in kept[:lines]) + more


def plain(text: str) -> str:
    """Return the text without characters that a terminal would act on; line breaks stay."""
    return harmless(text, lines=True)
