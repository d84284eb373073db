"""Monitor: the time of the next probe, work for a stopping monitor, and replication lag."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from django.test import override_settings

from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault
from pinning_middleware.servers import monitor
from pinning_middleware.servers.dialects.postgresql import PostgreSQL
from pinning_middleware.servers.monitor import FIRST_PAUSE, SAMPLE_INTERVAL, Monitor, Monitors
from pinning_middleware.servers.registry import (
    LAST_REPLICA_RETRY_INTERVAL,
    Endpoint,
    Identity,
    Report,
    Server,
    registry,
)


@pytest.fixture(autouse=True)
def empty_registry() -> Iterator[None]:
    with override_settings(PINNING_SECONDS=15):
        for alias in ("replica1", "replica2"):
            registry.endpoint(alias, "default")
        yield


def mark_down(alias: str, fault: Fault = Fault.UNREACHABLE) -> Endpoint:
    endpoint = registry.endpoint(alias)
    registry.mark_down(endpoint, fault, 1000, "by the test")
    return endpoint


def ignore(endpoint: Endpoint, server: object) -> None:
    """Leave the rotation status as it is."""


def unstarted_monitor(alias: str) -> Monitor:
    """Return a monitor whose thread does not run."""
    return Monitor(alias, "default", ignore)


def seconds_until_next_check(checker: Monitor) -> float:
    """Return the seconds until the next check, if the last one had just ended."""
    checker._last_check = time.monotonic()
    due = checker._next_check(checker._last_check, FIRST_PAUSE)
    assert due is not None
    return max(due - checker._last_check, 0)


def test_trial_does_not_postpone_a_retry_that_becomes_due_during_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint = mark_down("replica1", Fault.UNRESPONSIVE)
    checker = unstarted_monitor("replica1")

    def probe(self: Monitor, alias: str, is_trial: bool = False) -> None:
        assert is_trial
        endpoint.retry_at = time.monotonic()

    monkeypatch.setattr(Monitor, "_probe", probe)
    checker._check()
    assert seconds_until_next_check(checker) == 0


@override_settings(PINNING_RETRY_AFTER=0)
def test_retry_after_zero_seconds_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "_probe", lambda *args: None)
    monkeypatch.setattr(Monitor, "_can_connect", lambda *args: False)
    endpoint = mark_down("replica1")
    endpoint.retry_at = time.monotonic()
    checker = unstarted_monitor("replica1")
    checker._check()
    assert endpoint.retry_at - checker._last_check >= LAST_REPLICA_RETRY_INTERVAL * 0.9


@pytest.mark.parametrize(
    ("weight", "interval"), [(1, SAMPLE_INTERVAL), (0, LAST_REPLICA_RETRY_INTERVAL)]
)
def test_last_replica_with_a_weight_is_retried_at_short_intervals(
    weight: int, interval: float
) -> None:
    """A replica of weight 0 gets no reads, so the primary serves all of them meanwhile."""
    with override_settings(PINNING_REPLICAS={"default": {"replica1": 1, "replica2": weight}}):
        registry.endpoint("replica2", "default")
        registry.endpoint("replica1", "default")
        mark_down("replica1").jitter = 1.0
        assert seconds_until_next_check(unstarted_monitor("replica1")) == pytest.approx(interval)


class StoppingMonitor(Monitor):
    """A monitor that shuts down after the lookup and before work is queued on it."""

    def schedule(self, sampling: bool = False, resolving: bool = False) -> bool:
        self.request_stop()
        return super().schedule(sampling, resolving)

    def change_waiters(self, number: int) -> bool:
        self.request_stop()
        return super().change_waiters(number)


MONITORS = Monitors("default", ignore)
WORK: dict[str, Callable[[], object]] = {
    "retry_until_up": lambda: MONITORS.retry_until_up("replica1"),
    "sample_lag": lambda: MONITORS.sample_lag(("replica1",)),
    "resolve_timeline": lambda: MONITORS.resolve_timeline("replica1"),
    "wait_for": lambda: MONITORS.wait_for(("replica1",), 1, lambda: True),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK.keys())
def test_work_for_a_stopping_monitor_goes_to_a_new_one(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]
) -> None:
    stopping = StoppingMonitor("replica1", "default", ignore)
    monkeypatch.setattr(monitor, "_monitors", {"replica1": stopping})
    work()
    assert stopping.is_stopping
    assert not monitor._monitors["replica1"].is_stopping
    monitor.stop()


@pytest.mark.parametrize(("point", "left"), [(4, 5), (5, 9), (9, None)])
def test_monitor_tracks_the_newest_write_after_an_older_one(
    monkeypatch: pytest.MonkeyPatch, point: int, left: int | None
) -> None:
    monkeypatch.setattr(monitor, "dialect_for", lambda connection: PostgreSQL())
    tracker, server = unstarted_monitor("replica1"), Server(Identity("1", "10.0.0.1", 1))
    for written in (5, 7, 9):
        tracker.track(Position({"ff-1": written}), is_new=True)
    # That of a pin is older, and reached before.
    tracker.track(Position({"ff-1": 3}), is_new=False)
    server.position = {"ff-1": point}
    tracker._check_tracked(server)
    assert tracker._tracked == (None if left is None else Position({"ff-1": left}))


def test_tracked_replica_is_probed_at_most_ten_times_a_second() -> None:
    tracker = unstarted_monitor("replica1")
    tracker._last_check = time.monotonic()
    tracker.track(Position({"ff-1": 5}), is_new=True)
    assert seconds_until_next_check(tracker) == pytest.approx(monitor.TRACK_INTERVAL, abs=0.05)


def test_tracking_that_has_expired_begins_anew() -> None:
    tracker = unstarted_monitor("replica1")
    tracker.track(Position({"ff-1": 5}), is_new=True)
    tracker._track_until, tracker._track_at = time.monotonic() - 1, math.inf
    tracker.track(Position({"ff-1": 7}), is_new=True)
    assert tracker._tracked == Position({"ff-1": 7})
    assert seconds_until_next_check(tracker) <= monitor.TRACK_INTERVAL


def test_other_work_does_not_shorten_the_time_after_a_slow_read() -> None:
    slow = unstarted_monitor("replica1")
    slow._stay_for(monitor.AFTER_SLOW_READ)
    slow.schedule()
    slow.change_waiters(1)
    slow.track(Position({"ff-1": 5}), is_new=True)
    assert slow._busy_until - time.monotonic() > monitor.IDLE_TIMEOUT


def test_log_handler_that_needs_a_monitor_does_not_block_if_no_thread_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A handler that reads the database needs one, for example."""

    def start(self: Monitor) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Monitor, "start", start)
    monkeypatch.setattr(monitor, "_monitors", {})
    first, done = [True], threading.Event()

    def work() -> None:
        MONITORS.wake("replica1")
        done.set()

    def log(*args: object, **kwargs: object) -> None:
        if first:
            first.clear()
            MONITORS.wake("replica2")

    monkeypatch.setattr(monitor, "log_rate_limited", log)
    threading.Thread(target=work, daemon=True).start()
    assert done.wait(10)
    assert not first


