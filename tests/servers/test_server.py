"""What is known of servers: dated claims, floors, endpoints of several servers, lag's samples."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

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


def meet(servers: ServerRegistry, alias: str, started: str = "a", port: int = 1) -> Server:
    servers.endpoint(alias)
    return servers.register(alias, Identity(started, "10.0.0.1", port), SYSTEM)


def replica_says(servers: ServerRegistry, server: Server, point: int) -> None:
    report = Report(True, {f"{SYSTEM}-": point}, timeline_hidden=True)
    servers.apply_report(server, report, time.monotonic())


def primary_says(servers: ServerRegistry, server: Server, end: int, timeline: int = 1) -> None:
    position = {f"{SYSTEM}-{timeline}": end}
    servers.apply_report(server, Report(False, position, position), time.monotonic())


class Hidden:
    """A replica whose role is not told the timeline, and its primary."""

    def __init__(self, servers: ServerRegistry) -> None:
        self._servers = servers
        self.primary = meet(servers, "default", port=1)
        self.replica = meet(servers, "replica", port=2)

    def sandwich(self, before: int, point: int, after: int, timeline: int = 1) -> Any:
        primary_says(self._servers, self.primary, before, timeline)
        replica_says(self._servers, self.replica, point)
        primary_says(self._servers, self.primary, after, timeline)
        return self.replica.position


def test_a_primary_dates_a_replica_that_moves_with_it(servers: ServerRegistry) -> None:
    hidden = Hidden(servers)
    assert hidden.sandwich(10, 10, 10) == {}
    assert hidden.sandwich(20, 20, 20) == {"ff-1": 20}
    assert hidden.sandwich(20, 20, 20) == {"ff-1": 20}
    assert hidden.sandwich(25, 27, 30) == {"ff-1": 27}


def test_one_that_stands_still_is_passed_and_not_dated(servers: ServerRegistry) -> None:
    """It is ahead on a timeline that was lost, and the new primary's log grows past it."""
    hidden = Hidden(servers)
    for end in range(80, 130, 10):
        assert hidden.sandwich(end, 100, end + 10, timeline=2) == {}


@pytest.mark.parametrize(("timeline", "known"), [(1, {}), (2, {"ff-2": 10}), (12, {})])
def test_one_that_is_on_no_older_timeline_is_dated_at_once(
    servers: ServerRegistry, timeline: int, known: dict[str, int]
) -> None:
    hidden = Hidden(servers)
    hidden.replica.checkpoint_timeline = "2"
    assert hidden.sandwich(10, 10, 10, timeline) == known


def test_what_is_ahead_or_behind_is_not_dated(servers: ServerRegistry) -> None:
    hidden = Hidden(servers)
    hidden.sandwich(10, 10, 10)
    assert hidden.sandwich(20, 15, 30) == {}
    assert hidden.sandwich(20, 35, 30) == {}


def test_an_answer_counts_only_from_before_and_after(servers: ServerRegistry) -> None:
    hidden = Hidden(servers)
    hidden.sandwich(10, 10, 10)
    replica_says(servers, hidden.replica, 20)
    assert hidden.replica.position == {}


def test_a_promotion_in_between_dates_nothing(servers: ServerRegistry) -> None:
    hidden = Hidden(servers)
    hidden.sandwich(10, 10, 10)
    primary_says(servers, hidden.primary, 20, timeline=1)
    replica_says(servers, hidden.replica, 20)
    primary_says(servers, hidden.primary, 20, timeline=2)
    assert hidden.replica.position == {}


def test_a_restart_makes_another_server_with_a_floor(servers: ServerRegistry) -> None:
    before = meet(servers, "replica", "monday")
    servers.apply_report(before, Report(True, {"ff-1": 100}), time.monotonic())
    after = meet(servers, "replica", "tuesday")
    assert after is not before
    assert after.position == {}
    assert after.minimum_position == {"ff-1": 100}
    assert servers.endpoint("replica").server is after
    # It never got that far: the floor stays.
    again = meet(servers, "replica", "wednesday")
    assert again.minimum_position == {"ff-1": 100}


def test_the_same_server_is_the_same(servers: ServerRegistry) -> None:
    assert meet(servers, "replica") is meet(servers, "replica") is meet(servers, "other")


def test_an_alias_may_lead_to_several(servers: ServerRegistry) -> None:
    one, other = meet(servers, "pool", port=1), meet(servers, "pool", port=2)
    endpoint = servers.endpoint("pool")
    assert endpoint.server is None
    assert set(endpoint.recent_servers) == {one, other}
    servers.set_status(one, "unresponsive", 10)
    assert endpoint.out_of_rotation == ""
    servers.set_status(other, "lag", 10)
    assert endpoint.out_of_rotation
    servers.set_status(one, "")
    assert endpoint.out_of_rotation == ""


