"""`python -m cdcsync` is `cdcsync`."""

from __future__ import annotations

from cdcsync.cli import main

main()