# Replication lag


class Lag:
    """A primary that reported 10, 20 and 30 at one-second intervals, and its replica."""

    def __init__(self, ends: tuple[int, ...] = (10, 20, 30), pause: float = 0.0) -> None:
        self.primary, self.replica = self.server("default", 1), self.server("replica1", 2)
        for second, end in enumerate(ends):
            report = Report(False, {"ff-1": end}, Position({"ff-1": end}))
            at = second + (pause if second > 1 else 0.0)
            registry.apply_report(self.primary, report, at)

    def server(self, alias: str, port: int) -> Server:
        registry.endpoint(alias, "default")
        return registry.register(alias, Identity("1", "10.0.0.1", port), "ff")

    def measure(self, report: Report) -> float | None:
        registry.apply_report(self.replica, report, time.monotonic())
        monitor.measure_lag(self.replica, "default")
        return self.replica.lag


@pytest.fixture
def postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "dialect_for", lambda connection: PostgreSQL())


@pytest.mark.usefixtures("postgresql")
@pytest.mark.parametrize(("point", "lag"), [(30, 0.0), (35, 0.0), (29, 1.0), (10, 2.0)])
def test_lag_is_the_age_of_the_newest_sample_that_is_reached(point: int, lag: float) -> None:
    assert Lag().measure(Report(True, {"ff-1": point})) == lag


@pytest.mark.usefixtures("postgresql")
@pytest.mark.parametrize(
    ("ends", "point", "lag"),
    [
        ((10, 20, 30), 30, 0.0),
        ((10, 20, 30), 20, None),
        ((10, 20, 30), 10, 61.0),
        ((10, 20, 30), 5, 61.0),
        ((10, 20, 30, 40), 30, 1.0),
        ((10, 20, 30, 40), 20, 1.0),
        ((10, 20, 30, 40), 10, 62.0),
    ],
)
def test_lag_after_a_pause_of_a_minute_does_not_include_it(
    ends: tuple[int, ...], point: int, lag: float | None
) -> None:
    """A replica that lacks the newest position may have had the one before it all the time."""
    measured = Lag(ends, pause=59.0).measure(Report(True, {"ff-1": point}))
    assert measured == (None if lag is None else pytest.approx(lag))


@pytest.mark.usefixtures("postgresql")
def test_lag_behind_every_sample_is_at_least_the_age_of_the_oldest() -> None:
    assert Lag().measure(Report(True, {"ff-1": 5})) == 2.0


@pytest.mark.usefixtures("postgresql")
def test_lag_behind_the_only_sample_is_unknown() -> None:
    assert Lag(ends=(10,)).measure(Report(True, {"ff-1": 5})) is None


@pytest.mark.usefixtures("postgresql")
def test_lag_without_a_sample_of_the_primary_is_unknown() -> None:
    assert Lag(ends=()).measure(Report(True, {"ff-1": 5})) is None


@pytest.mark.usefixtures("postgresql")
def test_lag_of_a_server_that_is_no_replica_is_zero() -> None:
    assert Lag().measure(Report(False, {"ff-1": 5})) == 0.0


def test_lag_with_a_hidden_timeline_compares_the_reported_point() -> None:
    assert Lag().measure(Report(True, {"ff-": 25}, timeline_hidden=True)) == 1.0
