"""Pins and positions on every major version of PostgreSQL that Django supports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.db.backends.postgresql.features import DatabaseFeatures

from sample_site.cluster import Cluster

from .conftest import (
    PostgreSQL,
    django_on,
    eventually,
    position_in,
    server_for,
    titles,
    write,
)
from .layouts import MAJORS, installation

pytestmark = pytest.mark.real


# Django refuses older ones when a process first connects.
SUPPORTED = [major for major in MAJORS if (major,) >= DatabaseFeatures.minimum_database_version]


@pytest.mark.parametrize("major", SUPPORTED)
def test_pinned_read_on_each_version(
    major: int, tmp_path: Path, django_db_setup: None, django_db_blocker: Any
) -> None:
    """It uses the primary while the replica is paused, and then the replica."""
    with (
        django_db_blocker.unblock(),
        Cluster(tmp_path, keep=False, installation=installation(major)) as cluster,
    ):
        assert cluster.primary.execute("SHOW server_version_num")[0][0].startswith(str(major))
        cluster.create_database("site")
        with django_on(cluster) as servers:
            exercise(servers)


def exercise(servers: PostgreSQL) -> None:
    servers.pause()
    token = write("one")
    assert position_in(token)
    assert [server_for(token) for _ in range(4)] == ["pg"] * 4
    assert titles(token) == ["one"]
    servers.resume("pg1")
    assert eventually(lambda: server_for(token) == "pg1")
    assert [titles(token) for _ in range(3)] == [["one"]] * 3
