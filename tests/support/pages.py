"""Reads pages of the documentation as a reader does: types each block into a machine that is set up for it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import inspect
import json
import os
import re
import shlex
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import typer
from typer.core import TyperCommand, TyperGroup

from cdcsync.cli.entry import command_line
from cdcsync.config import parse, render
from tests import ROOT
from tests.support import forked
from tests.support.servers import Database
from tests.support.workers import PATIENCE_S, until

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

DSNS = re.compile(r"postgresql://(?:postgres|cdcsync)@localhost/\w+")
MODEL = re.compile(r'type = "sentence-transformers"\nmodel = "sentence-transformers/all-MiniLM-L6-v2"')

NEVER_RUN = {
    "pip": "it needs an index of packages; the extras that it names are looked up",
    "make": "targets run tests themselves; that there is such a target is looked up",
    "systemctl": "it needs systemd",
    "journalctl": "it needs systemd",
    "docker": "it needs an engine",
    "podman": "it needs an engine",
    "kubectl": "it needs a cluster",
    "ray": "it needs a cluster",
    "jq": "it is another project's",
    "python3": "it makes a virtual environment",
    "pg_dump": "the block moves a target, which tests/server/scenarios/test_administration.py does with it",
    "pg_restore": "the same",
    "{": "the same",
    "psql": "the same",
    "install": "it writes to system directories",
    "mkdir": "it writes to system directories",
    "printf": "it writes to system directories",
    "rm": "it writes to system directories",
    "systemd-creds": "it needs systemd",
    "chmod": "it changes system files",
}
"""Programs of others that a page may name, and why the test does not run them."""

PARSED = ("demo", "init", "migrate", "run", "serve", "drop", "teardown", "--from-audit")
"""Commands and options of ours that need more than a page sets up, and have tests of their own: they are parsed. Pages
that are followed from the beginning to the end start what they say, and tear it down."""


class Block(msgspec.Struct, frozen=True):
    """A fenced block, with the line that it begins at."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        body = inspect.cleandoc(match[3]) if match[1] else match[3]
        found.append(Block(page.name, line, match[2], body))
    return found


