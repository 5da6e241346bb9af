"""Runs one target under hypothesis, for as long as it is told."""

from __future__ import annotations

import sys
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS


def main() -> None:
    """Run the target that the first argument names for as many seconds as the second says."""
    target, seconds = TARGETS[sys.argv[1]], float(sys.argv[2])
    count = 0

    @settings(max_examples=1_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=4_096))
    def feed(data: bytes) -> None:
        nonlocal count
        count += 1
        target(data)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        feed()
    print(f"executed {count}", file=sys.stderr)


if __name__ == "__main__":
    main()
