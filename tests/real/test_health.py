"""Which replicas are in the rotation, and how much they may lag, on PostgreSQL."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connections
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import pinning_scope, use_replica
from pinning_middleware.looks import lags_less, update
from pinning_middleware.positions.postgresql import PostgreSQL as Family
from tests.app.models import Book
from tests.conftest import Visit

from .conftest import (
    Heard,
    PostgreSQL,
    eventually,
    health,
    no_looks,
    pool,
    queries,
    replica,
    server,
    server_for,
    titles,
    write,
)

# A primary writes a little of its own at any moment, and that is lag while a replica is paused.
pytestmark = [pytest.mark.real, pytest.mark.flaky(reruns=3)]

REPLICAS = {"pg1", "pg2"}


def look(*aliases: str) -> None:
    """Look at replicas now, as a read does every few seconds."""
    for alias in aliases or ("pg1", "pg2"):
        update(pool(), connections[alias])


def fall_behind(pg: PostgreSQL, *aliases: str, others: tuple[str, ...] = ()) -> None:
    """Write, and look until these replicas are out for that, while others have it."""
    write()
    if others:
        pg.wait_for(*others)
    for alias in aliases:
        assert eventually(lambda alias=alias: (look(alias), replica(alias).out == "lag")[1])


@pytest.fixture
def max_lag() -> Iterator[None]:
    with override_settings(PINNING_MAX_LAG=0.05):
        yield


# PINNING_MAX_LAG


@pytest.mark.usefixtures("max_lag")
def test_a_replica_that_lags_leaves_the_rotation(
    pg: PostgreSQL, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    pg.pause("pg1")
    with caplog.at_level(logging.INFO, "pinning_middleware"):
        fall_behind(pg, "pg1", others=("pg2",))
        assert {server_for(None) for _ in range(6)} == {"pg2"}
        pg.resume("pg1")
        replica("pg1").retry_at = 0.0
        assert server_for(None) == "pg1"
    assert {server_for(None) for _ in range(4)} == REPLICAS
    assert heard.of("replica_left_out") == [
        {"sender": "pg", "replica": "pg1", "reason": "lag", "seconds": 1.0}
    ]
    assert heard.of("replica_taken_back") == [{"sender": "pg", "replica": "pg1"}]
    assert "pg1 is left out of the rotation (lag)." in caplog.text
    assert "pg1 is back in the rotation." in caplog.text


@pytest.mark.usefixtures("max_lag")
def test_requests_find_out_by_themselves(pg: PostgreSQL, visit: Visit) -> None:
    pg.pause("pg1")
    write()
    pg.wait_for("pg2")

    def read(request: Any) -> str:
        for one in health().replicas.values():
            one.looked = -math.inf
        return server()

    assert eventually(lambda: visit(read) and health().out == {"pg1"})
    assert {visit(lambda request: server()) for _ in range(4)} == {"pg2"}


@pytest.mark.usefixtures("max_lag")
def test_an_idle_primary_is_no_lag(pg: PostgreSQL) -> None:
    write()
    told = Family().behind
    # The primary's own work may come in between.
    for _ in range(20):
        pg.resume()
        pg.wait_for()
        pg.pause()
        assert eventually(lambda: all((told(connections[a]) or 0) > 0.2 for a in REPLICAS))
        look()
        if not health().out:
            break
    assert health().out == frozenset()
    assert [replica(alias).lag for alias in REPLICAS] == [0.0, 0.0]
    assert {server_for(None) for _ in range(4)} == REPLICAS


@pytest.mark.usefixtures("max_lag")
def test_the_first_write_after_a_while_is_no_lag(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica tells when its last transaction was, not when the one it lacks was."""
    look()
    pg.pause("pg1")
    write()

    def an_hour(self: Any, connection: Any) -> float:
        pg.resume("pg1")
        pg.wait_for("pg1")
        return 3600.0

    monkeypatch.setattr(Family, "behind", an_hour)
    look("pg1")
    assert replica("pg1").lag == 0.0
    assert health().out == frozenset()