def inline_commands(page: Path) -> Iterator[str]:
    """Yield each command of ours that stands in a sentence or a table."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"`(cdcsync [^`]+)`", text):
        # `…`, `…|…`, `[…]` and names in capitals stand for something.
        if not re.search(r"[…|\[\]]|\b[A-Z]{3,}\b", match[1]):
            yield " ".join(match[1].split())


def shell_lines(text: str) -> list[str]:
    """Return the commands of a block, continued lines joined and comments left out."""
    # What a command reads from the lines after it is its own.
    text = re.sub(r"(<<'(\w+)'\n).*?\n\2$", r"\1", text, flags=re.DOTALL | re.MULTILINE)
    joined = re.sub(r" *\\\n *", " ", text)
    lines = (re.sub(r"(^|\s{2,})#.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


@functools.cache
def whole_line() -> TyperGroup:
    """Return the command line with all its commands, which takes a tenth of a second to make."""
    return command_line()


def parse_command(arguments: list[str], *, whole: bool = True) -> None:
    """Have the command line parse a command, without running it.

    :param whole: false where a sentence names a command with some of its options, and leaves out arguments.
    :raises typer.TyperException: there is no such command, option or argument.
    """
    command: Any = whole_line()
    context = typer.Context(command, info_name="cdcsync")
    left = list(arguments)
    while isinstance(command, TyperGroup):
        if left and left[0] in ("-c", "--config"):
            left = left[2:]
        if not left or left[0].startswith("-"):
            break
        name, command, left = command.resolve_command(context, left)
        context = typer.Context(command, info_name=name, parent=context)
    if isinstance(command, TyperCommand) and whole and "--help" not in left:
        command.make_context(context.info_name, left, parent=context.parent)
        return
    known = {option for one in command.get_params(context) for option in (*one.opts, *one.secondary_opts)}
    for word in left:
        if word.startswith("-") and word.partition("=")[0] not in known:
            raise typer.BadParameter(f"No such option: {word}")


class Machine:
    """A directory with a configuration, a database, and the processes that a page starts.

    :param follow: start what a page says to start, in place of only parsing it.
    """

    def __init__(self, directory: Path, database: Database, ports: Mapping[str, int], *, follow: bool) -> None:
        self.directory = directory
        self.database = database
        self.ports = ports
        self.follow = follow
        self.variables: dict[str, str] = {}
        self.processes: list[forked.Process] = []
        self.output = ""

    @property
    def config(self) -> Path:
        return self.directory / "cdcsync.toml"

    def log(self) -> str:
        """Return the end of what the worker said."""
        return (self.directory / "run.log").read_text()[-2000:]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(timeout=30)

    def type(self, block: Block) -> None:
        """Do what a block says."""
        match block.language:
            case "toml":
                self._toml(block)
            case "sql":
                self._sql(block)
            case "sh":
                for line in shell_lines(block.text):
                    self._shell(line, block)
            case "python":
                self._python(block)
            case directive if directive.startswith("{"):
                pass  # the site's own: what it names is checked when the site is built
            case "json":
                json.loads(block.text)
            case "text":
                wrong = [line for line in block.text.splitlines() if re.match(r"(\$ )?(cdcsync|pip|make) ", line)]
                assert not wrong, f"{block}: commands belong into a block of sh: {wrong}"
            case _:
                raise AssertionError(f"{block}: what is {block.language or 'a block without a language'}?")

    # -- configuration ------------------------------------------------------------------------------------------

    def here(self, text: str) -> str:
        """Return a page's text with the addresses of this machine in place of the page's."""
        text = DSNS.sub(self.database.dsn, text)
        text = MODEL.sub('type = "hash"', text)
        for name, port in self.ports.items():
            text = text.replace(f"127.0.0.1:{name}", f"127.0.0.1:{port}")
        return text

    def _toml(self, block: Block) -> None:
        text = self.here(block.text)
        data = tomllib.loads(text)
        if {"source", "embedders", "indexes"} <= data.keys():
            text = text.replace("[source]\n", f'[source]\nslot = "s_{self.database.name}"\n', 1)
            text += f'\n[worker]\nlisten = "127.0.0.1:{self.ports["9477"]}"\n'
            self.config.write_text(text)
            parse(text, {}, where=str(block))
            return
        # A part of a configuration: with the rest around it, it has to be right.
        whole = _merged(tomllib.loads(self.config.read_text()), data)
        for index in whole["indexes"].values():
            if "tables" in index:
                index.pop("table", None)
            else:
                index.setdefault("table", "public.articles")
            index.setdefault("embedder", next(iter(whole["embedders"])))
            if not {"text", "documents"} & index.keys():
                index["text"] = "{title}"
        if "documents" in json.dumps(data):
            for index in whole["indexes"].values():
                if "documents" in index:
                    index.pop("text", None)
        keys = {name: "sk-secret" for name in re.findall(r"\$\{(\w+)\}", text)}
        render(parse(_toml_text(whole), keys, where=str(block)))

    # -- SQL ----------------------------------------------------------------------------------------------------

    def _sql(self, block: Block) -> None:
        with self.database.connect() as connection, contextlib.ExitStack() as stack:
            if roles := "ROLE" in block.text or "rds_replication" in block.text:
                # Roles are of the whole server, which other tests use: none may stay.
                stack.enter_context(connection.transaction(force_rollback=True))
                for role in ("rds_replication", "cdcsync"):
                    if f"CREATE ROLE {role}" not in block.text:
                        connection.execute(f"CREATE ROLE {role}".encode())
            for statement in statements(block.text):
                # A parameter is a vector of the query, which is as good as any other that is there.
                query = statement.replace("$1", "(SELECT embedding FROM articles_index LIMIT 1)")
                try:
                    with connection.transaction() if roles else contextlib.nullcontext():
                        cursor = connection.execute(query.encode())
                except psycopg.errors.DuplicateObject:  # prepared for all pages
                    continue
                except psycopg.Error as error:
                    raise AssertionError(f"{block}: {statement}\n{error}") from error
                if cursor.description is not None and "wait_for" in statement:
                    assert cursor.fetchone() == (True,), f"{block}: {statement}; the worker said: {self.log()}"

    # -- commands -----------------------------------------------------------------------------------------------

    def _shell(self, line: str, block: Block) -> None:
        words = shlex.split(line, comments=True)
        program = words[0].rpartition("/")[2]
        if program == "cdcsync":
            self._ours(words[1:], block)
        elif program == "curl":
            self._curl(line, block)
        elif program == "pip":
            extras = {name.strip() for found in re.findall(r"\[([\w, ]+)\]", line) for name in found.split(",")}
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert extras <= known.keys(), f"{block}: {extras - known.keys()}"
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert all(word in targets for word in words[1:] if "=" not in word and word.isalpha()), f"{block}: {line}"
        elif program == "export" or "=" in program:
            name, _, value = words[-1].partition("=")
            self.variables[name] = value
        elif program == "python":
            script = next((word for word in words[1:] if not word.startswith("-")), "")
            module = script.replace(".", "/")
            assert any((ROOT / path).exists() for path in (script, f"{module}.py", module)), f"{block}: {line}"
        else:
            assert program in NEVER_RUN, f"{block}: nothing is known of {program}"

    def _ours(self, arguments: list[str], block: Block) -> None:
        cut = next((at for at, word in enumerate(arguments) if word in ("|", ">", "&&", ";")), len(arguments))
        arguments = arguments[:cut]
        try:
            parse_command(arguments)
        except typer.TyperException as error:
            raise AssertionError(f"{block}: cdcsync {shlex.join(arguments)}: {error.format_message()}") from error
        name = arguments[0]
        if name in ("run", "serve") and self.follow:
            self.start(arguments)
        elif not {*PARSED, "DIRECTORY"}.isdisjoint(arguments) and not (self.follow and name == "teardown"):
            return
        else:
            if name == "teardown":
                self.close()
                arguments = [*arguments, "--yes"]
            answer = forked.run(*arguments, more={}, directory=self.directory)
            self.output = answer.stdout
            assert answer.returncode == 0, f"{block}: cdcsync {shlex.join(arguments)}\n{answer.stdout}{answer.stderr}"
            if arguments[:2] == ["token", "new"]:
                self.variables["TOKEN"] = re.findall(r"cdcsync_\S+", answer.stdout)[-1]

    def start(self, arguments: list[str]) -> None:
        """Start a worker or a tool server, and wait until it answers."""
        port = self.ports["9477" if arguments[0] == "run" else "9478"]
        path = "readyz?loaded=1" if arguments[0] == "run" else "healthz"
        log = self.directory / f"{arguments[0]}.log"
        with log.open("ab") as file:
            streams = (subprocess.DEVNULL, file, file)
            self.processes.append(
                forked.start("cdcsync", arguments, streams, more={}, directory=self.directory, session=True)
            )

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                    return bool(answer.status == 200)
            except urllib.error.HTTPError as error:
                with error:
                    return path == "healthz"  # whoever answers is there
            except OSError:
                return False

        # Patience begins anew with each line of its log, and loading a model, which logs nothing, takes the longest.
        what, size = (lambda: f"cdcsync {arguments[0]}: {log.read_text()[-2000:]}"), (lambda: log.stat().st_size)
        until(answers, what, patience_s=2 * PATIENCE_S, progress=size)

    def _curl(self, line: str, block: Block) -> None:
        if not self.follow:
            return
        expanded = re.sub(r"\$(\w+)", lambda match: self.variables[match[1]], self.here(line))
        answer = subprocess.run(shlex.split(expanded), capture_output=True, text=True, timeout=30, check=False)
        assert answer.returncode == 0, f"{block}: {answer.stderr}"
        self.output = answer.stdout
        assert json.loads(answer.stdout).get("hits"), f"{block}: {answer.stdout}"

    # -- Python -------------------------------------------------------------------------------------------------

    def _python(self, block: Block) -> None:
        code = compile(
            self.here(block.text), str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        tree = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
        imports: Any = ast.Module([one for one in tree.body if isinstance(one, ast.Import | ast.ImportFrom)], [])
        names: dict[str, Any] = {"token": self.variables.get("TOKEN")}
        if "sentence_transformers" not in block.text:
            exec(compile(imports, str(block), "exec"), names)
        runs = "Index.open(" in block.text or (self.follow and "mcp" in block.text)
        if not runs:
            return
        if "load_config" in block.text and "load_config" not in names:
            from cdcsync import load_config

            names["load_config"] = load_config
        before = Path.cwd()
        os.chdir(self.directory)
        try:
            made = eval(code, names)
            if made is not None:
                asyncio.run(made)
        finally:
            os.chdir(before)


def statements(text: str) -> list[str]:
    """Return the statements of a block, without comments."""
    bare = re.sub(r"--[^\n]*", "", text)
    return [one.strip() for one in bare.split(";") if one.strip()]


def _merged(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return {
        key: _merged(base[key], over[key]) if key in base and key in over else over.get(key, base.get(key))
        for key in {**base, **over}
    }


def _toml_text(value: Mapping[str, Any]) -> str:
    """Return TOML of plain data, every table inline."""
    return "".join(f"{json.dumps(key)} = {_inline(one)}\n" for key, one in value.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_inline(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
