"""Rotation status and replication lag of replicas, on PostgreSQL."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import pytest
from django.db import connections
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import use_replica
from pinning_middleware.servers import connect, monitor
from pinning_middleware.servers.monitor import Monitor, Monitors
from pinning_middleware.servers.registry import Server, registry
from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    SentSignals,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    make_retry_due,
    mark_unreachable,
    pool,
    port,
    port_for,
    probe_replicas,
    queries,
    server,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .layouts import Forwarder, database, frozen

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}


@pytest.fixture
def max_lag() -> Iterator[None]:
    # Longer than the sample interval (one second): a busy machine may miss a sample.
    with override_settings(PINNING_MAX_LAG=1.5):
        yield


def fall_behind(*aliases: str) -> None:
    """Write and read until exactly these replicas are out of rotation because of lag."""
    assert eventually(
        lambda: (write(), server_for(None), pool().replica_set.out_of_rotation == set(aliases))[-1]
    )
    assert {endpoint(alias).out_of_rotation for alias in aliases} == {"lag"}


def measured() -> bool:
    """Read, and return whether the lag of both replicas is known."""
    server_for(None)
    return all(pool().replica_set.lag(alias) is not None for alias in REPLICAS)


# PINNING_MAX_LAG


@pytest.mark.usefixtures("max_lag")
def test_lagging_replica_leaves_and_rejoins_the_rotation(
    pg: PostgreSQL, sent_signals: SentSignals, caplog: pytest.LogCaptureFixture
) -> None:
    pg.pause("pg1")
    with caplog.at_level(logging.INFO, "pinning_middleware"):
        fall_behind("pg1")
        assert {server_for(None) for _ in range(6)} == {"pg2"}
        pg.resume("pg1")
        assert eventually(lambda: server_for(None) == "pg1")
    assert {server_for(None) for _ in range(4)} == REPLICAS
    # On a busy machine the other replica may occasionally lag by half a second.
    (left,) = [said for said in sent_signals.of("replica_removed") if said["replica"] == "pg1"]
    assert (left["sender"], left["reason"]) == ("pg", "lag")
    assert {"sender": "pg", "replica": "pg1"} in sent_signals.of("replica_restored")
    assert "pg1 is out of rotation (lag)" in caplog.text
    assert "pg1 is back in rotation." in caplog.text


@pytest.mark.usefixtures("max_lag")
def test_reads_do_not_measure_lag(pg: PostgreSQL) -> None:
    """Monitors measure it, on their own connections."""
    assert eventually(measured)
    with queries() as asked:
        for _ in range(8):
            server_for(None)
    assert asked.added == []


@pytest.mark.usefixtures("max_lag")
def test_idle_primary_causes_no_lag(pg: PostgreSQL) -> None:
    """Without writes there is no lag, regardless of the age of the last transaction."""
    write()
    pg.wait_for()
    assert eventually(measured)
    pg.pause()
    looks = {alias: endpoint(alias).recent_servers[0].last_probed for alias in REPLICAS}
    assert eventually(
        lambda: (
            server_for(None),
            all(
                endpoint(alias).recent_servers[0].last_probed > looks[alias] + 0.9
                for alias in REPLICAS
            ),
        )[-1]
    )
    # Background work of the primary may occasionally write in between.
    assert all((pool().replica_set.lag(alias) or 0.0) < 3 for alias in REPLICAS)


@override_settings(PINNING_MAX_LAG=0.5)
def test_replica_behind_the_newest_sample_only_does_not_lag(
    pg: PostgreSQL, sent_signals: SentSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is milliseconds behind the newest sample, not the full sample interval."""
    assert eventually(measured)
    pg.pause("pg1")
    write()
    ask, late = Monitor._probe, []

    def slow(watcher: Monitor, alias: str, is_trial: bool = False) -> Server | None:
        answer = ask(watcher, alias, is_trial)
        if alias == "pg1" and answer is not None and not late:
            newest = registry.samples("pg")[0][1].points
            if any(answer.position[log] < point for log, point in newest.items()):
                late.append(alias)
                pg.resume("pg1")
                pg.wait_for()
        return answer

    monkeypatch.setattr(Monitor, "_probe", slow)
    assert eventually(lambda: (server_for(None), late)[-1])
    told = endpoint("pg1").recent_servers[0].last_probed
    assert eventually(
        lambda: (server_for(None), endpoint("pg1").recent_servers[0].last_probed > told)[-1]
    )
    assert [said for said in sent_signals.of("replica_removed") if said["replica"] == "pg1"] == []