def test_lag_goes_back_to_a_look_that_found_none(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch, clock: FrozenDateTimeFactory
) -> None:
    monkeypatch.setattr(Family, "behind", lambda self, connection: 3600.0)
    with override_settings(PINNING_MAX_LAG=3):
        # The primary's own work may put it behind for an instant.
        for _ in range(200):
            look("pg1")
            if replica("pg1").lag == 0.0:
                break
        assert replica("pg1").lag == 0.0
        pg.pause("pg1")
        write()
        clock.tick(2)
        look("pg1")
        assert replica("pg1").lag == 2.0
        clock.tick(2)
        look("pg1")
        assert replica("pg1").lag == 4.0
        assert health().out == {"pg1"}


def test_lag_without_an_earlier_look_is_what_the_replica_says(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Family, "behind", lambda self, connection: 3600.0)
    pg.pause("pg1")
    write()
    with override_settings(PINNING_MAX_LAG=3):
        look("pg1")
        assert health().out == {"pg1"}


@pytest.mark.usefixtures("max_lag")
def test_a_receiver_that_stopped_shows(pg: PostgreSQL) -> None:
    """All that was received is replayed then: only the primary knows better."""
    pg["pg1"].execute("ALTER SYSTEM SET primary_conninfo = ''")
    pg["pg1"].execute("SELECT pg_reload_conf()")
    try:
        receivers = "SELECT count(*) FROM pg_stat_wal_receiver"
        assert eventually(lambda: pg["pg1"].execute(receivers) == [(0,)])
        fall_behind(pg, "pg1", others=("pg2",))
        assert {server_for(None) for _ in range(4)} == {"pg2"}
    finally:
        pg["pg1"].execute("ALTER SYSTEM RESET primary_conninfo")
        pg["pg1"].execute("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("max_lag")
def test_when_all_lag_the_freshest_serves_who_has_no_pin(pg: PostgreSQL, heard: Heard) -> None:
    """The primary would not stand the reads of all replicas."""
    pg.pause("pg1")
    fall_behind(pg, "pg1", others=("pg2",))
    pg.pause("pg2")
    token = write()
    fall_behind(pg, "pg2")
    assert health().out == REPLICAS
    replica("pg1").lag, replica("pg2").lag = 9.0, 5.0
    for one in health().replicas.values():
        one.claim(math.inf)
    no_looks()
    heard.clear()
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    assert heard.of("primary_fallback") == []
    assert server_for(token) == "pg"
    replica("pg1").lag = 1.0
    assert {server_for(None) for _ in range(4)} == {"pg1"}


@pytest.mark.usefixtures("max_lag")
def test_a_lagging_replica_is_preferred_to_none_and_not_to_another(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    fall_behind(pg, "pg1", others=("pg2",))
    pg["pg2"].stop("immediate")
    assert server_for(None) in ("pg1", "pg")
    assert [server_for(None) for _ in range(3)] == ["pg1"] * 3


@pytest.mark.usefixtures("max_lag")
def test_a_pool_that_is_measured_costs_the_same(pg: PostgreSQL) -> None:
    """Looks are amortised; a request between two of them asks nothing."""
    server_for(None)
    server_for(None)
    with queries() as asked:
        no_looks()
        for _ in range(4):
            server_for(None)
    assert asked.added == []


# Looks


def looks_in(asked: dict[str, list[str]]) -> int:
    return sum("pg_is_in_recovery" in sql for several in asked.values() for sql in several)


def test_one_look_at_each_replica_every_two_seconds(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    with queries() as asked:
        for _ in range(8):
            Book.objects.count()
    assert looks_in(asked) == 2
    clock.tick(1.9)
    with queries() as asked:
        for _ in range(8):
            Book.objects.count()
    assert looks_in(asked) == 0
    clock.tick(0.2)
    with queries() as asked:
        for _ in range(8):
            Book.objects.count()
    assert looks_in(asked) == 2


def test_a_look_makes_a_position_known(pg: PostgreSQL) -> None:
    """So that a pin needs no question of its own."""
    token = write()
    pg.wait_for()
    with queries():
        look()
    with queries() as asked:
        no_looks()
        titles(token)
    assert asked.added == []


# use_replica(max_lag=…)


def server_within(seconds: float, token: str | None = None) -> str:
    with pinning_scope(token), use_replica(max_lag=seconds):
        return server()


def test_use_replica_takes_one_that_lags_less(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    token = write()
    pg.wait_for("pg2")
    assert eventually(lambda: not lags_less(pool(), "pg1", 0.05))
    assert {server_within(0.05) for _ in range(6)} == {"pg2"}
    # In a scope whose own replica lags, too.
    assert {server_within(0.05, token) for _ in range(6)} == {"pg2"}
    assert {server_within(3600) for _ in range(6)} == REPLICAS
    assert {server_for(None) for _ in range(6)} == REPLICAS


def test_use_replica_takes_the_primary_where_all_lag(pg: PostgreSQL) -> None:
    pg.pause()
    write()
    assert eventually(lambda: server_within(0.05) == "pg")
    assert server_within(3600) in REPLICAS
    pg.resume()
    assert eventually(lambda: {server_within(0.05) for _ in range(4)} == REPLICAS)


def test_use_replica_takes_an_idle_one(pg: PostgreSQL) -> None:
    write()
    pg.wait_for()
    pg.pause()
    told = Family().behind
    assert eventually(lambda: all((told(connections[a]) or 0) > 0.2 for a in REPLICAS))
    assert {server_within(0.05) for _ in range(4)} == REPLICAS
    assert {server_within(0) for _ in range(4)} == REPLICAS


def test_looks_that_measure_nothing_do_not_hide_lag(
    pg: PostgreSQL, clock: FrozenDateTimeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read looks at its replica now and then; lag is measured only where it is asked for."""
    look()
    assert {server_within(10) for _ in range(4)} == REPLICAS
    pg.pause()
    write()
    monkeypatch.setattr(Family, "behind", lambda self, connection: 3600.0)
    for _ in range(10):
        clock.tick(2.1)
        assert {server_for(None) for _ in range(2)} == REPLICAS
    assert server_within(10) == "pg"


def test_a_block_that_limits_lag_fails_over_within_the_limit(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    write()
    pg.wait_for("pg2")
    assert eventually(lambda: not lags_less(pool(), "pg1", 0.05))
    with pinning_scope(), use_replica(max_lag=0.05):
        assert server() == "pg2"
        pg["pg2"].stop("immediate")
        assert list(Book.objects.values_list("title", flat=True)) == ["new"]
        assert server() == "pg"


# Out and back


@override_settings(PINNING_RETRY_AFTER=10)
def test_a_replica_that_is_out_is_tried_after_a_while(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    health().leave_out("pg1", "connect")
    connections["pg1"].close()
    clock.tick(9.9)
    assert {server_for(None) for _ in range(4)} == {"pg2"}
    clock.tick(2.7)
    assert server_for(None) == "pg1"
    assert health().out == frozenset()


def test_a_pinned_read_takes_a_replica_back(pg: PostgreSQL, clock: FrozenDateTimeFactory) -> None:
    pg.pause("pg2")
    health().leave_out("pg1", "connect")
    token = write()
    pg.wait_for("pg1")
    assert server_for(token) == "pg"
    clock.tick(12.6)
    assert server_for(token) == "pg1"


def test_with_all_out_the_primary_serves_and_one_is_tried(
    pg: PostgreSQL, heard: Heard, do: Callable[..., str]
) -> None:
    for alias in REPLICAS:
        health().leave_out(alias, "connect")
        replica(alias).claim(math.inf)
    assert server_for(None) == "pg"
    assert {one["reason"] for one in heard.of("primary_fallback")} == {"no replica"}


def test_no_replica_known_is_not_caught_up(pg: PostgreSQL) -> None:
    """An empty list has not answered "all of them have it"."""
    pg.pause()
    token = write()
    for alias in REPLICAS:
        health().leave_out(alias, "connect")
    with pinning_scope(token) as scope:
        assert server() == "pg"
    assert scope.token == token
