"""What is known of the servers of a pool, without a database."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from typing import Any

import pytest

from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.rotation import Rotation
from pinning_middleware.servers import monitor
from pinning_middleware.servers.registry import Identity, Server, registry
from tests.real.conftest import as_databases


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """One of servers that nobody connects to."""
    for work in ("tend", "sample"):
        monkeypatch.setattr(monitor, work, lambda *args: None)
    monkeypatch.setattr(monitor.Monitor, "_ask", lambda *args: None)
    entry = {"ENGINE": "django.db.backends.postgresql", "NAME": "site", "HOST": "10.0.0.1"}
    with as_databases({alias: {**entry, "PORT": PORTS[alias]} for alias in PORTS}):
        yield pools().by_primary["pg"]


PORTS = {"pg": "1", "pg1": "2", "pg2": "3"}


def meet(alias: str, started: str = "1") -> Server:
    return registry.register(alias, Identity(started, "10.0.0.1", int(PORTS[alias])), "ff")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how many seconds somebody waited, each time."""
    found: list[float] = []
    wait_for = monitor.wait_for

    def noted(aliases: Any, primary: str, judge: Any, seconds: float, over: Any) -> Any:
        found.append(seconds)
        return wait_for(aliases, primary, judge, seconds, over)

    monkeypatch.setattr(monitor, "wait_for", noted)
    return found


def test_a_lag_that_nobody_tells_is_waited_for_once(pool: Pool, waits: list[float]) -> None:
    for _ in range(3):
        assert pool.within(60, None) is None
    assert len(waits) == 1


@pytest.mark.parametrize("who", [("pg",), ("pg1", "pg2")])
def test_nobody_waits_for_a_lag_that_can_t_be_told(
    pool: Pool, waits: list[float], who: tuple[str, ...]
) -> None:
    for alias in who:
        meet(alias).reports_position = False
    assert pool.within(60, None) is None
    assert waits == []


def test_a_slower_count_does_not_have_the_last_word(pool: Pool) -> None:
    registry.mark_down(pool.endpoints["pg2"], "unreachable", 1000, "by the test")
    began, go_on = threading.Event(), threading.Event()
    leave_out = pool.rotation.leave_out

    def slow(names: Collection[str]) -> None:
        if names == {"pg1", "pg2"} and not began.is_set():
            began.set()
            # Where the other one has to wait for it, that shows by its not being done.
            go_on.wait(0.5)
        leave_out(names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rotation, "leave_out", lambda self, names: slow(names))
        fail = threading.Thread(
            target=registry.fail, args=(pool.endpoints["pg1"], "unreachable", 9, "")
        )
        fail.start()
        assert began.wait(5)
        succeed = threading.Thread(target=registry.succeed, args=(pool.endpoints["pg2"],))
        succeed.start()
        succeed.join(0.2)
        go_on.set()
        fail.join()
        succeed.join()
    assert pool.out == {"pg1"}
    assert pool.rotation.order() == ("pg2",)


def test_a_fork_in_the_middle_of_a_count_leaves_no_lock_behind(pool: Pool) -> None:
    with pool._counting:
        child = os.fork()
        if not child:
            os._exit(pool._counting.locked())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