@pytest.mark.usefixtures("max_lag")
def test_stopped_receiver_is_detected_as_lag(pg: PostgreSQL) -> None:
    """Everything received is replayed; only the primary's position shows the lag."""
    pg["pg1"].execute("ALTER SYSTEM SET primary_conninfo = ''")
    pg["pg1"].execute("SELECT pg_reload_conf()")
    try:
        receivers = "SELECT count(*) FROM pg_stat_wal_receiver"
        assert eventually(lambda: pg["pg1"].execute(receivers) == [(0,)])
        fall_behind("pg1")
        assert {server_for(None) for _ in range(4)} == {"pg2"}
    finally:
        pg["pg1"].execute("ALTER SYSTEM RESET primary_conninfo")
        pg["pg1"].execute("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("max_lag")
def test_unpinned_reads_use_the_freshest_replica_if_all_lag(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """The primary could not handle the reads of all replicas."""
    pg.pause("pg1")
    fall_behind("pg1")
    pg.pause("pg2")
    fall_behind("pg1", "pg2")
    token = write()
    sent_signals.clear()
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    assert sent_signals.of("fell_back_to_primary") == []
    assert server_for(token) == "pg"


@pytest.mark.usefixtures("max_lag")
def test_lag_of_test_mirrors_is_not_measured(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection to it would prevent the runner from dropping the test database."""
    for alias in REPLICAS:
        monkeypatch.setitem(connections.settings[alias]["TEST"], "MIRROR", "pg")
    assert server_for(None) == "pg"
    assert server_within(1.5) == "pg"
    assert monitor._monitors == {}


# use_replica(max_lag=…)


def server_within(seconds: float, token: str | None = None) -> str:
    with unrelated_scope(token), use_replica(max_lag=seconds):
        return server()


def test_use_replica_max_lag_uses_a_replica_within_it(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    token = write()
    assert eventually(lambda: (write(), {server_within(1.5) for _ in range(4)} == {"pg2"})[-1])
    # In a scope whose replica lags, too.
    assert {server_within(1.5, token) for _ in range(6)} == {"pg2"}
    # The lag of a replica that was behind from the start needs a second sample.
    assert eventually(lambda: {server_within(3600) for _ in range(6)} == REPLICAS)
    assert {server_for(None) for _ in range(6)} == REPLICAS


def test_use_replica_max_lag_uses_the_primary_if_all_lag(pg: PostgreSQL) -> None:
    pg.pause()
    assert eventually(lambda: (write(), server_within(1.5) == "pg")[-1])
    assert eventually(lambda: server_within(3600) in REPLICAS)
    pg.resume()
    assert eventually(lambda: {server_within(1.5) for _ in range(4)} == REPLICAS)


def test_use_replica_max_lag_rejects_a_replica_behind_the_first_sample(pg: PostgreSQL) -> None:
    """One sample is not enough to estimate the lag of a replica behind it."""
    pg.pause()
    write()
    with override_settings(PINNING_WAIT=0), unrelated_scope(), use_replica(max_lag=0.2):
        assert server() == "pg"


def test_use_replica_max_lag_works_on_first_use(pg: PostgreSQL) -> None:
    """A script with one read uses a replica although there was no earlier probe."""
    write()
    pg.wait_for()
    assert server_within(60) in REPLICAS


def test_use_replica_max_lag_fails_over_within_the_limit(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    assert eventually(lambda: (write(), {server_within(1.5) for _ in range(4)} == {"pg2"})[-1])
    with unrelated_scope(), use_replica(max_lag=1.5):
        assert server() == "pg2"
        pg["pg2"].stop("immediate")
        assert "new" in Book.objects.values_list("title", flat=True)
        assert server() == "pg"


# Several servers behind one alias


@pytest.fixture(params=["setting", "block"])
def limit(request: pytest.FixtureRequest) -> Iterator[Callable[[], int]]:
    """Return a function that reads with a limited lag, and returns the server's port."""

    def within() -> int:
        with unrelated_scope(), use_replica(max_lag=1.5):
            return port()

    if request.param == "block":
        yield within
    else:
        with override_settings(PINNING_MAX_LAG=1.5):
            yield lambda: port_for(None)


@pytest.mark.parametrize("is_known", [False, True])
def test_lagging_server_behind_a_shared_alias_is_not_used(
    pg: PostgreSQL, limit: Callable[[], int], is_known: bool
) -> None:
    """The monitor of their alias connects to the other server only."""
    first, second = pg["pg1"], pg["pg2"]
    in_order = {"load_balance_hosts": "disable"}
    with (
        Forwarder(first) as address,
        as_layout(pg, many=database(address, second, conn_max_age=None, options=in_order)),
    ):
        if is_known:
            probe_replicas()
        connections["many"].ensure_connection()
        address.point_to(second, cut=False)
        pg.pause("pg1")

        def served() -> tuple[int, int]:
            write()
            return limit(), in_thread(limit)

        assert eventually(lambda: served() == (pg["pg"].port, second.port))
        assert {limit() for _ in range(4)} == {pg["pg"].port}
        assert {in_thread(limit) for _ in range(4)} == {second.port}
        pg.resume("pg1")
        assert eventually(lambda: limit() == first.port)


# Leaving and rejoining the rotation


def test_reachable_replica_returns_early_if_no_other_is_left(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """It returns before its retry is due, because no other replica is left."""
    mark_unreachable("pg1")
    assert eventually(lambda: endpoint("pg1").is_reachable_again)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    pg["pg2"].stop("immediate")
    assert {server_for(None) for _ in range(6)} == {"pg1"}
    assert sent_signals.of("fell_back_to_primary") == []


@override_settings(PINNING_RETRY_AFTER=10)
def test_replica_out_of_rotation_is_retried_when_due(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    mark_unreachable("pg1", 10)
    connections["pg1"].close()
    clock.tick(9.9)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    clock.tick(2.7)
    make_retry_due("pg1")
    assert eventually(lambda: server_for(None) == "pg1")
    assert pool().replica_set.out_of_rotation == frozenset()


@override_settings(PINNING_POSITIONS=False)
@pytest.mark.parametrize("down", [("pg1",), ("pg1", "pg2")])
def test_replica_returns_with_positions_disabled(pg: PostgreSQL, down: tuple[str, ...]) -> None:
    """Its monitor has no position to read, and detects that it is reachable again."""
    for alias in down:
        pg[alias].stop("immediate")
    assert eventually(
        lambda: (server_for(None), pool().replica_set.out_of_rotation == set(down))[-1]
    )
    make_retry_due("pg1")
    assert eventually(lambda: endpoint("pg1").retry_at > time.monotonic())
    assert pool().replica_set.out_of_rotation == set(down)
    pg["pg1"].start()
    make_retry_due("pg1")
    assert eventually(lambda: server_for(None) == "pg1")


@override_settings(PINNING_POSITIONS=False)
def test_unresponsive_replica_stays_out_with_positions_disabled(pg: PostgreSQL) -> None:
    assert pool().replica_set.out_of_rotation == frozenset()
    mark_unreachable("pg1")
    assert eventually(lambda: endpoint("pg1").is_reachable_again)
    with frozen(pg["pg1"]):
        make_retry_due("pg1")
        assert eventually(lambda: endpoint("pg1").retry_at > time.monotonic())
        assert pool().replica_set.out_of_rotation == {"pg1"}


def test_read_starts_the_monitor_of_an_overdue_replica(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread could be started when the replica failed."""
    with monkeypatch.context() as patch:
        patch.setattr(Monitors, "retry_until_up", lambda *args: None)
        mark_unreachable("pg1")
    endpoint("pg1").retry_at = -1000.0
    assert server_for(None) == "pg2"
    assert eventually(lambda: pool().replica_set.out_of_rotation == frozenset())


def test_replica_returns_while_every_client_is_pinned(pg: PostgreSQL) -> None:
    """No read of the replica is needed."""
    pg.pause("pg2")
    mark_unreachable("pg1")
    token = write()
    pg.wait_for("pg1")
    assert server_for(token) == "pg"
    make_retry_due("pg1")
    assert eventually(lambda: server_for(token) == "pg1")


@pytest.fixture
def unreachable() -> Iterator[None]:
    """Make all replicas unreachable, also for monitors, which would return them."""
    connect.unreachable_in_tests.update(REPLICAS)
    yield
    connect.unreachable_in_tests.difference_update(REPLICAS)


@pytest.mark.usefixtures("unreachable")
def test_all_replicas_out_of_rotation_uses_the_primary(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    for alias in REPLICAS:
        mark_unreachable(alias)
    assert server_for(None) == "pg"
    assert {one["reason"] for one in sent_signals.of("fell_back_to_primary")} == {"no_replica"}


@pytest.mark.usefixtures("unreachable")
def test_unidentified_replicas_have_not_caught_up(pg: PostgreSQL) -> None:
    """An empty set of servers must not count as "all have caught up"."""
    pg.pause()
    token = write()
    for alias in REPLICAS:
        mark_unreachable(alias)
    with unrelated_scope(token) as scope:
        assert server() == "pg"
    assert scope.token == token


def test_replica_with_weight_0_is_monitored_and_not_used(pg: PostgreSQL) -> None:
    """For draining a replica, or warming up a new one."""
    with override_settings(PINNING_REPLICAS={"pg": {"pg1": 1, "pg2": 0}}):
        token = write()
        pg.wait_for()
        assert {server_for(None) for _ in range(4)} == {"pg1"}
        assert {server_for(token) for _ in range(4)} == {"pg1"}
        pg["pg1"].stop("immediate")
        assert in_thread(titles) == ["new"]
        assert in_thread(lambda: server_for(None)) == "pg"
