"""The tests: a package, so that helpers import as `tests.support.*` whatever else is installed."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
