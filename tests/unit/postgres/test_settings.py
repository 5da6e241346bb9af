"""DSNs by which no session could ever be opened are mistakes, found before anything is tried."""

from __future__ import annotations

from functools import partial

import pytest

from cdcsync.errors import SetupError
from cdcsync.postgres.sessions import connect
from cdcsync.postgres.settings import conninfo_for
from cdcsync.source.slot import SlotConnection

LONG = "a" * 64


@pytest.mark.parametrize("host", ["db..example.org", ".example.org", f"{LONG}.example.org", "good.example.org,a..b"])
async def test_a_host_that_cannot_exist_is_a_mistake_in_the_dsn(host: str) -> None:
    dsn = f"postgresql://u:hidden@{host}/app"
    openings = partial(connect, dsn, "source"), partial(connect, dsn, "target"), partial(SlotConnection.connect, dsn)
    for opened in openings:
        with pytest.raises(SetupError, match="cannot be a host name: each part between its dots has 1 to 63") as error:
            await opened()
        assert "hidden" not in f"{error.value.message}{error.value.where}"


async def test_a_host_of_the_environment_that_cannot_exist_is_a_mistake_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "db..example.org")
    with pytest.raises(SetupError, match=r"db\.\.example\.org cannot be a host name"):
        await connect("dbname=app", "target")


@pytest.mark.parametrize(
    "dsn", ["host=db.example.org.", "host=/run/" + LONG, "host=grüße.example.org", "host=a..b hostaddr=192.0.2.1"]
)
def test_hosts_that_can_exist_are_taken(dsn: str) -> None:
    assert "connect_timeout" in conninfo_for(dsn)
