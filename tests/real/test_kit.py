"""The tools for the tests of sites, on real servers: a pause is one, and so is a death."""

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
    assert_reads_from,
    capture_reads,
    forbid_stale_reads,
    replicas,
    step,
)
from pinning_middleware.testing.clock import reset_step
from sample_site.cluster import Cluster
from tests.app.models import Book
from tests.kit.test_project import PYTEST, UNITTEST, project, ran

from .conftest import PostgreSQL, look_around, stranger, write
from .mariadb import Servers
from .test_mariadb import my, shared  # noqa: F401

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    replicas.reset()
    reset_step()


def count(alias: str) -> int:
    with no_failover():
        return Book.objects.using(alias).count()


def test_a_lag_is_a_real_pause(pg: PostgreSQL) -> None:
    look_around()
    replicas.lag("pg1")
    token = write()
    pg.wait_for("pg2")
    assert (count("pg1"), count("pg2")) == (0, 1)
    for _ in range(3):
        with stranger(token), assert_reads_from("pg2", "caught_up"):
            Book.objects.count()
    replicas.catch_up("pg1")
    assert count("pg1") == 1
    assert replicas.lagging == frozenset()


def test_a_lag_of_all_sends_a_pin_to_the_primary(pg: PostgreSQL) -> None:
    look_around()
    with replicas.lag():
        token = write()
        with stranger(token), assert_reads_from("primary", "not_caught_up"):
            Book.objects.count()
        with stranger(), assert_reads_from("replica", "round_robin"):
            Book.objects.count()
    with stranger(token), assert_reads_from("replica", "caught_up"):
        Book.objects.count()


def test_what_a_replica_had_before_it_still_serves(pg: PostgreSQL) -> None:
    token = write()
    pg.wait_for()
    look_around()
    replicas.lag()
    with stranger(token), assert_reads_from("replica", "caught_up"):
        Book.objects.count()


def test_a_stale_read_is_found(pg: PostgreSQL) -> None:
    replicas.lag()
    write()
    with pytest.raises(StaleRead), forbid_stale_reads(), stranger():
        Book.objects.count()
    with forbid_stale_reads(), stranger(), use_replica():
        assert Book.objects.count() == 0


def test_a_reset_ends_a_real_pause(pg: PostgreSQL) -> None:
    replicas.lag()
    write()
    replicas.reset()
    pg.wait_for()
    assert count("pg1") == 1


def test_a_killed_replica_is_out_of_reach_until_it_is_revived(pg: PostgreSQL) -> None:
    look_around()
    replicas.kill("pg1")
    for _ in range(3):
        with stranger(), assert_reads_from("pg2", "round_robin"):
            Book.objects.count()
    # Whoever names it meets what a site meets: no connection, and another node serves.
    with stranger(), capture_reads() as reads:
        Book.objects.using("pg1").count()
    assert [(read.alias, read.served, read.reason) for read in reads] == [
        ("pg1", "pg2", "failover")
    ]
    replicas.revive()
    seen = set()
    for _ in range(4):
        with stranger(), capture_reads() as reads:
            Book.objects.count()
        seen.add(reads[0].served)
    assert seen == {"pg1", "pg2"}


def test_a_locking_read_is_one(pg: PostgreSQL) -> None:
    with stranger(), capture_reads() as reads:
        with transaction.atomic("pg"):
            Book.objects.select_for_update().first()
        Book.objects.count()
    assert [(read.role, read.reason) for read in reads] == [("primary", "lock")] * 2


def test_a_role_without_rights_is_told_what_to_do(pg: PostgreSQL) -> None:
    pg["pg"].execute("DROP ROLE IF EXISTS kit_plain")
    pg["pg"].execute("CREATE ROLE kit_plain LOGIN")
    pg.wait_for()
    settings = connections.settings["pg1"]
    before = settings["USER"]
    settings["USER"] = "kit_plain"
    try:
        with pytest.raises(RuntimeError, match=r"pg1 can't be told.*MIRROR"):
            replicas.lag("pg1")
        assert replicas.lagging == frozenset()
    finally:
        settings["USER"] = before
        pg["pg"].execute("DROP ROLE kit_plain")


def test_windows_step_where_positions_end_pins(pg: PostgreSQL) -> None:
    with stranger() as scope:
        pin_this_request()
    with override_settings(PINNING_POSITIONS=False):
        with stranger() as scope:
            Book.objects.create(title="new")
        with stranger(scope.token), assert_reads_from("primary", "pinned"):
            Book.objects.count()
        step(15)
        with stranger(scope.token), assert_reads_from("replica"):
            Book.objects.count()


def test_mariadb_stops_replaying(my: Servers) -> None:  # noqa: F811
    my["my"].execute("GRANT REPLICATION SLAVE ADMIN ON *.* TO site")
    my.wait_for()
    look_around()
    replicas.lag("my1")
    write()
    my.wait_for("my2")
    assert (count("my1"), count("my2")) == (0, 1)
    replicas.catch_up("my1")
    assert count("my1") == 1
    my["my"].execute("REVOKE REPLICATION SLAVE ADMIN ON *.* FROM site")


# The small site of docs/testing.md, on PostgreSQL


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
def test_the_page_on_mirrors(
    tmp_path: Path, databases: dict[str, Any], command: tuple[str, ...]
) -> None:
    site = project(tmp_path, databases, leave="test_files")
    assert ran(site.run(*command)) >= 25
