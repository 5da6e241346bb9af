"""Backfill requests: rows of the table `backfills`, which any process writes and the worker serves.

Requests of one index are served in the order they came, one at a time. A paused one lets those behind it pass.
"""
