"""Metrics: what is counted, and how long things took lately.

    windows        durations of the last quarter of an hour, and their quantiles
    instruments    every metric with its name, unit and labels

A file here imports only from lines above its own.
"""

from __future__ import annotations

from cdcsync.metrics.instruments import LABELS, STATES, WAL_STATUSES, Metrics

__all__ = ["LABELS", "STATES", "WAL_STATUSES", "Metrics"]
