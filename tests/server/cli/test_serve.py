"""The commands of the tool server: tokens, and the record of calls by each of its options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from tests.support.serving import Office

pytestmark = pytest.mark.server

CALLS = """
INSERT INTO cdcsync.calls (at, subject, tool, index_name, outcome, hits, query_hash, query, ms) VALUES
    (now() - interval '1 hour', 'ana', 'search', 'tickets', 'ok', 3, 'aa', 'forgot my login', 12),
    (now() - interval '2 hours', 'ana', 'search', 'tickets', 'ok', 0, 'bb', NULL, 900),
    (now() - interval '3 hours', 'ben', 'fetch', 'tickets', 'wrong', NULL, NULL, NULL, 4),
    (now() - interval '3 days', 'ben', 'search', 'tickets', 'ok', 1, 'cc', NULL, 50)
"""


@pytest.fixture
def recorded(tickets: Office) -> Iterator[Office]:
    tickets.database.execute(CALLS)
    yield tickets
    tickets.database.execute("TRUNCATE cdcsync.calls")


def audit(office: Office, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert office.command("audit", "--json", *options) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("options", "milliseconds"),
    [
        ([], [12, 900, 4]),
        (["--hours", "100"], [12, 900, 4, 50]),
        (["--hours", "1.5"], [12]),
        (["--subject", "ben", "--hours", "100"], [4, 50]),
        (["--subject", "nobody"], []),
        (["--tool", "fetch"], [4]),
        (["--empty"], [900]),
        (["--slowest", "--hours", "100"], [900, 50, 12, 4]),
        (["-n", "2"], [12, 900]),
        (["--slowest", "-n", "1", "--tool", "search", "--subject", "ben", "--hours", "100"], [50]),
    ],
)
def test_each_option_chooses_among_the_calls(
    recorded: Office, capsys: pytest.CaptureFixture[str], options: list[str], milliseconds: list[float]
) -> None:
    assert [call["ms"] for call in audit(recorded, capsys, *options)] == milliseconds


def test_people_read_a_call_a_line(recorded: Office, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorded.command("audit") == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "ana  search  tickets  ok  3 hits  12 ms  forgot my login" in first
    assert "0 hits  900 ms  query bb" in second
    assert "ben  fetch  tickets  wrong" in third


HOSTILE = [
    "\x1b]0;pwned\x07\x1b[2J",
    "x\n2026-01-01 00:00:00  admin  search  tickets  ok  3 hits  12 ms  forged",
    "x\r2026-01-01 00:00:00  admin  search",
    "x\x85y\u2028z\x0b",
    "\x9b2J\u202ex",
    "[bold]x[/nothing]",
]


@pytest.mark.parametrize("column", ["subject", "tool", "index_name", "outcome", "query", "query_hash"])
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_call_is_one_line_in_which_nothing_acts_on_the_terminal(
    recorded: Office, capsys: pytest.CaptureFixture[str], column: str, text: str
) -> None:
    recorded.database.execute("UPDATE cdcsync.calls SET query = NULL")
    update = sql.SQL("UPDATE cdcsync.calls SET {} = %s").format(sql.Identifier(column))
    recorded.database.execute(update, [text])
    assert recorded.command("audit", "-n", "1") == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\n")
    assert shown[:-1].isprintable()
    assert text[-1] in shown or not text[-1].isprintable()
    assert recorded.command("audit", "-n", "1", "--json") == 0
    as_json = capsys.readouterr().out
    assert as_json.replace("\n", "").isprintable()
    assert json.loads(as_json)[0][column] == text


def test_claims_are_shown_as_they_are(tickets: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_tokens_file(tickets, tmp_path)
    stored = {"sha256": "aa", "subject": "Zoë", "claims": {"straße": "Größe"}}
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": [stored]}))
    assert tickets.command("token", "list", path=path) == 0
    assert '{"straße": "Größe"}' in capsys.readouterr().out


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_token_is_one_line_in_which_nothing_acts_on_the_terminal(
    tickets: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = with_tokens_file(tickets, tmp_path)
    stored = {"sha256": "aa", "subject": text, "claims": {text: text}}
    (tmp_path / "tokens.json").write_text(json.dumps({"tokens": [stored]}))
    assert tickets.command("token", "list", path=path) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("  does not expire\n")
    assert shown[:-1].isprintable()
    assert tickets.command("token", "list", "--json", path=path) == 0
    as_json = capsys.readouterr().out
    assert as_json.replace("\n", "").isprintable()
    assert json.loads(as_json)[0]["subject"] == text


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "--hours", "1e12"],
        ["audit", "--subject", "\udcffana"],
        ["token", "new", "ana", "--days", "999999999"],
        ["token", "new", ""],
        ["token", "new", "an\na"],
        ["token", "new", "\udcffana"],
        ["token", "new", "ana", "--claim", "tenant=\udcff"],
        ["token", "revoke", "\udcffana"],
    ],
    ids=ascii,
)
def test_a_mistake_of_an_operator_is_told_as_one(
    tickets: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert tickets.command(*arguments, path=with_tokens_file(tickets, tmp_path)) == 2
    told = capsys.readouterr()
    assert "should not happen" not in told.err
    assert told.out == ""
    assert not (tmp_path / "tokens.json").exists()


def test_the_greatest_numbers_are_taken(tickets: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_tokens_file(tickets, tmp_path)
    assert tickets.command("audit", "--hours", "1000000", "-n", "100000", path=path) == 0
    assert tickets.command("token", "new", "ana banana", "--days", "36500", path=path) == 0
    assert tickets.command("token", "list", path=path) == 0
    assert "\nana banana  {}  until 2" in capsys.readouterr().out


def with_tokens_file(tickets: Office, directory: Path) -> Path:
    """Return a configuration with a file of tokens, which need not be there."""
    path = directory / "cdcsync.toml"
    text = (tickets.directory / "cdcsync.toml").read_text()
    path.write_text(text.replace("[serve]\n", f'[serve]\ntokens_file = "{directory}/tokens.json"\n'))
    return path


def test_tokens_are_made_listed_and_revoked(
    tickets: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_tokens_file(tickets, tmp_path)
    assert tickets.command("token", "new", "ana", "--claim", "tenant=t1", "--days", "30", path=path) == 0
    token = capsys.readouterr().out.strip()
    assert tickets.command("token", "list", path=path) == 0
    assert tickets.command("token", "revoke", "ana", path=path) == 0
    assert tickets.command("token", "list", "--json", path=path) == 0
    shown = capsys.readouterr().out
    assert token not in shown
    assert 'ana  {"tenant": "t1"}  until 20' in shown
    assert "revoked 1" in shown
    assert '"revoked": true' in shown
    assert tickets.command("token", "revoke", "ana", path=path) == 2
    assert tickets.command("token", "new", "ben", "--claim", "tenant", path=path) == 2
