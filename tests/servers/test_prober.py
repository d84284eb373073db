"""When watchers look, without a database."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from django.test import override_settings

from pinning_middleware.servers import monitor
from pinning_middleware.servers.monitor import FIRST_PAUSE, SAMPLE_EVERY, Monitor
from pinning_middleware.servers.registry import LAST_REPLICA_RETRY_INTERVAL, Endpoint, registry


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    with override_settings(PINNING_SECONDS=15):
        for alias in ("replica1", "replica2"):
            registry.endpoint(alias, "default")
        yield


def out(alias: str, reason: str = "unreachable") -> Endpoint:
    endpoint = registry.endpoint(alias)
    registry.mark_down(endpoint, reason, 1000, "by the test")
    return endpoint


def watcher_of(alias: str) -> Monitor:
    """One whose thread does not run."""
    return Monitor(alias, "default", lambda endpoint, server: None)


def due(watcher: Monitor) -> float:
    """In how many seconds it looks again, had it just looked."""
    watcher._looked = time.monotonic()
    at = watcher._next(watcher._looked, FIRST_PAUSE)
    assert at is not None
    return max(at - watcher._looked, 0)


def test_a_retry_whose_time_comes_during_a_trial_is_still_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a trial finds out takes nobody back, so it puts nothing off either."""
    endpoint = out("replica1", "unresponsive")
    watcher = watcher_of("replica1")

    def ask(self: Monitor, alias: str, is_trial: bool = False) -> None:
        assert is_trial
        endpoint.retry_at = time.monotonic()

    monkeypatch.setattr(Monitor, "_ask", ask)
    watcher._look()
    assert due(watcher) == 0


@override_settings(PINNING_RETRY_AFTER=0)
def test_a_retry_after_no_time_is_no_busy_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "_ask", lambda *args: None)
    monkeypatch.setattr(Monitor, "_reaches", lambda *args: False)
    endpoint = out("replica1")
    endpoint.retry_at = time.monotonic()
    watcher = watcher_of("replica1")
    watcher._look()
    assert endpoint.retry_at - watcher._looked >= LAST_REPLICA_RETRY_INTERVAL * 0.9


@pytest.mark.parametrize(("weight", "pause"), [(1, SAMPLE_EVERY), (0, LAST_REPLICA_RETRY_INTERVAL)])
def test_one_of_weight_0_serves_nobody_meanwhile(weight: int, pause: float) -> None:
    """The primary has the reads of all, so the one that is out is looked at in a hurry."""
    with override_settings(PINNING_REPLICAS={"default": {"replica1": 1, "replica2": weight}}):
        registry.endpoint("replica2", "default")
        registry.endpoint("replica1", "default")
        out("replica1")
        assert due(watcher_of("replica1")) == pytest.approx(pause)


class Leaving(Monitor):
    """One that leaves for want of work, between being found and being given some."""

    def need(self, sampling: bool = False, dating: bool = False) -> bool:
        self.end()
        return super().need(sampling, dating)

    def waiting(self, by: int) -> bool:
        self.end()
        return super().waiting(by)


@pytest.mark.parametrize("work", ["tend", "sample", "date", "wait_for"])
def test_what_one_that_is_leaving_was_asked_is_done_by_the_next(
    monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    leaving = Leaving("replica1", "default", lambda endpoint, server: None)
    monkeypatch.setattr(monitor, "_watchers", {"replica1": leaving})
    if work == "sample":
        monitor.sample_lag("default", ("replica1",), leaving.judge)
    elif work == "wait_for":
        monitor.wait_for(("replica1",), "default", leaving.judge, 1, lambda: True)
    else:
        getattr(monitor, work)("replica1", "default", leaving.judge)
    assert leaving.is_over
    assert not monitor._watchers["replica1"].is_over
    monitor.stop()
