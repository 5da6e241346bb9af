"""The command line without servers: options, exit statuses, and what errors look like."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

import pytest

import cdcsync
from cdcsync import config
from cdcsync.cli import main
from cdcsync.cli.printing import excerpt, plain, print_findings, print_hits, print_json, print_verdict
from cdcsync.errors import EmbedError
from cdcsync.preflight import Finding
from cdcsync.target.search import Hit

COMMANDS = [
    *("demo", "init", "check", "run", "status", "search", "replay", "verify", "evaluate", "failures", "teardown"),
    *("config show", "config schema", "config example", "config roles", "config systemd", "config alerts"),
    *("config dashboard", "config compose", "config kubernetes"),
]

HEAVY = {"starlette", "uvicorn", "numpy", "torch", "psycopg", "structlog", "msgspec", "anyio", "prometheus_client"}
"""What no one should wait for who only wants help."""

SLOW = {"pydantic", "structlog", "numpy", "torch", "starlette", "prometheus_client"}
"""What would take longer to import than a search takes."""

PACKAGES = str(Path(cdcsync.__file__).parents[1])
"""Where the package is, for processes that run elsewhere: it need not be installed."""

CONFIG = """
[source]
dsn = "postgresql://me:secret@127.0.0.1:{port}/db"
[embedders.words]
type = "hash"
[indexes.articles]
table = "articles"
text = "{{title}}"
embedder = "words"
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A file whose databases cannot be reached: nothing listens on port 1."""
    path = tmp_path / "cdcsync.toml"
    path.write_text(CONFIG.format(port=1))
    return path


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CDCSYNC_CONFIG", "CDCSYNC_DEBUG", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def exit_status(*arguments: str | Path) -> int:
    """Run the command line in this process and return its exit status."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def run_process(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cdcsync", *arguments],
        env={**os.environ, "PYTHONPATH": PACKAGES, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


# -- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(*command.split(), "--help") == 0
    assert f"Usage: cdcsync {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "config show"])
def test_the_help_shows_how_the_command_is_used(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_status(*command.split(), "-h")
    _, _, after_options = capsys.readouterr().out.rpartition("╯")
    assert f"cdcsync {command}" in " ".join(after_options.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--help", "search"]], ids=str)
def test_the_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(*arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"│ {command.split()[0]} " in printed for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["config"]], ids=str)
def test_without_a_command_the_help_is_shown_and_the_status_is_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*arguments) == 2
    assert "Commands" in capsys.readouterr().out


def of_its_own(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that has imported nothing."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": PACKAGES},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_waits_for_no_heavy_import() -> None:
    script = (
        "import sys\n"
        "from cdcsync.cli import main\n"
        f"for command in {['', *COMMANDS]}:\n"
        "    try:\n"
        "        main([*command.split(), '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = of_its_own(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS) + 1
    assert HEAVY.isdisjoint(done.stderr.split())


def test_a_search_imports_nothing_that_takes_longer_than_itself(config_file: Path) -> None:
    script = (
        "import sys\n"
        "from cdcsync.cli import main\n"
        "try:\n"
        f"    main(['search', 'articles', 'word', '-k', '3', '-c', {str(config_file)!r}])\n"
        "finally:\n"
        "    print(*sys.modules)\n"
    )
    done = of_its_own(script)
    assert "no server listens" in done.stderr  # it came as far as the target
    assert SLOW.isdisjoint(done.stdout.split())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"cdcsync {cdcsync.__version__}\n"


COMPLETE = """
eval "$(cdcsync --show-completion bash)"
COMP_WORDS=(cdcsync "$@") COMP_CWORD=$#
_cdcsync_completion cdcsync
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="this machine has no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [(["te"], "teardown"), (["config", "s"], "show schema systemd"), (["status", "--w"], "--watch"), (["nosuch"], "")],
    ids=str,
)
def test_bash_completes_commands_and_options(typed: list[str], offered: str, tmp_path: Path) -> None:
    program = tmp_path / "cdcsync"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m cdcsync \"$@\"\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "bash", *typed],
        env={**os.environ, "PYTHONPATH": PACKAGES, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (offered, "")


# -- the configuration file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_file_is_named_before_or_after_the_command(
    order: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = config_file.rename(tmp_path / "other.toml")
    named = ["-c", str(elsewhere)]
    arguments = [*named, "config", "show"] if order == "before" else ["config", "show", *named]
    assert exit_status(*arguments) == 0
    assert "[indexes.articles]" in capsys.readouterr().out


def test_the_file_of_the_environment_is_taken_when_none_is_named(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDCSYNC_CONFIG", str(config_file.rename(tmp_path / "other.toml")))
    assert exit_status("config", "show") == 0
    assert exit_status("config", "show", "-c", "nosuch.toml") == 2
    assert "nosuch.toml" in capsys.readouterr().err


def test_a_file_in_the_working_directory_is_taken_by_default(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("config", "show") == 0
    assert "[indexes.articles]" in capsys.readouterr().out
    config_file.unlink()
    assert exit_status("config", "show") == 2
    assert "where: cdcsync.toml" in capsys.readouterr().err


def test_show_fills_in_defaults_and_hides_secrets(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("config", "show") == 0
    shown = capsys.readouterr().out
    assert 'listen = "127.0.0.1:9477"' in shown
    assert "secret" not in shown
    assert "***" in shown


def test_the_schema_is_json_and_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("config", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["$defs"]["Source"]["properties"]["slot"]["description"]


# -- errors -----------------------------------------------------------------------------------------------------


def test_a_wrong_configuration_is_three_lines_and_status_2(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(CONFIG.format(port=1).replace("[source]", "[source]\nslto = 'x'"))
    assert exit_status("check") == 2
    what, where, fix = capsys.readouterr().err.splitlines()
    assert what.startswith("error: source.slto: unknown key")
    assert where == "where: cdcsync.toml"
    assert fix.startswith("fix:")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["serach"], "Did you mean 'search'?"),
        (["search"], "Missing argument 'INDEX'"),
        (["search", "articles", "x", "-k", "0"], "'-k'"),
        (["search", "articles", "x", "--mode", "fuzzy"], "'--mode'"),
        (["status", "--nosuch"], "--nosuch"),
        (["config", "shwo"], "shwo"),
        (["demo", "--rows", "many"], "'--rows'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_has_the_same_form_and_status_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*arguments) == 2
    printed = capsys.readouterr()
    what, fix = printed.err.splitlines()
    assert what.startswith("error: ")
    assert problem in what
    assert fix.startswith("fix:   `cdcsync")
    assert "--help" in fix
    assert printed.out == ""


def test_an_index_that_is_not_configured_is_answered_with_the_nearest(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("search", "article", "x") == 2
    assert "did you mean articles?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["search", "articles", "x"]], ids=" ".join)
def test_a_server_that_does_not_answer_is_an_error_without_a_traceback(
    command: list[str], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.partition(":")[0] for line in printed.err.splitlines()] == ["error", "where", "fix"]
    assert "secret" not in printed.err


def test_an_error_of_several_tasks_is_the_one_that_explains_it(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise ExceptionGroup("tasks", [ExceptionGroup("task", [EmbedError("the model is gone", where="minilm")])])

    monkeypatch.setattr(config, "load", fail)
    assert exit_status("check") == 1
    assert capsys.readouterr().err == "error: the model is gone\nwhere: minilm\n"


def break_down(*_: object) -> NoReturn:
    raise RuntimeError("it broke\nwith details")


def test_a_surprise_is_one_line_and_how_to_learn_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "load", break_down)
    assert exit_status("check") == 1
    what, fix = capsys.readouterr().err.splitlines()
    assert what == "error: RuntimeError: it broke"
    assert "CDCSYNC_DEBUG=1" in fix


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_traceback_is_shown_to_who_asks_for_it(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "load", break_down)
    if way == "environment":
        monkeypatch.setenv("CDCSYNC_DEBUG", "1")
    assert exit_status(*(["--debug"] if way == "option" else []), "check") == 1
    assert "in break_down" in capsys.readouterr().err


def test_an_interrupt_ends_quietly_with_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupt)
    assert exit_status("check") == 130
    assert capsys.readouterr() == ("", "")


def test_errors_are_coloured_on_request_and_never_with_no_color() -> None:
    coloured = run_process("check", "-c", "nosuch", environment={"FORCE_COLOR": "1"})
    plain_ = run_process("check", "-c", "nosuch", environment={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    neither = run_process("check", "-c", "nosuch")
    assert "\x1b[1;31merror:" in coloured.stderr
    assert "\x1b[1;31m" not in plain_.stderr
    assert "\x1b" not in neither.stderr
    assert {coloured.returncode, plain_.returncode, neither.returncode} == {2}


# -- printing ---------------------------------------------------------------------------------------------------

HIT = Hit({"id": 7}, {"price": Decimal("1.50")}, 2, "a\x1b[2Jb\n\nc", 0.0328, 0.25, None, True)


def test_text_from_a_database_cannot_move_the_cursor() -> None:
    assert plain("a\x1b[2Jb\r\u202ec\td\ne") == "a·[2Jb··c·d\ne"


def test_hits_are_printed_with_their_key_figures_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_hits([HIT])
    assert capsys.readouterr().out.splitlines() == [
        "  1  id=7  chunk 2  score 0.0328  distance 0.2500  its vector is not up to date",
        "     price=1.50",
        "     a·[2Jb",
        "     c",
    ]


def test_no_hits_are_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_hits([])
    assert capsys.readouterr().out == "nothing was found\n"


def test_a_long_text_is_cut_and_says_so() -> None:
    assert excerpt("one\ntwo\nthree", lines=2) == "one\ntwo …"
    assert excerpt("x" * 1000) == "x" * 400 + " …"
    assert excerpt("short", indent="  ") == "  short"


def test_json_holds_what_json_has_no_form_for(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([HIT, Path("a")])
    hit, path = json.loads(capsys.readouterr().out)
    assert hit["carried"] == {"price": "1.50"}
    assert hit["text_rank"] is None
    assert hit["stale"] is True
    assert path == "a"


def test_findings_have_marks_and_fixes_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding.ok("source", "wal_level is logical"),
        Finding.warning("slot cdcsync", "is not there yet", "`run` creates it"),
        Finding.error("target", "[vector] is missing", "CREATE EXTENSION vector"),
    ]
    print_findings(findings)
    print_verdict(findings, " -c a.toml")
    assert capsys.readouterr().out.splitlines() == [
        "✓ source: wal_level is logical",
        "! slot cdcsync: is not there yet",
        "  fix: `run` creates it",
        "✗ target: [vector] is missing",
        "  fix: CREATE EXTENSION vector",
        "1 error, 1 warning. Correct the errors, then run again: cdcsync check -c a.toml",
    ]
    print_verdict(findings[:2], "")
    assert capsys.readouterr().out == "No errors, 1 warning. Start the worker with: cdcsync run\n"
    print_verdict(findings[:1], "")
    assert capsys.readouterr().out.splitlines()[-1] == "All checks passed. Start the worker with: cdcsync run"
