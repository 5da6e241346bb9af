"""Functions of the user's that make documents or chunks, named in the configuration as `package.module:function`.

They run in the worker, with all that it may do, in a thread beside its event loop. What a function raises for a row is
a fault of that row: it becomes a `DocumentError` that says what and where in the function, never what was in the row.

A function is known by its name and its version: `function.version`, any text or number, where its author has set one;
else the hash of the file it stands in. Under another version every document is made anew, by the same replay as after a
change of the template.
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from cdcsync.config.imports import import_named
from cdcsync.errors import ConfigError, DocumentError

RelatedRow = Mapping[str, str | None]
DocumentsOfRow = Callable[[Mapping[str, str | Sequence[RelatedRow] | None]], str | None]
"""Makes the document of a row: column name to value, as the server's output functions write it; None for SQL's NULL.

The name of a related table has the list of its rows in place of a value.

A row whose document is None or blank has no place in the index.
"""

ChunksOfDocument = Callable[[str], Sequence[str]]
"""Cuts a document, trimmed and not empty, into pieces, in their order."""


class Function:
    """A function by its name; imported when it is first needed.

    :param path: `package.module:function`.
    :param where: the config key that names it, for errors.
    """

    def __init__(self, path: str, where: str) -> None:
        self.path = path
        self._where = where

    @cached_property
    def _function(self) -> Callable[..., Any]:
        found = import_named(self.path, ConfigError, self._where)
        if found is None:
            raise ConfigError(f"{self.path} is not a function", where=self._where, hint="name one that can be called")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Name and version.

        :raises ConfigError: there is no such function, or nobody can tell its version.
        """
        version = getattr(self._function, "version", None)
        if version is None:
            try:
                source = Path(inspect.getsourcefile(inspect.unwrap(self._function)) or "").read_bytes()
            except (TypeError, OSError) as error:
                raise ConfigError(
                    f"{self.path} has no source file and no version",
                    where=self._where,
                    hint="set function.version, and change it whenever the function's output changes",
                ) from error
            version = hashlib.sha256(source).hexdigest()[:16]
        return f"{self.path} version {version}"

    def call(self, *arguments: object) -> Any:
        """Call it.

        :raises DocumentError: it fails, or cannot be imported any more.
        """
        try:
            return self._function(*arguments)
        except Exception as error:
            # Its message may quote the row.
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise DocumentError(
                f"{self.path} failed with {type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"
            ) from error

    def text(self, value: object) -> str:
        """Return what it gave, if that is a text that PostgreSQL can hold.

        :raises DocumentError: it is not.
        """
        if not isinstance(value, str):
            raise DocumentError(f"{self.path} returned {type(value).__name__}, not str")
        if "\0" in value:
            raise DocumentError(f"{self.path} returned a text with a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DocumentError(f"{self.path} returned a text that is not Unicode: it holds a lone surrogate") from None
        return value


class DocumentFunction(Function):
    """Makes documents; see `DocumentsOfRow`.

    :param columns: the columns that are read for it; those in `listed` hold a JSON array of the rows of a
        related table, whose name for the function is given there.
    """

    def __init__(
        self, path: str, columns: tuple[str, ...], where: str, *, listed: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(path, where)
        self.columns = columns
        self._listed = listed

    def render(self, values: Sequence[str | None]) -> str:
        """Return the document of a row; empty where it is to have none.

        :param values: the row's values in the order of `columns`.
        :raises DocumentError: the function fails for this row.
        """
        row: dict[str, object] = {}
        for column, value in zip(self.columns, values, strict=True):
            if (name := self._listed.get(column)) is None:
                row[column] = value
            else:
                row[name] = [] if value is None else msgspec.json.decode(value)
        made = self.call(row)
        return "" if made is None else self.text(made)


class ChunkFunction(Function):
    """Cuts documents; see `ChunksOfDocument`."""

    def cut(self, document: str) -> list[str]:
        """Return the pieces of a document.

        :raises DocumentError: the function fails for this document.
        """
        made = self.call(document)
        if isinstance(made, str):
            raise DocumentError(f"{self.path} returned str, not a list of texts")
        try:
            return [self.text(piece) for piece in made]
        except TypeError:
            raise DocumentError(f"{self.path} returned {type(made).__name__}, not a list of texts") from None
