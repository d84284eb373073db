"""What is known of the servers of a pool, without a database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pinning_middleware.routing.decider import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers import prober
from pinning_middleware.servers.server import Identity, Server, registry
from tests.real.conftest import as_databases


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """One of servers that nobody connects to."""
    for work in ("tend", "sample"):
        monkeypatch.setattr(prober, work, lambda *args: None)
    monkeypatch.setattr(prober.Watcher, "_ask", lambda *args: None)
    entry = {"ENGINE": "django.db.backends.postgresql", "NAME": "site", "HOST": "10.0.0.1"}
    with as_databases({alias: {**entry, "PORT": PORTS[alias]} for alias in PORTS}):
        yield pools().by_primary["pg"]


PORTS = {"pg": "1", "pg1": "2", "pg2": "3"}


def meet(alias: str, started: str = "1") -> Server:
    return registry.meet(alias, Identity(started, "10.0.0.1", int(PORTS[alias])), "ff")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how many seconds somebody waited, each time."""
    found: list[float] = []
    wait_for = prober.wait_for

    def noted(aliases: Any, primary: str, judge: Any, seconds: float, over: Any) -> Any:
        found.append(seconds)
        return wait_for(aliases, primary, judge, seconds, over)

    monkeypatch.setattr(prober, "wait_for", noted)
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
        meet(alias).tells = False
    assert pool.within(60, None) is None
    assert waits == []
