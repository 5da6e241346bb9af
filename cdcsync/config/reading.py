"""From a file or its text to a `Config`: TOML, environment, sections, and what sections must be together."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec
import msgspec.inspect as mi

from cdcsync.config.checking import read_fields, suggestion
from cdcsync.config.environment import expand
from cdcsync.config.names import QualifiedName
from cdcsync.config.problems import Problems
from cdcsync.config.sections import Config, Index
from cdcsync.errors import ConfigError


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read the configuration file; see `parse`.

    :param environ: the environment variables; left out, those of this process.
    :raises ConfigError: there is no such file, it cannot be read, is not UTF-8, or `parse` refuses it.
    """
    where = str(path)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            "there is no such file",
            where=where,
            hint="name the file with -c FILE or CDCSYNC_CONFIG; `cdcsync config example` prints one to start from",
        ) from None
    except IsADirectoryError:
        raise ConfigError("is a directory", where=where, hint="name the file in it with -c FILE") from None
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=where, hint="check the path, and the permissions of this user"
        ) from error
    try:
        # Some editors begin a file with a byte order mark, which TOML knows nothing of.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"is not UTF-8 (byte {error.start}, line {line})", where=where, hint="save the file as UTF-8"
        ) from error
    return parse(text, os.environ if environ is None else environ, where=where)


def parse(text: str, environ: Mapping[str, str], *, where: str) -> Config:
    """Read a configuration from TOML text.

    References to environment variables (`${NAME}`, `${NAME:-default}`) are replaced and omitted keys get
    their defaults, also those that depend on others: the target's database and each index's view.

    :param environ: the environment variables.
    :param where: what to call the text in errors: its file's name.
    :raises ConfigError: the text is not TOML, or keys or values are wrong; the message lists all that are.
    """
    problems = Problems()
    try:
        data = expand(tomllib.loads(text), environ, problems)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not TOML: {error}", where=where, hint="correct the text at that place") from error
    except ValueError:
        # The interpreter's guard against slow conversions, which tomllib lets through; it suggests code to call.
        raise ConfigError("holds a number of thousands of digits", where=where, hint="look for a stuck key") from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=where, hint="look for brackets that were left open") from None
    values = read_fields(cast("mi.StructType", mi.type_info(Config)), data, "", problems)
    indexes = {name: _with_view(name, index) for name, index in values.get("indexes", {}).items()}
    _check_indexes(indexes, data.get("embedders"), data.get("rerankers"), problems)
    problems.check(where)
    config = Config(**{**values, "indexes": indexes})
    if "dsn" in data.get("target", {}):
        return config
    target = msgspec.structs.replace(config.target, dsn=config.source.dsn)
    return msgspec.structs.replace(config, target=target)


def _with_view(name: str, index: Index) -> Index:
    return index if index.view else msgspec.structs.replace(index, view=f"public.{name}_index")


def _check_indexes(indexes: Mapping[str, Index], embedders: object, rerankers: object, problems: Problems) -> None:
    """Note indexes whose embedder is not declared, and views that two of them claim.

    :param embedders: the [embedders] section as the file has it: a faulty embedder is a declared one all the same.
    """
    owners: dict[QualifiedName, str] = {}
    for name, index in indexes.items():
        if isinstance(embedders, dict) and embedders and index.embedder not in embedders:
            problems.add(
                f"indexes.{name}.embedder",
                f"there is no [embedders.{index.embedder}] section; {suggestion(index.embedder, embedders)}",
            )
        declared = rerankers if isinstance(rerankers, dict) else {}
        if index.reranker and index.reranker not in declared:
            problems.add(
                f"indexes.{name}.reranker",
                f"there is no [rerankers.{index.reranker}] section; {suggestion(index.reranker, declared)}",
            )
        owner = owners.setdefault(index.view_name, name)
        if owner != name:
            problems.add(f"indexes.{name}.view", f"{index.view_name} is the view of index {owner} already")
