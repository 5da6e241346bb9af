"""The systemd units: what they promise agrees with the code, and systemd finds nothing wrong with them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cdcsync.config.sections import Worker
from cdcsync.worker.state import ALIVE_WITHIN_S
from tests import ROOT
from tests.support.configs import configuration

CONFIG = ROOT / "config"
UNIT, TEMPLATE = CONFIG / "cdcsync.service", CONFIG / "cdcsync@.service"
SERVE = CONFIG / "cdcsync-serve.service"

EXPOSURE = 2.0
"""The most that systemd's own scale of 0 to 10 may say."""

PER_INSTANCE = {
    "cdcsync: keeps": "cdcsync for %i: keeps",
    "/etc/cdcsync/cdcsync.toml": "/etc/cdcsync/%i.toml",
    "-/etc/cdcsync/environment": "-/etc/cdcsync/%i.environment",
    "cdcsync.pgpass": "cdcsync-%i.pgpass",
    "CacheDirectory=cdcsync": "CacheDirectory=cdcsync-%i",
    "HF_HOME=%C/cdcsync/models TMPDIR=%C/cdcsync": "HF_HOME=%C/cdcsync-%i/models TMPDIR=%C/cdcsync-%i",
}

EACH_ITS_OWN = {
    *("Description", "ExecStart", "ExecReload", "Type", "WatchdogSec", "RestartSec", "TimeoutStopSec"),
    *("CacheDirectory", "Environment", "LimitNOFILE"),
}
"""What the tool server's unit says in its own way, or has no use for."""


def directives(path: Path) -> list[str]:
    """Return a unit's lines without comments."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def values(name: str) -> list[str]:
    """Return what the unit sets a directive to, line by line."""
    return [line.partition("=")[2] for line in directives(UNIT) if line.startswith(f"{name}=")]


def value(name: str) -> str:
    """Return what the unit sets a directive to that it has once."""
    (found,) = values(name)
    return found


def test_the_template_is_the_unit_with_an_instance() -> None:
    expected = []
    for line in directives(UNIT):
        changed = line
        for of_unit, of_instance in PER_INSTANCE.items():
            if of_unit in line:
                changed = line.replace(of_unit, of_instance)
        expected.append(changed)
    assert directives(TEMPLATE) == expected
    assert expected != directives(UNIT)


def test_unit_and_instances_can_be_on_one_machine() -> None:
    """With DynamicUser a cache directory is a link, below which systemd cannot make another one."""
    (of_unit,), (of_instance,) = (
        [line.partition("=")[2] for line in directives(path) if line.startswith("CacheDirectory=")]
        for path in (UNIT, TEMPLATE)
    )
    assert Path(of_unit) not in (Path(of_instance), *Path(of_instance).parents)


def test_it_has_the_time_to_stop_and_the_watchdog_is_more_patient_than_the_worker() -> None:
    assert float(value("TimeoutStopSec")) > Worker().stop_timeout_s
    assert float(value("WatchdogSec")) > ALIVE_WITHIN_S


def test_the_tool_server_is_restricted_as_the_worker_is() -> None:
    of_the_worker, of_the_server = (
        {line for line in directives(path) if line.partition("=")[0] not in EACH_ITS_OWN} for path in (UNIT, SERVE)
    )
    assert of_the_worker == of_the_server


def test_systemd_waits_until_either_process_is_of_use() -> None:
    for path in (UNIT, TEMPLATE, SERVE):
        assert "Type=notify" in directives(path)


def test_a_reload_is_the_signal_that_the_worker_takes_for_one() -> None:
    *_, signalled = values("ExecReload")
    assert signalled.split()[1:] == ["-HUP", "$MAINPID"]
    assert value("Type") == "notify"


@pytest.mark.parametrize(("line", "status", "told"), [("", 0, ""), ("batch_row = 10", 2, "batch_row")])
def test_a_file_with_errors_fails_the_reload_before_the_worker_is_asked(
    tmp_path: Path, line: str, status: int, told: str
) -> None:
    file = tmp_path / "cdcsync.toml"
    file.write_text(configuration("postgresql://here/shop", worker_lines=line))
    looks, _ = values("ExecReload")
    for shipped, here in (
        ("/opt/cdcsync/bin/cdcsync", f"{sys.executable} -m cdcsync"),
        ("/etc/cdcsync/cdcsync.toml", str(file)),
    ):
        assert shipped in looks
        looks = looks.replace(shipped, here)
    done = subprocess.run(shlex.split(looks), capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (status, "")
    assert told in done.stderr


@pytest.mark.parametrize("path", [UNIT, TEMPLATE], ids=lambda path: path.name)
def test_every_restriction_comes_with_its_reason(path: Path) -> None:
    lines = path.read_text().partition("[Service]")[2].partition("[Install]")[0].splitlines()
    blocks = "\n".join(lines[lines.index(next(line for line in lines if line.startswith("# -- "))) + 1 :])
    explained = True
    for line in blocks.splitlines():
        explained = line.startswith("#") or (bool(line) and explained)
        assert explained or not line, line


@pytest.fixture
def systemd_analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("there is no systemd-analyze: it is in Debian's package systemd")
    return found


@pytest.fixture(params=[UNIT, TEMPLATE, SERVE], ids=lambda path: path.name)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit whose program exists, which systemd wants; an instance of the template."""
    source: Path = request.param
    made = tmp_path / source.name.replace("@.", "@articles.")
    made.write_text(source.read_text().replace("/opt/cdcsync/bin/cdcsync", "/bin/true"))
    return made


def test_systemd_finds_nothing_wrong(systemd_analyze: str, unit: Path) -> None:
    done = subprocess.run([systemd_analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip(f"systemd-analyze cannot verify here: {done.stderr.strip()}")
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


def test_systemd_finds_it_well_shut_off(systemd_analyze: str, unit: Path) -> None:
    done = subprocess.run(
        [systemd_analyze, "security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", str(unit)],
        capture_output=True,
        text=True,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a unit that is not loaded")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout
