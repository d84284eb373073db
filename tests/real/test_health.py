"""Which replicas are in the rotation, and how much they may lag, on PostgreSQL."""

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
from pinning_middleware.servers.monitor import Monitor
from pinning_middleware.servers.registry import Server, registry
from tests.app.models import Book

from .conftest import (
    Heard,
    PostgreSQL,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    look_again,
    look_around,
    pool,
    port,
    port_for,
    queries,
    server,
    server_for,
    stranger,
    take_out,
    titles,
    write,
)
from .layouts import Forwarder, database, frozen

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}


@pytest.fixture
def max_lag() -> Iterator[None]:
    # Longer than the second between two samples: a busy machine may make anybody miss one.
    with override_settings(PINNING_MAX_LAG=1.5):
        yield


def fall_behind(*aliases: str) -> None:
    """Go on writing and reading until these replicas, and no others, are out for their lag."""
    assert eventually(lambda: (write(), server_for(None), pool().out == set(aliases))[-1])
    assert {endpoint(alias).out_of_rotation for alias in aliases} == {"lag"}


def measured() -> bool:
    """Let reads go on, and return whether the lag of both replicas is known by now."""
    server_for(None)
    return all(pool().lag(alias) is not None for alias in REPLICAS)


# PINNING_MAX_LAG


