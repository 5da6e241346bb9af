"""Records the demo: runs it in a terminal, and writes what was seen as a picture that moves.

    python docs/record.py               write docs/pictures/demo.svg, and page-light.png and page-dark.png beside it

Nothing is drawn that did not happen: each line appears when it last changed, and waits are shortened.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from html import escape
from pathlib import Path

import pyte

from tests.support.browsers import Browser, open_browser

PICTURES = Path(__file__).parent / "pictures"
COLUMNS, ROWS = 100, 200
"""The terminal is so high that nothing scrolls out of it."""

SEEN_ROWS = 34
LINE, CHAR = 19.0, 8.43
"""Pixels of a line and of a character, at the size of the letters below."""

FASTEST_S, SLOWEST_S = 0.05, 1.2
"""Between two lines: fast enough to be watched, slow enough to be read."""

STAYED = "Ctrl-C"
"""What the demo says once it stays for someone to look around."""

COLOURS = {
    "default": "#d7dee4",
    "black": "#6b7885",
    "red": "#ff8d84",
    "green": "#6fcf8f",
    "brown": "#e8b45a",
    "blue": "#7db4ff",
    "magenta": "#d69bff",
    "cyan": "#4fc3b5",
    "white": "#d7dee4",
}


def perform() -> tuple[pyte.Screen, dict[int, float]]:
    """Run the demo, take pictures of its page, and return the last screen and when each of its lines last changed."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    changed: dict[int, float] = {}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    # Typed by a person, who is not part of the program.
    stream.feed(b"\x1b[1m$\x1b[0m cdcsync demo\r\n")
    changed[0] = 0.0
    process = subprocess.Popen(
        [sys.executable, "-m", "cdcsync", "demo", "--stay"],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    began, looked = time.monotonic(), False
    try:
        while True:
            ready, _, _ = select.select([ours], [], [], 1.0)
            if ready:
                try:
                    data = os.read(ours, 65536)
                except OSError:
                    break
                before = list(screen.display)
                stream.feed(data)
                for row, line in enumerate(screen.display):
                    if line != before[row]:
                        changed[row] = time.monotonic() - began
            shown = "\n".join(screen.display)
            if not looked and not ready and STAYED in shown:
                looked = True
                take_pictures(re.findall(r"http://127\.0\.0\.1:\d+/", shown)[0])
                process.send_signal(signal.SIGINT)
    finally:
        process.wait(timeout=60)
        os.close(ours)
    return screen, changed


def take_pictures(address: str) -> None:
    """Take pictures of the page, in light and dark."""
    with tempfile.TemporaryDirectory() as directory, open_browser(Path(directory)) as browser:
        for dark in (False, True):
            browser.look((1180, 900), dark=dark)
            if not dark:
                browser.driver.get(address)
                time.sleep(12)  # the page draws what it sees for itself, too
            picture(browser, PICTURES / f"page-{'dark' if dark else 'light'}.png")


def picture(browser: Browser, path: Path) -> None:
    """Keep a picture of the page."""
    browser.screenshot("recorded").replace(path)


def drawn(screen: pyte.Screen, changed: dict[int, float]) -> str:
    """Return the SVG."""
    last = max(row for row, line in enumerate(screen.display) if line.strip())
    # What follows Ctrl-C is not part of the demo.
    rows = list(range(last + 1))
    for row in rows:
        if STAYED in screen.display[row]:
            rows = rows[:row]
            break
    begins, now, before = {}, 0.6, 0.0
    rows = [row for row in rows if screen.display[row].strip()]
    for row in sorted(rows, key=lambda row: (changed[row], row)):
        now += min(SLOWEST_S, max(FASTEST_S, changed[row] - before))
        before = changed[row]
        begins[row] = now
    whole = now + 6
    height = SEEN_ROWS * LINE + 56
    width = COLUMNS * CHAR + 40
    lines = [line for row in rows if (line := _line(screen, row))]
    steps = _scrolling(rows, begins, whole)
    buttons = "".join(
        f'<circle cx="{22 + 19 * at}" cy="19" r="5.5" fill="{colour}"/>'
        for at, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">
<title>cdcsync demo: an index follows its table</title>
<style>
text {{ font: 14px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }}
@keyframes roll {{ {steps} }}
#roll {{ animation: roll {whole:.1f}s step-end infinite; }}
{_appearing(begins, whole)}
</style>
<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#10171c"/>
{buttons}
<svg x="20" y="40" width="{width - 40:.0f}" height="{SEEN_ROWS * LINE:.0f}"><g id="roll">
{chr(10).join(lines)}
</g></svg>
</svg>
"""


def _appearing(begins: dict[int, float], whole: float) -> str:
    return "\n".join(
        f"@keyframes l{row} {{ 0% {{ opacity: 0; }} {100 * at / whole:.2f}%, 100% {{ opacity: 1; }} }}"
        f" #l{row} {{ animation: l{row} {whole:.1f}s step-end infinite; }}"
        for row, at in begins.items()
    )


def _scrolling(rows: list[int], begins: dict[int, float], whole: float) -> str:
    """Return the steps by which the lines move up, as on a terminal of the height that is seen."""
    steps, lowest = ["0% { transform: none; }"], SEEN_ROWS - 1
    for row in sorted(rows, key=lambda row: begins[row]):
        if row > lowest:
            lowest = row
            up = (row - SEEN_ROWS + 1) * LINE
            steps.append(f"{100 * begins[row] / whole:.2f}% {{ transform: translateY(-{up:.0f}px); }}")
    if len(steps) > 1:
        steps.append(f"100% {{ transform: translateY(-{(lowest - SEEN_ROWS + 1) * LINE:.0f}px); }}")
    return " ".join(steps)


def _line(screen: pyte.Screen, row: int) -> str:
    """Return a line, its runs of one look each a span."""
    runs: list[tuple[tuple[str, bool], str]] = []
    cells = screen.buffer[row]
    for column in range(COLUMNS):
        cell = cells[column]
        look = (COLOURS.get(cell.fg, f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else "#d7dee4"), cell.bold)
        if runs and runs[-1][0] == look:
            runs[-1] = look, runs[-1][1] + cell.data
        else:
            runs.append((look, cell.data))
    if not "".join(text for _, text in runs).strip():
        return ""
    runs[-1] = runs[-1][0], runs[-1][1].rstrip()
    spans, column = [], 0
    for (colour, bold), text in runs:
        if text.strip():
            weight = ' font-weight="700"' if bold else ""
            spans.append(f'<tspan x="{column * CHAR:.1f}" fill="{colour}"{weight}>{escape(text)}</tspan>')
        column += len(text)
    return f'<text id="l{row}" y="{(row + 1) * LINE - 5:.0f}">{"".join(spans)}</text>'


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "demo.svg").write_text(drawn(*perform()), encoding="utf-8")
