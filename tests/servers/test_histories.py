"""Logs that begin anew under the same name: what was known of them does not count."""

from __future__ import annotations

import time

import pytest

from pinning_middleware.pins import Position
from pinning_middleware.servers.registry import Identity, Report, Server, ServerRegistry

LOG = "0-1"


@pytest.fixture
def servers() -> ServerRegistry:
    return ServerRegistry()


def register(servers: ServerRegistry, alias: str, pool: str, port: int) -> Server:
    servers.endpoint(alias, pool)
    return servers.register(alias, Identity("mariadb 1 1", "10.0.0.1", port), "mariadb")


def report(
    servers: ServerRegistry,
    server: Server,
    end: int,
    is_replica: bool,
    sent_at: float | None = None,
) -> None:
    points = {LOG: end}
    written = None if is_replica else Position(points)
    is_behind = end < server.position.get(LOG, -1)
    servers.apply_report(
        server,
        Report(is_replica, points, written, has_new_history=is_behind),
        time.monotonic() if sent_at is None else sent_at,
    )


@pytest.fixture
def primary(servers: ServerRegistry) -> Server:
    return register(servers, "site", "site", 1)


@pytest.fixture
def replica(servers: ServerRegistry) -> Server:
    return register(servers, "replica", "site", 2)


def test_reset_primary_disputes_the_positions_of_its_replicas(
    servers: ServerRegistry, primary: Server, replica: Server
) -> None:
    report(servers, primary, 20, is_replica=False)
    sent_at = time.monotonic()
    # While the primary is being probed.
    report(servers, replica, 20, is_replica=True)
    report(servers, primary, 1, is_replica=False, sent_at=sent_at)
    assert (primary.position, replica.position) == ({LOG: 1}, {})
    # It still is where it was, in the history that has ended.
    report(servers, replica, 20, is_replica=True)
    assert replica.position == {}
    report(servers, replica, 1, is_replica=True)
    assert replica.position == {LOG: 1}


def test_replica_that_was_ahead_of_a_later_report_of_its_primary_is_disputed(
    servers: ServerRegistry, primary: Server, replica: Server
) -> None:
    """This process has not seen the primary before its log was reset."""
    report(servers, replica, 20, is_replica=True)
    report(servers, primary, 1, is_replica=False)
    report(servers, replica, 20, is_replica=True)
    assert replica.position == {}
    # With semi-synchronous replication it may just be ahead of what the primary shows.
    report(servers, primary, 20, is_replica=False)
    report(servers, replica, 20, is_replica=True)
    assert replica.position == {LOG: 20}


def test_report_that_another_overtook_is_no_new_history(
    servers: ServerRegistry, primary: Server, replica: Server
) -> None:
    before = time.monotonic()
    report(servers, replica, 20, is_replica=True)
    report(servers, primary, 20, is_replica=False)
    report(servers, primary, 19, is_replica=False, sent_at=before)
    assert (primary.position, replica.position) == ({LOG: 20}, {LOG: 20})


def test_other_cluster_with_a_log_of_the_same_name_is_not_disputed(
    servers: ServerRegistry, primary: Server
) -> None:
    other = register(servers, "other", "shop", 3)
    report(servers, other, 500, is_replica=True)
    report(servers, primary, 20, is_replica=False)
    report(servers, primary, 1, is_replica=False)
    assert other.position == {LOG: 500}


def test_server_without_a_position_is_asked_again_later(primary: Server) -> None:
    assert primary.record_position_unavailable("it has no GTIDs")
    assert not primary.record_position_unavailable("it has no GTIDs")
    assert not primary.should_query_position
    primary.retry_position_at = time.monotonic()
    assert primary.should_query_position
