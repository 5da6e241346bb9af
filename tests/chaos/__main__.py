"""Chaos from the command line: `python -m tests.chaos --seeds 200`, or `--seed 17` for one history again."""

from tests.chaos.campaign import main

if __name__ == "__main__":
    raise SystemExit(main())
