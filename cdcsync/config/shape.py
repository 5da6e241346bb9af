"""The base of the configuration file's sections: a Struct whose docstring describes its keys.

A section's `faults` checks rules about several values together; the type of a key checks that key alone.
Constructing a section in code checks neither; `cdcsync.config.parse` does. The `:param` lines are also the
descriptions that `cdcsync config schema` shows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import msgspec

_PARAM = re.compile(r"^:param (\w+):(.*?)(?=^:|\Z)", re.DOTALL | re.MULTILINE)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the file whose keys are known."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Yield (key, what is wrong) for values that are right alone and wrong together."""
        return iter(())


def summary(section: type[msgspec.Struct]) -> str:
    """Return the first line of a section's docstring."""
    return inspect.cleandoc(section.__doc__ or "").partition("\n")[0]


def descriptions(section: type[msgspec.Struct]) -> dict[str, str]:
    """Return what each key of a section means, from its docstring, as one line each."""
    documented = _PARAM.findall(inspect.cleandoc(section.__doc__ or ""))
    return {key: " ".join(text.split()) for key, text in documented}