@pytest.mark.usefixtures("max_lag")
def test_a_replica_that_lags_leaves_the_rotation_and_comes_back(
    pg: PostgreSQL, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    pg.pause("pg1")
    with caplog.at_level(logging.INFO, "pinning_middleware"):
        fall_behind("pg1")
        assert {server_for(None) for _ in range(6)} == {"pg2"}
        pg.resume("pg1")
        assert eventually(lambda: server_for(None) == "pg1")
    assert {server_for(None) for _ in range(4)} == REPLICAS
    # On a busy machine the other one may really be half a second late, once in a while.
    (left,) = [said for said in heard.of("replica_removed") if said["replica"] == "pg1"]
    assert (left["sender"], left["reason"]) == ("pg", "lag")
    assert {"sender": "pg", "replica": "pg1"} in heard.of("replica_restored")
    assert "pg1 serves nobody (lag)" in caplog.text
    assert "pg1 serves again." in caplog.text


@pytest.mark.usefixtures("max_lag")
def test_a_read_is_not_what_measures(pg: PostgreSQL) -> None:
    """Watchers do, by connections of their own."""
    assert eventually(measured)
    with queries() as asked:
        for _ in range(8):
            server_for(None)
    assert asked.added == []


@pytest.mark.usefixtures("max_lag")
def test_an_idle_primary_is_no_lag(pg: PostgreSQL) -> None:
    """Nothing is written, so nothing is missing, however long ago the last transaction was."""
    write()
    pg.wait_for()
    assert eventually(measured)
    pg.pause()
    looks = {alias: endpoint(alias).recent_servers[0].told for alias in REPLICAS}
    assert eventually(
        lambda: (
            server_for(None),
            all(endpoint(alias).recent_servers[0].told > looks[alias] + 0.9 for alias in REPLICAS),
        )[-1]
    )
    # The primary's own work may come in between, once in a while.
    assert all((pool().lag(alias) or 0.0) < 3 for alias in REPLICAS)


@override_settings(PINNING_MAX_LAG=0.5)
def test_one_that_is_a_moment_late_does_not_lag(
    pg: PostgreSQL, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has missed the newest sample by milliseconds, and not by the second before it."""
    assert eventually(measured)
    pg.pause("pg1")
    write()
    ask, late = Monitor._ask, []

    def slow(watcher: Monitor, alias: str, is_trial: bool = False) -> Server | None:
        answer = ask(watcher, alias, is_trial)
        if alias == "pg1" and answer is not None and not late:
            newest = registry.samples(answer.system)[0][1]
            if any(answer.position[log] < point for log, point in newest.items()):
                late.append(alias)
                pg.resume("pg1")
                pg.wait_for()
        return answer

    monkeypatch.setattr(Monitor, "_ask", slow)
    assert eventually(lambda: (server_for(None), late)[-1])
    told = endpoint("pg1").recent_servers[0].told
    assert eventually(lambda: (server_for(None), endpoint("pg1").recent_servers[0].told > told)[-1])
    assert [said for said in heard.of("replica_removed") if said["replica"] == "pg1"] == []


@pytest.mark.usefixtures("max_lag")
def test_a_receiver_that_stopped_shows(pg: PostgreSQL) -> None:
    """All that was received is replayed then: only the primary knows better."""
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
def test_when_all_lag_the_freshest_serves_who_has_no_pin(pg: PostgreSQL, heard: Heard) -> None:
    """The primary would not stand the reads of all replicas."""
    pg.pause("pg1")
    fall_behind("pg1")
    pg.pause("pg2")
    fall_behind("pg1", "pg2")
    token = write()
    heard.clear()
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    assert heard.of("fell_back_to_primary") == []
    assert server_for(token) == "pg"


@pytest.mark.usefixtures("max_lag")
def test_nobody_measures_the_mirrors_of_a_test(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection to it would keep the runner from dropping the test's database."""
    for alias in REPLICAS:
        monkeypatch.setitem(connections.settings[alias]["TEST"], "MIRROR", "pg")
    assert server_for(None) == "pg"
    assert server_within(1.5) == "pg"
    assert monitor._watchers == {}


# use_replica(max_lag=…)


def server_within(seconds: float, token: str | None = None) -> str:
    with stranger(token), use_replica(max_lag=seconds):
        return server()


def test_use_replica_takes_one_that_lags_less(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    token = write()
    assert eventually(lambda: (write(), {server_within(1.5) for _ in range(4)} == {"pg2"})[-1])
    # In a scope whose own replica lags, too.
    assert {server_within(1.5, token) for _ in range(6)} == {"pg2"}
    # How far one lags that was behind from the start shows with the second sample.
    assert eventually(lambda: {server_within(3600) for _ in range(6)} == REPLICAS)
    assert {server_for(None) for _ in range(6)} == REPLICAS


def test_use_replica_takes_the_primary_where_all_lag(pg: PostgreSQL) -> None:
    pg.pause()
    assert eventually(lambda: (write(), server_within(1.5) == "pg")[-1])
    assert eventually(lambda: server_within(3600) in REPLICAS)
    pg.resume()
    assert eventually(lambda: {server_within(1.5) for _ in range(4)} == REPLICAS)


def test_use_replica_takes_no_replica_that_was_behind_before_it_was_asked(pg: PostgreSQL) -> None:
    """One sample of the primary says nothing of a replica that has not reached it."""
    pg.pause()
    write()
    with override_settings(PINNING_WAIT=0), stranger(), use_replica(max_lag=0.2):
        assert server() == "pg"


def test_use_replica_knows_enough_at_once(pg: PostgreSQL) -> None:
    """A script that asks once does not go to the primary for want of an earlier look."""
    write()
    pg.wait_for()
    assert server_within(60) in REPLICAS


def test_a_block_that_limits_lag_fails_over_within_the_limit(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    assert eventually(lambda: (write(), {server_within(1.5) for _ in range(4)} == {"pg2"})[-1])
    with stranger(), use_replica(max_lag=1.5):
        assert server() == "pg2"
        pg["pg2"].stop("immediate")
        assert "new" in Book.objects.values_list("title", flat=True)
        assert server() == "pg"


# Several servers under one alias


@pytest.fixture(params=["setting", "block"])
def limit(request: pytest.FixtureRequest) -> Iterator[Callable[[], int]]:
    """A function that reads where a lag is limited; the port of who answered."""

    def within() -> int:
        with stranger(), use_replica(max_lag=1.5):
            return port()

    if request.param == "block":
        yield within
    else:
        with override_settings(PINNING_MAX_LAG=1.5):
            yield lambda: port_for(None)


@pytest.mark.parametrize("is_known", [False, True])
def test_one_that_lags_does_not_serve_beside_another_that_does_not(
    pg: PostgreSQL, limit: Callable[[], int], is_known: bool
) -> None:
    """The watcher of their alias meets the other one only."""
    first, second = pg["pg1"], pg["pg2"]
    in_order = {"load_balance_hosts": "disable"}
    with (
        Forwarder(first) as address,
        as_layout(pg, many=database(address, second, conn_max_age=None, options=in_order)),
    ):
        if is_known:
            look_around()
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


# Out and back


def test_one_that_answers_again_serves_when_nobody_else_does(pg: PostgreSQL, heard: Heard) -> None:
    """Before its time, for which it waits as long as another one serves."""
    take_out("pg1")
    assert eventually(lambda: endpoint("pg1").answers)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    pg["pg2"].stop("immediate")
    assert {server_for(None) for _ in range(6)} == {"pg1"}
    assert heard.of("fell_back_to_primary") == []


@override_settings(PINNING_RETRY_AFTER=10)
def test_a_replica_that_is_out_is_tried_when_its_time_has_come(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    take_out("pg1", 10)
    connections["pg1"].close()
    clock.tick(9.9)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    clock.tick(2.7)
    look_again("pg1")
    assert eventually(lambda: server_for(None) == "pg1")
    assert pool().out == frozenset()


@override_settings(PINNING_POSITIONS=False)
@pytest.mark.parametrize("down", [("pg1",), ("pg1", "pg2")])
def test_where_positions_are_off_a_replica_comes_back(
    pg: PostgreSQL, down: tuple[str, ...]
) -> None:
    """Its watcher has nothing to ask it, and finds out that it is there again."""
    for alias in down:
        pg[alias].stop("immediate")
    assert eventually(lambda: (server_for(None), pool().out == set(down))[-1])
    look_again("pg1")
    assert eventually(lambda: endpoint("pg1").retry_at > time.monotonic())
    assert pool().out == set(down)
    pg["pg1"].start()
    look_again("pg1")
    assert eventually(lambda: server_for(None) == "pg1")


@override_settings(PINNING_POSITIONS=False)
def test_where_positions_are_off_one_that_is_silent_stays_out(pg: PostgreSQL) -> None:
    assert pool().out == frozenset()
    take_out("pg1")
    assert eventually(lambda: endpoint("pg1").answers)
    with frozen(pg["pg1"]):
        look_again("pg1")
        assert eventually(lambda: endpoint("pg1").retry_at > time.monotonic())
        assert pool().out == {"pg1"}


def test_a_retry_that_nobody_makes_is_made_by_a_read(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where threads do not run."""
    monkeypatch.setattr("pinning_middleware.servers.monitor.tend", lambda *args: None)
    take_out("pg1")
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    endpoint("pg1").retry_at = -1000.0
    assert "pg1" in {server_for(None) for _ in range(2)}
    assert pool().out == frozenset()


def test_a_replica_comes_back_where_every_visitor_is_pinned(pg: PostgreSQL) -> None:
    """Nobody's read of it is needed for that."""
    pg.pause("pg2")
    take_out("pg1")
    token = write()
    pg.wait_for("pg1")
    assert server_for(token) == "pg"
    look_again("pg1")
    assert eventually(lambda: server_for(token) == "pg1")


@pytest.fixture
def unreachable() -> Iterator[None]:
    """No replica can be connected to, by nobody: one that answers its watcher would serve."""
    connect.unreachable_in_tests.update(REPLICAS)
    yield
    connect.unreachable_in_tests.difference_update(REPLICAS)


@pytest.mark.usefixtures("unreachable")
def test_with_all_out_the_primary_serves(pg: PostgreSQL, heard: Heard) -> None:
    for alias in REPLICAS:
        take_out(alias)
    assert server_for(None) == "pg"
    assert {one["reason"] for one in heard.of("fell_back_to_primary")} == {"no_replica"}


@pytest.mark.usefixtures("unreachable")
def test_no_replica_known_is_not_caught_up(pg: PostgreSQL) -> None:
    """An empty list has not answered "all of them have it"."""
    pg.pause()
    token = write()
    for alias in REPLICAS:
        take_out(alias)
    with stranger(token) as scope:
        assert server() == "pg"
    assert scope.token == token


def test_weight_0_is_known_and_not_used(pg: PostgreSQL) -> None:
    """To drain a replica, or to warm a new one."""
    with override_settings(PINNING_REPLICAS={"pg": {"pg1": 1, "pg2": 0}}):
        token = write()
        pg.wait_for()
        assert {server_for(None) for _ in range(4)} == {"pg1"}
        assert {server_for(token) for _ in range(4)} == {"pg1"}
        pg["pg1"].stop("immediate")
        assert in_thread(titles) == ["new"]
        assert in_thread(lambda: server_for(None)) == "pg"
