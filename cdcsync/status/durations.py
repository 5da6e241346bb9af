"""Sizes and durations as people read them."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """Return a size in the unit that PostgreSQL would choose, 1024 to the next: `912 bytes`, `3.4 MB`."""
    if count < 1024:
        return f"{count} bytes"
    size, unit = count / 1024, "kB"
    for larger in ("MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if size < 10 else f"{size:.0f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a duration by its two largest units: `9 ms`, `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`."""
    if 0 < seconds < 0.095:
        return f"{max(1, round(seconds * 1000))} ms"
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds else "0 s"
    left = round(seconds)
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min {left % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
