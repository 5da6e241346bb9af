"""The tests: a package, so that fixtures import as `tests.fixtures.*` whatever else is installed."""
