"""ReplicaSet: the status of the servers of a pool, without a database."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from django.test import override_settings

from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.replica_set import LAG_VALID_FOR
from pinning_middleware.routing.rotation import Rotation
from pinning_middleware.servers import monitor
from pinning_middleware.servers.registry import Identity, Server, registry
from tests.real.conftest import as_databases


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Return a pool whose servers are not connected to."""
    for work in ("retry_until_up", "sample_lag"):
        monkeypatch.setattr(monitor.Monitors, work, lambda *args: None)
    monkeypatch.setattr(monitor.Monitor, "_probe", lambda *args: None)
    entry = {"ENGINE": "django.db.backends.postgresql", "NAME": "site", "HOST": "10.0.0.1"}
    with as_databases({alias: {**entry, "PORT": PORTS[alias]} for alias in PORTS}):
        yield pools().by_primary["pg"]


PORTS = {"pg": "1", "pg1": "2", "pg2": "3"}


def register_server(alias: str, started: str = "1") -> Server:
    return registry.register(alias, Identity(started, "10.0.0.1", int(PORTS[alias])), "ff")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of waits (seconds), in order."""
    found: list[float] = []
    wait_for = monitor.Monitors.wait_for

    def recording(self: Any, aliases: Any, seconds: float, over: Any) -> Any:
        found.append(seconds)
        return wait_for(self, aliases, seconds, over)

    monkeypatch.setattr(monitor.Monitors, "wait_for", recording)
    return found


def test_drained_replica_never_serves_in_place_of_another(pool: Pool) -> None:
    """Also if it lags, so that it would be the last one to serve."""
    weights = {"pg": {"pg1": 1, "pg2": 0}}
    with override_settings(PINNING_REPLICAS=weights, PINNING_MAX_LAG=5):
        drained = pools().by_primary["pg"]
        registry.set_status(register_server("pg2"), Fault.LAG)
        registry.mark_down(drained.endpoints["pg1"], Fault.UNREACHABLE, 1000, "by the test")
        assert drained.replica_set.next() is None
        assert drained.replica_set.freshest_first() == []


def test_old_lag_does_not_count(pool: Pool) -> None:
    server = register_server("pg1")
    server.lag, server.lag_measured = 0.0, time.monotonic()
    assert pool.replica_set.lag("pg1") == 0.0
    server.lag_measured -= LAG_VALID_FOR
    assert pool.replica_set.lag("pg1") is None


def test_lag_of_the_servers_that_are_measured_counts(pool: Pool) -> None:
    """Another one behind the alias may be gone."""
    for started, measured in (("1", 0.0), ("2", time.monotonic())):
        identity = Identity(started, f"10.0.0.{started}", 2)
        server = registry.register("pg1", identity, "ff")
        server.lag, server.lag_measured = float(started), measured
    assert pool.replica_set.lag("pg1") == 2.0


def test_replica_out_for_its_lag_stays_out_while_the_lag_is_unknown(pool: Pool) -> None:
    with override_settings(PINNING_MAX_LAG=5):
        limited = pools().by_primary["pg"]
        server = register_server("pg1")
        server.reports_position, server.is_replica = True, True
        for lag, fault in ((10.0, Fault.LAG), (None, Fault.LAG), (1.0, None), (None, None)):
            server.lag = lag
            limited.health.update_status(limited.endpoints["pg1"], server)
            assert server.out_of_rotation is fault


def test_unknown_lag_is_waited_for_once(pool: Pool, waits: list[float]) -> None:
    for _ in range(3):
        assert pool.replica_set.within_lag(60, None) is None
    assert len(waits) == 1


@pytest.mark.parametrize("who", [("pg",), ("pg1", "pg2")])
def test_unavailable_lag_is_not_waited_for(
    pool: Pool, waits: list[float], who: tuple[str, ...]
) -> None:
    for alias in who:
        register_server(alias).reports_position = False
    assert pool.replica_set.within_lag(60, None) is None
    assert waits == []


def test_slower_refresh_does_not_overwrite_a_newer_one(pool: Pool) -> None:
    registry.mark_down(pool.endpoints["pg2"], Fault.UNREACHABLE, 1000, "by the test")
    began, go_on = threading.Event(), threading.Event()
    exclude = pool.replica_set.rotation.exclude

    def slow(names: Collection[str]) -> None:
        if names == {"pg1", "pg2"} and not began.is_set():
            began.set()
            # If the other thread has to wait for the lock, it has not finished here.
            go_on.wait(0.5)
        exclude(names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rotation, "exclude", lambda self, names: slow(names))
        fail = threading.Thread(
            target=registry.mark_down, args=(pool.endpoints["pg1"], Fault.UNREACHABLE, 9, "")
        )
        fail.start()
        assert began.wait(5)
        succeed = threading.Thread(target=registry.mark_up, args=(pool.endpoints["pg2"],))
        succeed.start()
        succeed.join(0.2)
        go_on.set()
        fail.join()
        succeed.join()
    assert pool.replica_set.out_of_rotation == {"pg1"}
    assert pool.replica_set.rotation.order() == ("pg2",)


def test_fork_during_a_refresh_leaves_the_lock_free(pool: Pool) -> None:
    with pool.replica_set._refreshing:
        child = os.fork()
        if not child:
            os._exit(pool.replica_set._refreshing.locked())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
