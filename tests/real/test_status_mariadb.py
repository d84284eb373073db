"""`pinning_status` and `pinning_check` on MariaDB."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connections

from pinning_middleware import stats

from .mariadb import Servers
from .test_mariadb import my, shared
from .test_status import check, settings_that_are_well, status

__all__ = ["my", "settings_that_are_well", "shared"]

pytestmark = pytest.mark.real


@pytest.fixture
def plain(my: Servers) -> Iterator[str]:
    """A role that may read and nothing else."""
    my["my"].execute("CREATE USER plain IDENTIFIED BY 'plain'")
    my["my"].execute("GRANT SELECT ON *.* TO plain")
    my.wait_for()
    yield "plain"
    my["my"].execute("DROP USER plain")
    my.wait_for()


def test_servers_that_are_well(my: Servers) -> None:
    code, rows = status()
    assert code == 0, rows
    assert {alias: row["role"] for alias, row in rows.items()} == {
        # It has replayed nothing yet, so it may be either.
        "my": None,
        "my1": "replica",
        "my2": "replica",
    }
    assert rows["my1"]["lag"] == 0.0
    assert rows["my1"]["position"].startswith("0-1-")


def test_how_long_each_replica_takes(my: Servers, plain: str) -> None:
    code, found = check()
    assert code == 0
    assert found["my1"]["known_after"] is not None
    assert found["pool"]["missing_rights"] == []
    connections.settings["my1"].update(USER=plain, PASSWORD=plain)
    connections["my1"].close()
    del connections["my1"]
    code, found = check()
    assert [(right["alias"], right["right"]) for right in found["pool"]["missing_rights"]] == [
        ("my1", "SLAVE MONITOR")
    ]


def test_a_stopped_replica(my: Servers) -> None:
    my["my1"].stop()
    code, rows = status()
    assert code == stats.DEGRADED
    assert (rows["my1"]["state"], rows["my1"]["reason"]) == ("out", "unreachable")
