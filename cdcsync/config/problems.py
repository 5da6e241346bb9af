"""Collects the problems of a configuration file, so that one reading reports all of them."""

from __future__ import annotations

from cdcsync.errors import ConfigError

GENERAL_HINT = "correct the file; `cdcsync config schema` describes every key"


class Problems:
    """Problems in the order found, at most one for each key: what follows from the first is not news."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, str | None]] = {}

    def add(self, key_path: str, message: str, hint: str | None = None) -> None:
        """Note what is wrong at a key, and the fix when it is not plain from the message."""
        self._found.setdefault(key_path, (message, hint))

    def check(self, where: str) -> None:
        """Return when there are no problems.

        :param where: the file's name, for the error.
        :raises ConfigError: there are; a single one is the message, several are its lines.
        """
        if not self._found:
            return
        if len(self._found) == 1:
            ((key_path, (message, hint)),) = self._found.items()
            raise ConfigError(f"{key_path}: {message}", where=where, hint=hint or GENERAL_HINT)
        lines = [
            f"  {key_path}: {message} ({hint})" if hint else f"  {key_path}: {message}"
            for key_path, (message, hint) in self._found.items()
        ]
        raise ConfigError("\n".join([f"{len(lines)} problems", *lines]), where=where, hint=GENERAL_HINT)
