"""The console that commands print on: whatever is printed, no text of others can take over the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from cdcsync.process.terminals import harmless


class Harmless(Console):
    """A console with dots in place of control characters, except for those that are its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments that the renderable is made of."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(harmless(segment.text, lines=True), segment.style)
