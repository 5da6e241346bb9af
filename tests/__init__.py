"""The tests: a package, so that fixtures import as `tests.fixtures.*` whatever else is installed."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
