"""`pinning_status` and `pinning_check` on MariaDB and MySQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connections

from pinning_middleware import stats
from pinning_middleware.servers import probe as probing

from .mariadb import Servers
from .test_status import check, skip_system_checks, status

__all__ = ["skip_system_checks"]

pytestmark = pytest.mark.real


def test_status_says_whether_reads_are_bounded(
    my: Servers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers exist whose connections have no `fileno`."""
    monkeypatch.setattr(probing, "driver_connection", lambda raw: object())
    caplog.set_level("INFO", "pinning_middleware.servers")
    connections.settings["my2"]["OPTIONS"]["read_timeout"] = 5
    for _ in range(2):
        for alias in ("my1", "my2"):
            with connections[alias].cursor():
                connections[alias].close()
    (message,) = [text for text in caplog.messages if "cannot time out" in text]
    assert message.startswith("Reads of my1 ")
    code, rows = status()
    assert code == 0
    bounded = {alias: row["reads_bounded"] for alias, row in rows.items()}
    assert bounded == {"my": None, "my1": False, "my2": True}


@pytest.fixture
def plain(my: Servers) -> Iterator[str]:
    """Create a role with SELECT only."""
    my["my"].execute("CREATE USER plain IDENTIFIED BY 'plain'")
    my["my"].execute("GRANT SELECT ON *.* TO plain")
    my.wait_for()
    yield "plain"
    my["my"].execute("DROP USER plain")
    my.wait_for()


def test_status_of_healthy_servers(my: Servers) -> None:
    code, rows = status()
    assert code == 0, rows
    assert {alias: row["role"] for alias, row in rows.items()} == {
        # A MariaDB that has replayed nothing may be both.
        "my": "primary" if my.HAS_ROLE else None,
        "my1": "replica",
        "my2": "replica",
    }
    assert rows["my1"]["lag"] == 0.0
    assert rows["my1"]["position"] == my["my1"].position


def test_live_check_measures_each_replica(my: Servers, plain: str) -> None:
    code, found = check()
    assert code == 0
    assert found["my1"]["detected_after"] is not None
    assert found["pool"]["missing_privileges"] == []
    connections.settings["my1"].update(USER=plain, PASSWORD=plain)
    connections["my1"].close()
    del connections["my1"]
    code, found = check()
    assert [
        (right["alias"], right["privilege"]) for right in found["pool"]["missing_privileges"]
    ] == [("my1", my.MONITOR)]


def test_replica_alias_of_another_database_is_degraded(my: Servers) -> None:
    my["my"].execute("CREATE DATABASE elsewhere")
    my["my"].execute("GRANT ALL ON elsewhere.* TO site")
    my.wait_for()
    name = connections.settings["my1"]["NAME"]
    connections.settings["my1"]["NAME"] = "elsewhere"
    try:
        code, rows = status()
    finally:
        connections.settings["my1"]["NAME"] = name
        my["my"].execute("DROP DATABASE elsewhere")
        my.wait_for()
    assert code == stats.DEGRADED
    assert rows["my1"]["error"].startswith("it is connected to the database 'elsewhere', but my is")


def test_status_of_a_stopped_replica(my: Servers) -> None:
    my["my1"].stop()
    code, rows = status()
    assert code == stats.DEGRADED
    assert (rows["my1"]["state"], rows["my1"]["reason"]) == ("out", "unreachable")
