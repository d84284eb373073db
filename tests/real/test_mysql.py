"""Tags, gaps, parallel appliers and groups, which only MySQL has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from django.db import connections
from django.test import override_settings

from tests.app.models import Book

from . import mariadb, mysql
from .conftest import (
    eventually,
    in_threads,
    pool,
    position_in,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .mariadb import Servers
from .test_gtid import REPLICAS
from .test_status import check, skip_system_checks, status

__all__ = ["skip_system_checks"]

pytestmark = pytest.mark.real


@pytest.fixture
def product() -> type[Servers]:
    return mysql.Servers


def test_site_logs_in_by_caching_sha2_password_without_tls(my: Servers) -> None:
    plugin = "SELECT plugin FROM mysql.user WHERE user = %s"
    assert my["my"].execute(plugin % "'site'") == [("caching_sha2_password",)]
    with connections["my1"].cursor() as cursor:
        cursor.execute("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
        assert cursor.fetchone() == ("Ssl_cipher", "")


def test_write_with_a_tag_is_required(own: Servers) -> None:
    own["my"].execute("GRANT TRANSACTION_GTID_TAG, SESSION_VARIABLES_ADMIN ON *.* TO site")
    with connections["my"].cursor() as cursor:
        cursor.execute("SET SESSION gtid_next = 'AUTOMATIC:backup'")
    own.wait_for()
    own.pause()
    token = write()
    assert {log.rpartition(":")[2] for log in position_in(token)} >= {"backup"}
    assert server_for(token) == "my"
    own.resume("my2")
    assert server_for(token) == "my2"


def test_gap_in_the_primarys_numbers_is_not_waited_for(own: Servers) -> None:
    (uuid,) = own["my"].written
    skip = f"SET gtid_next = '{uuid}:100'; BEGIN; COMMIT; SET gtid_next = 'AUTOMATIC'"
    own["my"].execute(skip)
    token = write()
    assert position_in(token)[f"{uuid}/100"] == 100
    own.wait_for()
    assert server_for(token) in REPLICAS
    own.pause()
    assert server_for(write()) == "my"


def test_writes_are_visible_on_replicas_that_commit_in_any_order(own: Servers) -> None:
    for alias in REPLICAS:
        own[alias].execute(
            "STOP REPLICA; SET GLOBAL replica_preserve_commit_order = OFF; START REPLICA"
        )

    def write_and_read(number: int) -> list[str]:
        missed = []
        for each in range(25):
            title = f"book {number}.{each}"
            with unrelated_scope(write(title)):
                if not Book.objects.filter(title=title).exists():
                    missed.append(title)
        return missed

    assert in_threads(write_and_read, 8) == [[]] * 8


def test_gtids_that_are_switched_on_are_noticed(own: Servers) -> None:
    for mode in ("ON_PERMISSIVE", "OFF_PERMISSIVE"):
        own["my"].execute(f"SET GLOBAL gtid_mode = {mode}")
    assert position_in(write()) is None
    for mode in ("ON_PERMISSIVE", "ON"):
        own["my"].execute(f"SET GLOBAL gtid_mode = {mode}")
    assert position_in(write()) is None
    primary = pool().endpoint.server
    assert primary is not None
    primary.retry_position_at = time.monotonic()
    assert position_in(write()) == own["my"].written


# Group Replication


@contextmanager
def applier_blocked(member: mariadb.Server) -> Iterator[None]:
    """Let a member of a group fall behind: the applier of a group can't be stopped by itself."""
    import MySQLdb

    connection = MySQLdb.connect(unix_socket=str(member.socket), user="root")
    with closing(connection), connection.cursor() as cursor:
        cursor.execute("FLUSH TABLES WITH READ LOCK")
        yield


class TestGroup:
    @pytest.fixture
    def product(self) -> type[Servers]:
        return mysql.Group

    def test_status_names_the_primary_and_the_secondaries(self, own: Servers) -> None:
        write()
        code, rows = status()
        assert code == 0, rows
        roles = {alias: row["role"] for alias, row in rows.items()}
        assert roles == {"my": "primary", "my1": "replica", "my2": "replica"}
        assert check()[0] == 0

    def test_position_is_that_of_the_groups_uuid(self, own: Servers) -> None:
        with applier_blocked(own["my1"]), applier_blocked(own["my2"]):
            token = write()
            assert position_in(token) == own["my"].written
            assert [server_for(token) for _ in range(4)] == ["my"] * 4
        own.wait_for()
        assert server_for(token) in REPLICAS

    def test_next_primary_leaves_a_gap_that_is_not_waited_for(self, own: Servers) -> None:
        write("one")
        own.wait_for()
        own["my"].stop()
        members = {alias: own[alias] for alias in REPLICAS}
        found: list[str] = []

        def is_elected() -> bool:
            found[:] = [
                alias
                for alias, member in members.items()
                if isinstance(member, mysql.Member) and member.state[1] == "PRIMARY"
            ]
            return bool(found)

        assert eventually(is_elected)
        (primary,), (replica,) = found, REPLICAS - set(found)
        connections["my"].close()
        connections.settings["my"]["PORT"] = connections.settings[primary]["PORT"]
        with override_settings(PINNING_REPLICAS={"my": [replica]}):
            with applier_blocked(own[replica]):
                token = write("two")
                assert position_in(token) == own[primary].written
                assert len(position_in(token)) == 2
                assert server_for(token) == "my"
            own[replica].wait_for(own[primary].position)
            assert server_for(token) == replica
            assert titles(token) == ["one", "two"]
