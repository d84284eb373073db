"""The test utilities on real servers: replicas are paused and taken down for real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connections, transaction
from django.test import override_settings

from pinning_middleware import no_failover, pin_this_request, use_replica
from pinning_middleware.testing import (
    StaleRead,
    advance_window,
    assert_reads_from,
    capture_reads,
    forbid_stale_reads,
    replicas,
)
from pinning_middleware.testing.clock import reset_window
from sample_site.cluster import Cluster
from tests.app.models import Book
from tests.testing_utilities.test_project import PYTEST, UNITTEST, project, ran

from .conftest import PostgreSQL, probe_replicas, unrelated_scope, write
from .mariadb import Servers

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    replicas.reset()
    reset_window()


def count(alias: str) -> int:
    with no_failover():
        return Book.objects.using(alias).count()


def test_lag_pauses_replay(pg: PostgreSQL) -> None:
    probe_replicas()
    replicas.lag("pg1")
    token = write()
    pg.wait_for("pg2")
    assert (count("pg1"), count("pg2")) == (0, 1)
    for _ in range(3):
        with unrelated_scope(token), assert_reads_from("pg2", "caught_up"):
            Book.objects.count()
    replicas.catch_up("pg1")
    assert count("pg1") == 1
    assert replicas.lagging == frozenset()


def test_lag_of_all_replicas_routes_pinned_reads_to_the_primary(pg: PostgreSQL) -> None:
    probe_replicas()
    with replicas.lag():
        token = write()
        with unrelated_scope(token), assert_reads_from("primary", "not_caught_up"):
            Book.objects.count()
        with unrelated_scope(), assert_reads_from("replica", "round_robin"):
            Book.objects.count()
    with unrelated_scope(token), assert_reads_from("replica", "caught_up"):
        Book.objects.count()


def test_rows_from_before_the_lag_are_read_from_the_replica(pg: PostgreSQL) -> None:
    token = write()
    pg.wait_for()
    probe_replicas()
    replicas.lag()
    with unrelated_scope(token), assert_reads_from("replica", "caught_up"):
        Book.objects.count()


def test_stale_read_is_detected(pg: PostgreSQL) -> None:
    replicas.lag()
    write()
    with pytest.raises(StaleRead), forbid_stale_reads(), unrelated_scope():
        Book.objects.count()
    with forbid_stale_reads(), unrelated_scope(), use_replica():
        assert Book.objects.count() == 0


def test_reset_resumes_replay(pg: PostgreSQL) -> None:
    replicas.lag()
    write()
    replicas.reset()
    pg.wait_for()
    assert count("pg1") == 1


def test_taken_down_replica_is_unreachable_until_brought_up(pg: PostgreSQL) -> None:
    probe_replicas()
    replicas.take_down("pg1")
    for _ in range(3):
        with unrelated_scope(), assert_reads_from("pg2", "round_robin"):
            Book.objects.count()
    # An explicit read of the alias fails over to another server, as on a site.
    with unrelated_scope(), capture_reads() as reads:
        Book.objects.using("pg1").count()
    assert [(read.alias, read.served, read.reason) for read in reads] == [
        ("pg1", "pg2", "failover")
    ]
    replicas.bring_up()
    seen = set()
    for _ in range(4):
        with unrelated_scope(), capture_reads() as reads:
            Book.objects.count()
        seen.add(reads[0].served)
    assert seen == {"pg1", "pg2"}


def test_locking_read_is_detected(pg: PostgreSQL) -> None:
    with unrelated_scope(), capture_reads() as reads:
        with transaction.atomic("pg"):
            Book.objects.select_for_update().first()
        Book.objects.count()
    assert [(read.role, read.reason) for read in reads] == [("primary", "lock")] * 2


def test_role_without_privileges_raises_with_instructions(pg: PostgreSQL) -> None:
    pg["pg"].execute("DROP ROLE IF EXISTS kit_plain")
    pg["pg"].execute("CREATE ROLE kit_plain LOGIN")
    pg.wait_for()
    settings = connections.settings["pg1"]
    before = settings["USER"]
    settings["USER"] = "kit_plain"
    try:
        with pytest.raises(RuntimeError, match=r"pg1 did not run.*MIRROR"):
            replicas.lag("pg1")
        assert replicas.lagging == frozenset()
    finally:
        settings["USER"] = before
        pg["pg"].execute("DROP ROLE kit_plain")


def test_advance_window_with_positions(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        pin_this_request()
    with override_settings(PINNING_POSITIONS=False):
        with unrelated_scope() as scope:
            Book.objects.create(title="new")
        with unrelated_scope(scope.token), assert_reads_from("primary", "pinned"):
            Book.objects.count()
        advance_window(15)
        with unrelated_scope(scope.token), assert_reads_from("replica"):
            Book.objects.count()


def test_lag_pauses_replay_on_mariadb_and_mysql(my: Servers) -> None:
    my["my"].execute(f"GRANT {my.REPLAY_ADMIN} ON *.* TO site")
    my.wait_for()
    probe_replicas()
    replicas.lag("my1")
    write()
    my.wait_for("my2")
    assert (count("my1"), count("my2")) == (0, 1)
    replicas.catch_up("my1")
    assert count("my1") == 1
    my["my"].execute(f"REVOKE {my.REPLAY_ADMIN} ON *.* FROM site")


# The small site of docs/how-to/testing.md, on PostgreSQL


@pytest.fixture
def databases(cluster: Cluster) -> dict[str, Any]:
    entry = {**cluster.database("primary", "site"), "TEST": {"NAME": "kit_project"}}
    mirror = {**entry, "TEST": {"MIRROR": "default"}}
    return {"default": entry, "replica1": mirror, "replica2": mirror}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(UNITTEST, id="unittest"),
        pytest.param((*UNITTEST, "--parallel", "2"), id="unittest in parallel"),
        pytest.param((*PYTEST, "-n", "2", "--create-db"), id="pytest in parallel"),
    ],
)
def test_documented_mirrors(
    tmp_path: Path, databases: dict[str, Any], command: tuple[str, ...]
) -> None:
    site = project(tmp_path, databases, leave="test_files")
    assert ran(site.run(*command)) >= 25
