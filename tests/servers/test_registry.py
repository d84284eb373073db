"""ServerRegistry: identities, positions, restarts, and the status of servers and endpoints."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Any

import pytest

from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.registry import (
    Endpoint,
    Identity,
    Report,
    Server,
    ServerRegistry,
    registry,
)

SYSTEM = "ff"


@pytest.fixture
def servers() -> ServerRegistry:
    return ServerRegistry()


def register(servers: ServerRegistry, alias: str, started: str = "a", port: int = 1) -> Server:
    servers.endpoint(alias)
    return servers.register(alias, Identity(started, "10.0.0.1", port), SYSTEM)


def report_replayed(servers: ServerRegistry, server: Server, log: str, point: int) -> None:
    servers.apply_report(server, Report(True, {log: point}), time.monotonic())


def report_hidden(servers: ServerRegistry, server: Server, point: int) -> None:
    report = Report(True, {f"{SYSTEM}-": point}, timeline_hidden=True)
    servers.apply_report(server, report, time.monotonic())


def report_written(servers: ServerRegistry, server: Server, end: int) -> None:
    points = {f"{SYSTEM}-1": end}
    report = Report(False, points, Position(points))
    servers.apply_report(server, report, time.monotonic())


# Positions


def test_position_never_decreases(servers: ServerRegistry) -> None:
    server = register(servers, "replica")
    for point in (10, 30, 20):
        report_replayed(servers, server, "ff-1", point)
    assert server.position == {"ff-1": 30}
    assert server.replayed_offset == 20


def test_report_of_an_unknown_timeline_does_not_change_the_position(
    servers: ServerRegistry,
) -> None:
    server = register(servers, "replica")
    report_replayed(servers, server, "ff-", 30)
    assert server.position == {}


def test_primary_report_resolves_hidden_timelines_of_its_system(servers: ServerRegistry) -> None:
    primary, replica = register(servers, "default", port=1), register(servers, "replica", port=2)

    def bracket(before: int, point: int, after: int) -> Any:
        report_written(servers, primary, before)
        report_hidden(servers, replica, point)
        report_written(servers, primary, after)
        return replica.position

    assert bracket(10, 10, 10) == {}
    assert bracket(20, 20, 20) == {"ff-1": 20}
    assert bracket(20, 20, 20) == {"ff-1": 20}
    assert bracket(25, 27, 30) == {"ff-1": 27}


def test_point_outside_the_primary_reports_is_not_resolved(servers: ServerRegistry) -> None:
    primary, replica = register(servers, "default", port=1), register(servers, "replica", port=2)
    for before, point, after in ((10, 10, 10), (20, 15, 30), (20, 35, 30)):
        report_written(servers, primary, before)
        report_hidden(servers, replica, point)
        report_written(servers, primary, after)
        assert replica.position == {}


def test_samples_of_a_primary_are_those_of_its_pool(servers: ServerRegistry) -> None:
    """Two clusters of MariaDB have the same system."""
    assert servers.samples("default") == ()
    first, second = register(servers, "default", port=1), register(servers, "other", port=2)
    for primary, end in ((first, 10), (second, 70), (first, 20)):
        report = Report(False, {"0-1": end}, Position({"0-1": end}))
        servers.apply_report(primary, report, sent_at=float(end))
    assert [position.points for _, position in servers.samples("default")] == [
        {"0-1": 20},
        {"0-1": 10},
    ]
    assert [position.points for _, position in servers.samples("other")] == [{"0-1": 70}]


# Identities and restarts


def test_same_identity_is_the_same_server_for_every_alias(servers: ServerRegistry) -> None:
    server = register(servers, "replica")
    assert register(servers, "replica") is server
    assert register(servers, "other") is server


def test_restart_creates_a_server_with_a_minimum_position(servers: ServerRegistry) -> None:
    before = register(servers, "replica", "monday")
    report_replayed(servers, before, "ff-1", 100)
    after = register(servers, "replica", "tuesday")
    assert after is not before
    assert after.position == {}
    assert after.minimum_position == {"ff-1": 100}
    assert servers.endpoint("replica").server is after
    # The second restart came before the server had reached its minimum position.
    again = register(servers, "replica", "wednesday")
    assert again.minimum_position == {"ff-1": 100}


def test_restart_is_noticed_by_every_alias_of_the_server(servers: ServerRegistry) -> None:
    for alias in ("replica", "other"):
        before = register(servers, alias, "1000.0")
    report_replayed(servers, before, "ff-1", 100)
    for alias in ("replica", "other"):
        after = register(servers, alias, "2000.0")
        assert servers.endpoint(alias).server is after
    assert after.minimum_position == {"ff-1": 100}


def test_two_running_servers_with_one_address_are_both_kept(servers: ServerRegistry) -> None:
    """Containers on two hosts behind one load balancer, for example."""
    older = register(servers, "replica", "1000.5")
    report_replayed(servers, older, "ff-1", 100)
    # The older one may have been restarted, until it is seen again.
    younger = register(servers, "replica", "2000.25")
    assert younger.minimum_position == {"ff-1": 100}
    again = register(servers, "replica", "1000.5")
    assert (younger.minimum_position, again.minimum_position) == ({}, {})
    for started in ("2000.25", "1000.5", "2000.25"):
        register(servers, "replica", started)
    assert servers.endpoint("replica").recent_servers == [younger, again]
    assert (younger.minimum_position, again.minimum_position) == ({}, {})
    # One of them is restarted: it may have been either.
    for server, point in ((younger, 200), (again, 300)):
        report_replayed(servers, server, "ff-1", point)
    restarted = register(servers, "replica", "3000.0")
    assert servers.endpoint("replica").server is restarted
    assert restarted.minimum_position == {"ff-1": 300}
    # The older one is seen again, so it was the younger one.
    register(servers, "replica", "1000.5")
    assert restarted.minimum_position == {"ff-1": 200}


@pytest.mark.parametrize(("point", "expected"), [(99, False), (100, True), (101, True)])
def test_restarted_replica_without_a_timeline_reaches_its_minimum_position(
    servers: ServerRegistry, point: int, expected: bool
) -> None:
    """Without a primary the timeline stays unknown, so the position for pins stays empty."""
    before = register(servers, "replica", "1.0")
    report_replayed(servers, before, "ff-1", 100)
    after = register(servers, "replica", "2.0")
    assert not after.reached_without_timeline(after.minimum_position)
    report_replayed(servers, after, "ff-", point)
    assert after.reached_without_timeline(after.minimum_position) is expected
    assert not after.reached_without_timeline({"ee-1": 1})
    assert after.position == {}


# Status


def test_endpoint_of_several_servers_is_out_only_if_all_are(servers: ServerRegistry) -> None:
    endpoint = servers.endpoint("many", "pool")
    one, other = register(servers, "many", port=1), register(servers, "many", port=2)
    assert endpoint.server is None
    assert set(endpoint.recent_servers) == {one, other}
    servers.set_status(one, Fault.UNRESPONSIVE, 10)
    assert endpoint.out_of_rotation is None
    servers.set_status(other, Fault.LAG, 10)
    assert endpoint.out_of_rotation is not None
    servers.set_status(one, None)
    assert endpoint.out_of_rotation is None


def test_primary_alias_resolves_to_the_server_of_its_newest_connection(
    servers: ServerRegistry,
) -> None:
    endpoint = servers.endpoint("pool")
    new = servers.register("pool", Identity("1", "10.0.0.1", 1), SYSTEM, 20.0)
    # Its connection was opened earlier, and identified later.
    old = servers.register("pool", Identity("1", "10.0.0.1", 2), SYSTEM, 10.0)
    assert endpoint.server is new
    assert (endpoint.was_replaced(old), endpoint.was_replaced(new)) == (True, False)
    servers.register("pool", Identity("1", "10.0.0.1", 2), SYSTEM, 30.0)
    assert endpoint.server is old
    assert not endpoint.was_replaced(old)


def test_standby_behind_a_primary_alias_is_not_the_primary(servers: ServerRegistry) -> None:
    endpoint = servers.endpoint("pool")
    primary = register(servers, "pool", port=1)
    standby = register(servers, "pool", port=2)
    servers.apply_report(standby, Report(True, {"ff-1": 1}), 0.0)
    assert endpoint.server is primary


def test_server_is_demoted_by_its_first_report_as_a_replica(servers: ServerRegistry) -> None:
    server = register(servers, "pool")
    servers.apply_report(server, Report(True, {"ff-1": 1}), 0.0)
    assert server.demoted_at == -math.inf
    servers.apply_report(server, Report(False, {"ff-1": 1}), 0.0)
    servers.apply_report(server, Report(True, {"ff-1": 1}), 0.0)
    at = server.demoted_at
    assert at == server.last_probed
    servers.apply_report(server, Report(True, {"ff-1": 1}), 0.0)
    assert server.demoted_at == at


def test_server_was_replaced_once_another_one_is_seen_for_the_first_time(
    servers: ServerRegistry,
) -> None:
    former = register(servers, "default", port=1)
    endpoint = servers.endpoint("default")
    assert not endpoint.was_replaced(former)
    successor = register(servers, "default", port=2)
    assert endpoint.was_replaced(former)
    assert not endpoint.was_replaced(successor)


def test_servers_that_are_seen_again_and_again_have_not_been_replaced(
    servers: ServerRegistry,
) -> None:
    """The primaries of a cluster behind a balancer."""
    one, other = register(servers, "default", port=1), register(servers, "default", port=2)
    register(servers, "default", port=1)
    endpoint = servers.endpoint("default")
    assert not endpoint.was_replaced(one)
    assert not endpoint.was_replaced(other)


def test_listeners_are_called_for_changes_only(servers: ServerRegistry) -> None:
    faults: list[Fault | None] = []
    servers.listeners.append(lambda endpoint: faults.append(endpoint.out_of_rotation))
    endpoint = servers.endpoint("replica", "default")
    servers.mark_down(endpoint, Fault.UNREACHABLE, 10, "refused")
    servers.mark_down(endpoint, Fault.UNREACHABLE, 10, "refused")
    assert (endpoint.error, endpoint.must_reidentify) == ("refused", True)
    servers.mark_up(endpoint)
    servers.mark_up(endpoint)
    assert faults == [Fault.UNREACHABLE, None]


def test_status_changes_are_logged(
    servers: ServerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pinning_middleware.servers")
    endpoint = servers.endpoint("replica", "default")
    servers.mark_down(endpoint, Fault.UNREACHABLE, 10, "refused")
    servers.mark_up(endpoint)
    assert caplog.messages == [
        "replica is out of rotation (unreachable): refused",
        "replica is back in rotation.",
    ]
    assert [vars(record)["reason"] for record in caplog.records] == ["unreachable", ""]


def test_status_without_an_error_is_logged_with_what_its_fault_means(
    servers: ServerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = servers.endpoint("replica", "default")
    servers.mark_down(endpoint, Fault.UNREACHABLE, 10, "refused")
    servers.mark_down(endpoint, Fault.LAG, 10, "")
    assert caplog.messages[1] == f"replica is out of rotation (lag): {Fault.LAG.description}"


def test_endpoint_of_replaced_settings_notifies_no_listener(
    servers: ServerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """A probe that began before the change, and fails after it, takes nothing out of rotation."""
    before = servers.endpoint("replica", "default")
    servers.clear()
    assert before.is_stale
    notified: list[Endpoint] = []
    servers.listeners.append(notified.append)
    servers.mark_down(before, Fault.UNREACHABLE, 10, "refused")
    assert (notified, caplog.messages) == ([], [])
    current = servers.endpoint("replica", "default")
    assert not current.is_stale
    servers.mark_down(current, Fault.UNREACHABLE, 10, "refused")
    assert notified == [current]
    assert len(caplog.messages) == 1


def test_server_found_after_a_settings_change_is_not_registered(servers: ServerRegistry) -> None:
    """An endpoint created by that probe would be a pool of its own."""
    servers.endpoint("replica", "default")
    servers.clear()
    server = servers.register("replica", Identity("a", "10.0.0.1", 1), SYSTEM)
    assert servers.get(server.identity) is None
    assert servers.endpoint("replica", "default").pool == "default"
    assert servers.endpoint("replica").recent_servers == []


def test_offset_of_a_server_with_a_gap_counts_what_it_has_replayed(servers: ServerRegistry) -> None:
    """It ranks the replicas while the primary is down."""
    with_gap, without = register(servers, "r1"), register(servers, "r2", port=2)
    servers.apply_report(with_gap, Report(True, {"u": 5, "u/9": 9}), time.monotonic())
    servers.apply_report(without, Report(True, {"u": 10}), time.monotonic())
    assert (with_gap.replayed_offset, without.replayed_offset) == (6, 10)


def test_cleared_minimum_does_not_return_with_the_next_restart(servers: ServerRegistry) -> None:
    first = register(servers, "replica")
    report_replayed(servers, first, "ff-1", 30)
    second = register(servers, "replica", "b")
    assert second.minimum_position == {"ff-1": 30}
    second.clear_minimum()
    third = register(servers, "replica", "c")
    assert third.minimum_position == {}
    second.undo_replaces(first.identity)
    assert second.minimum_position == {}


def test_alias_resolves_to_a_server_while_one_replaces_another(
    servers: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Server | None] = []
    forget = Endpoint.forget

    def forget_and_look(self: Endpoint, server: Server) -> None:
        forget(self, server)
        found.append(self.server)

    monkeypatch.setattr(Endpoint, "forget", forget_and_look)
    register(servers, "replica")
    second = register(servers, "replica", "b")
    assert found == [second]


def test_status_of_an_endpoint_follows_the_last_of_two_changes_at_once(
    servers: ServerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.endpoint("replica", "default")
    server = servers.register("replica", Identity("a", "10.0.0.1", 1), SYSTEM)
    recent_servers = Endpoint.recent_servers.fget
    assert recent_servers is not None
    is_computing, is_back = threading.Event(), threading.Event()

    def wait_for_the_other(self: Endpoint) -> list[Server]:
        found = recent_servers(self)
        if server.out_of_rotation and threading.current_thread() is not threading.main_thread():
            found = [Server(server.identity)]
            found[0].out_of_rotation = server.out_of_rotation
            is_computing.set()
            # The other thread cannot change the status meanwhile, so this ends after its timeout.
            is_back.wait(0.2)
        return found

    monkeypatch.setattr(Endpoint, "recent_servers", property(wait_for_the_other))
    first = threading.Thread(target=servers.set_status, args=(server, Fault.LAG))
    first.start()
    assert is_computing.wait(10)
    servers.set_status(server, None)
    is_back.set()
    first.join()
    assert servers.endpoint("replica").out_of_rotation is None


def test_lock_that_is_held_at_a_fork_is_free_in_the_child() -> None:
    with registry._lock:
        child = os.fork()
        if not child:
            os._exit(registry._lock.locked())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
