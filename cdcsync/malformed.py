"""What reading data that others wrote may raise: callers, providers, operators, and whoever wrote a file."""

from __future__ import annotations

import msgspec

MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, TypeError)
"""Bytes that are no UTF-8, and what is nested too deeply, are no errors of msgspec's own; ValueError covers
UnicodeDecodeError and binascii.Error."""