def test_listeners_hear_of_news_only(servers: ServerRegistry) -> None:
    heard: list[str] = []
    servers.listeners.append(lambda endpoint: heard.append(endpoint.out_of_rotation))
    endpoint = servers.endpoint("replica", "default")
    servers.mark_down(endpoint, "unreachable", 10, "refused")
    servers.mark_down(endpoint, "unreachable", 10, "refused")
    assert (endpoint.error, endpoint.must_reidentify) == ("refused", True)
    servers.mark_up(endpoint)
    servers.mark_up(endpoint)
    assert heard == ["unreachable", ""]


def test_positions_only_grow(servers: ServerRegistry) -> None:
    server = meet(servers, "replica")
    for point in (10, 30, 20):
        servers.apply_report(server, Report(True, {"ff-1": point}), time.monotonic())
    assert server.position == {"ff-1": 30}


def test_a_timeline_that_nobody_could_tell_counts_for_nothing(servers: ServerRegistry) -> None:
    server = meet(servers, "replica")
    servers.apply_report(server, Report(True, {"ff-": 30}), time.monotonic())
    assert server.position == {}


def test_what_was_known_before_the_settings_changed_says_nothing_more(
    servers: ServerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """Who looked at it then, and fails only now, takes nobody out."""
    before = servers.endpoint("replica", "default")
    servers.clear()
    heard: list[Endpoint] = []
    servers.listeners.append(heard.append)
    servers.mark_down(before, "unreachable", 10, "refused")
    assert (heard, caplog.messages) == ([], [])
    servers.mark_down(servers.endpoint("replica", "default"), "unreachable", 10, "refused")
    assert [endpoint.out_of_rotation for endpoint in heard] == ["unreachable"]
    assert len(caplog.messages) == 1


def test_a_fork_in_the_middle_of_a_meeting_leaves_no_lock_behind() -> None:
    """Whoever held it is not in the child, where nobody would give it back."""
    with registry._lock:
        child = os.fork()
        if not child:
            os._exit(registry._lock.locked())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_who_is_met_after_the_settings_changed_is_nobody_s(servers: ServerRegistry) -> None:
    """An alias that is made anew by who was asking would be a pool of its own."""
    servers.endpoint("replica", "default")
    servers.clear()
    met = servers.register("replica", Identity("a", "10.0.0.1", 1), SYSTEM)
    assert servers.get(met.identity) is None
    assert servers.endpoint("replica", "default").pool == "default"
    assert servers.endpoint("replica").recent_servers == []


def test_two_at_one_address_are_two(servers: ServerRegistry) -> None:
    """Containers of two hosts, behind one balancer."""
    older = meet(servers, "replica", "1000.5")
    servers.apply_report(older, Report(True, {"ff-1": 100}), time.monotonic())
    # As long as the older one is not met again, it may have been restarted.
    younger = meet(servers, "replica", "2000.25")
    assert younger.minimum_position == {"ff-1": 100}
    again = meet(servers, "replica", "1000.5")
    assert (younger.minimum_position, again.minimum_position) == ({}, {})
    for started in ("2000.25", "1000.5", "2000.25"):
        meet(servers, "replica", started)
    assert servers.endpoint("replica").recent_servers == [younger, again]
    assert (younger.minimum_position, again.minimum_position) == ({}, {})
    # One of them is restarted: it may have been either.
    for server, point in ((younger, 200), (again, 300)):
        servers.apply_report(server, Report(True, {"ff-1": point}), time.monotonic())
    restarted = meet(servers, "replica", "3000.0")
    assert servers.endpoint("replica").server is restarted
    assert restarted.minimum_position == {"ff-1": 300}
    # It was the younger one, since the older is still there.
    meet(servers, "replica", "1000.5")
    assert restarted.minimum_position == {"ff-1": 200}


def test_a_restart_is_noticed_by_every_alias_that_leads_there(servers: ServerRegistry) -> None:
    for alias in ("replica", "other"):
        before = meet(servers, alias, "1000.0")
    servers.apply_report(before, Report(True, {"ff-1": 100}), time.monotonic())
    for alias in ("replica", "other"):
        after = meet(servers, alias, "2000.0")
        assert servers.endpoint(alias).server is after
    assert after.minimum_position == {"ff-1": 100}


@pytest.mark.parametrize(("point", "is_back"), [(99, False), (100, True), (101, True)])
def test_without_a_primary_a_restarted_replica_s_own_word_is_enough(
    servers: ServerRegistry, point: int, is_back: bool
) -> None:
    """To serve again, not for a pin: nobody can tell the timeline."""
    before = meet(servers, "replica", "1.0")
    servers.apply_report(before, Report(True, {"ff-1": 100}), time.monotonic())
    after = meet(servers, "replica", "2.0")
    assert not after.reached_without_timeline(after.minimum_position)
    servers.apply_report(after, Report(True, {"ff-": point}), time.monotonic())
    assert after.reached_without_timeline(after.minimum_position) is is_back
    assert not after.reached_without_timeline({"ee-1": 1})
    assert after.position == {}
