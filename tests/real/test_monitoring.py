"""Background monitoring on PostgreSQL: how often servers are probed, and what is known unasked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.test import override_settings

from pinning_middleware.pins import Position
from pinning_middleware.servers import catch_up, monitor, psycopg_pool
from pinning_middleware.servers.connect import BoundedConnect
from pinning_middleware.servers.monitor import Monitor
from tests.app.models import Book

from .conftest import (
    Asked,
    PostgreSQL,
    SentSignals,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    in_threads,
    make_retry_due,
    mark_unreachable,
    pool,
    port,
    position_in,
    probe_replicas,
    server_for,
    server_of,
    unrelated_scope,
    write,
)
from .layouts import database, frozen, make_role

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
RECEIVERS = "SELECT count(*) FROM pg_stat_wal_receiver"


@pytest.fixture(params=["monitor", "plain"])
def role(pg: PostgreSQL, request: pytest.FixtureRequest) -> str:
    """Connect as a role that may see the timelines of replicas, or as one that may not."""
    name = make_role(pg.cluster, monitor=request.param == "monitor")
    for alias in ("pg", *REPLICAS):
        connections[alias].close()
        connections.settings[alias]["USER"] = connections[alias].settings_dict["USER"] = name
    return name


def knows_to_have(alias: str, token: str | None) -> bool:
    """Return whether a replica is known to have what a token requires. Probes nothing."""
    dialect = pool().dialect
    assert dialect is not None
    return dialect.reached(Position(position_in(token)), server_of(alias).position)


# Replicas that are behind


@pytest.mark.usefixtures("role")
@pytest.mark.parametrize("wait", [0, 0.05])
def test_replicas_that_are_behind_are_probed_by_one_read_for_all(
    pg: PostgreSQL, asked: Asked, monkeypatch: pytest.MonkeyPatch, wait: float
) -> None:
    # Without an upper limit the number of probes does not depend on the speed of the machine.
    monkeypatch.setattr(catch_up, "MAX_PAUSE", 1000.0)
    with override_settings(PINNING_WAIT=wait):
        write()
        pg.wait_for()
        probe_replicas()
        pg.pause()
        tokens = [write(f"{number}") for number in range(10)]
        server_for(tokens[0])
        asked.all.clear()
        served = in_threads(
            lambda number: [server_for(tokens[(number + n) % 10]) for n in range(100)], 8
        )
    assert {by for each in served for by in each} == {"pg"}
    # Each thread's connection is identified once.
    assert len(asked.all) <= 80


def test_replica_that_catches_up_serves_again(pg: PostgreSQL) -> None:
    pg.pause()
    tokens = [write(f"{number}") for number in range(3)]
    for token in tokens * 5:
        assert server_for(token) == "pg"
    pg.resume()
    assert eventually(lambda: {server_for(token) for token in tokens} <= REPLICAS)
    assert server_of("pg1").catch_up.awaited is None or server_of("pg2").catch_up.awaited is None


def test_replica_that_is_behind_serves_what_it_has_on_new_connections(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catch_up, "FIRST_PAUSE", 1000.0)
    older = write("older")
    pg.wait_for()
    probe_replicas()
    pg.pause()
    assert server_for(write("newer")) == "pg"
    assert {in_thread(lambda: server_for(older)) for _ in range(4)} == REPLICAS


@override_settings(PINNING_WAIT=0.02)
def test_read_does_not_wait_for_what_another_awaited_in_vain(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    def waits() -> list[bool]:
        return [one["reached"] for one in sent_signals.of("replica_wait_finished")]

    pg.pause()
    older, token = write("older"), write("one")
    assert [server_for(token) for _ in range(3)] == ["pg"] * 3
    assert waits() == [False]
    assert server_for(write("newer")) == "pg"
    assert waits() == [False]
    # A replica may reach an older position earlier.
    assert server_for(older) == "pg"
    assert waits() == [False, False]
    pg.resume()
    assert eventually(lambda: server_for(token) in REPLICAS)
    pg.pause()
    sent_signals.clear()
    assert server_for(write("last")) == "pg"
    assert waits() == [False]


# What was written


@pytest.mark.usefixtures("role")
def test_write_that_replicas_have_is_known_when_the_primary_fails(
    pg: PostgreSQL, asked: Asked
) -> None:
    """A replica does not report its timeline while it receives nothing."""
    write("before")
    pg.wait_for()
    probe_replicas()
    asked.all.clear()
    token = write("new")
    assert eventually(lambda: all(knows_to_have(alias, token) for alias in REPLICAS))
    assert asked.by_requests == ["pg"]
    pg["pg"].stop("immediate")
    assert eventually(lambda: all(pg[alias].execute(RECEIVERS) == [(0,)] for alias in REPLICAS))
    assert {server_for(token) for _ in range(4)} == REPLICAS


def test_replica_is_tracked_until_it_has_the_newest_write(pg: PostgreSQL) -> None:
    probe_replicas()
    pg.pause("pg1")
    tokens = [write(f"{number}") for number in range(3)]
    assert eventually(lambda: knows_to_have("pg2", tokens[-1]))
    pg.resume("pg1")
    assert eventually(lambda: knows_to_have("pg1", tokens[-1]))
    assert eventually(lambda: monitor._monitors["pg1"]._tracked is None)


def test_tracked_replica_that_fails_leaves_the_rotation(pg: PostgreSQL) -> None:
    probe_replicas()
    pg["pg1"].stop("immediate")
    write()
    assert eventually(lambda: pool().replica_set.out_of_rotation == {"pg1"})


def test_tracked_replica_does_not_return_before_its_retry_is_due(
    pg: PostgreSQL, asked: Asked
) -> None:
    probe_replicas()
    token = write()
    assert eventually(lambda: knows_to_have("pg1", token))
    with frozen(pg["pg1"]):
        asked.all.clear()
        write()
        assert eventually(lambda: "pg1" in asked.by_monitors)
        mark_unreachable("pg1")
    assert eventually(lambda: endpoint("pg1").is_reachable_again)
    assert pool().replica_set.out_of_rotation == {"pg1"}


@pytest.mark.parametrize("why", ["mirrors", "positions", "not identified"])
def test_writes_are_not_tracked(pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A test database to which a monitor is connected could not be dropped."""
    if why == "mirrors":
        for alias in REPLICAS:
            monkeypatch.setitem(connections.settings[alias]["TEST"], "MIRROR", "pg")
    with override_settings(PINNING_POSITIONS=why != "positions"):
        write()
        assert monitor._monitors == {}


# Replicas that are out of rotation


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Record the attempts of monitors to connect: the alias and the time."""
    made: list[tuple[str, float]] = []
    connect = BoundedConnect.connect

    def recording(connection: Any) -> None:
        if threading.current_thread().name.startswith("pinning-monitor"):
            made.append((connection.alias, time.monotonic()))
        connect(connection)

    monkeypatch.setattr(BoundedConnect, "connect", recording)
    return made


@override_settings(PINNING_RETRY_AFTER=1000)
def test_replicas_that_are_all_down_are_retried_at_growing_intervals(
    pg: PostgreSQL, attempts: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When they return, the last one does not wait for the time of its own retry."""
    monkeypatch.setattr(monitor, "URGENT_FOR", 30.0)
    for alias in REPLICAS:
        pg[alias].stop("immediate")
    assert eventually(lambda: (server_for(None), pool().replica_set.out_of_rotation == REPLICAS)[1])
    for alias in REPLICAS:
        # After pauses of 0.05, 0.1, 0.2, 0.4 and 0.5 seconds.
        assert eventually(lambda alias=alias: [a for a, _ in attempts].count(alias) >= 9)
        times = [at for tried, at in attempts if tried == alias]
        assert all(later - at >= 0.49 for at, later in pairwise(times[6:]))
    for alias in REPLICAS:
        pg[alias].start()
    assert eventually(lambda: not pool().replica_set.out_of_rotation)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_monitor_survives_an_error_that_is_not_the_databases(
    pg: PostgreSQL,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    check, failed = Monitor._check, list[str]()

    def fail_twice(checked: Monitor) -> None:
        if len(failed) < 2:
            failed.append(checked.alias)
            raise error
        check(checked)

    monkeypatch.setattr(Monitor, "_check", fail_twice)
    with caplog.at_level(logging.ERROR, "pinning_middleware.servers"):
        mark_unreachable("pg1", 0.1)
        assert eventually(lambda: not pool().replica_set.out_of_rotation)
    assert failed == ["pg1", "pg1"]
    (record,) = caplog.records
    assert record.getMessage() == f"Monitoring of pg1 failed and is resumed: {error!r}"


def test_read_succeeds_if_no_thread_can_be_started(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(monitor: Monitor) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "start", fail)
        mark_unreachable("pg1", 0.1)
        assert {server_for(None) for _ in range(2)} == {"pg2"}
        assert monitor._monitors == {}
    make_retry_due("pg1")
    assert eventually(lambda: not pool().replica_set.out_of_rotation)


# Django's connection pool


SLEEP = "SELECT 1 AS id, inet_server_port() AS port FROM pg_sleep(%s)"


@pytest.fixture
def pooled_replicas(pg: PostgreSQL) -> Iterator[PostgreSQL]:
    """Two replicas with pools of two connections each."""
    pooling = {"min_size": 0, "max_size": 2}
    entries = {
        name: database(pg[alias], pool=pooling) for name, alias in (("r1", "pg1"), ("r2", "pg2"))
    }
    with as_layout(pg, **entries):
        yield pg


def sleep_and_read(seconds: float) -> int:
    with unrelated_scope():
        (book,) = Book.objects.raw(SLEEP, [seconds])
    return int(book.port)


def test_exhausted_pool_says_nothing_of_its_server(
    pooled_replicas: PostgreSQL, sent_signals: SentSignals
) -> None:
    ports = in_threads(lambda _: sleep_and_read(0.4), 16)
    assert set(ports) == {pooled_replicas[alias].port for alias in REPLICAS}
    assert sent_signals == []


def test_exhausted_pool_raises_its_own_error_after_its_own_timeout(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    pooling = {"min_size": 0, "max_size": 1, "timeout": 0.5}
    with as_layout(pg, r1=database(pg["pg1"], pool=pooling)), unrelated_scope():
        # This thread holds the only connection.
        connections["r1"].ensure_connection()
        with (
            ThreadPoolExecutor(1) as threads,
            pytest.raises(Exception, match="couldn't get a connection"),
        ):
            threads.submit(port).result()
        assert port() == pg["pg1"].port
    assert sent_signals == []


def test_full_queue_of_a_pool_raises_its_own_error(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    pooling = {"min_size": 0, "max_size": 1, "max_waiting": 1}
    with as_layout(pg, r1=database(pg["pg1"], pool=pooling)):
        errors = in_threads(lambda _: error_of(lambda: sleep_and_read(0.5)), 4)
    assert "already 1 requests waiting" in " ".join(errors)
    assert "" in errors
    assert sent_signals == []


def test_read_that_waits_for_a_pool_is_counted_once(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits several times, since it checks the server meanwhile."""
    monkeypatch.setattr(psycopg_pool, "NEXT_POOL_CHECK_AFTER", 0.1)
    pooling = {"min_size": 0, "max_size": 1, "max_waiting": 3}
    with as_layout(pg, r1=database(pg["pg1"], pool=pooling)):
        errors = in_threads(lambda _: error_of(lambda: sleep_and_read(0.5)), 4)
    assert errors == [""] * 4


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except OperationalError as error:
        return str(error)
    return ""


def test_reads_that_wait_for_a_pool_go_elsewhere_when_its_server_fails(
    pooled_replicas: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psycopg_pool, "NEXT_POOL_CHECK_AFTER", 8.0)
    pg = pooled_replicas
    with ThreadPoolExecutor(8) as threads:
        reads = [threads.submit(in_threads, lambda _: sleep_and_read(1.0), 1) for _ in range(8)]
        pools = [connections[alias].pool for alias in ("r1", "r2")]  # type: ignore[attr-defined]
        # They were found to be reachable, and are not checked again.
        assert eventually(lambda: all(hasattr(pool, "pinning_checked_at") for pool in pools))
        pg["pg1"].stop("immediate")
        # Well before the pool's own timeout of 30 s.
        ports = {read.result(25)[0] for read in reads}
    assert pool().replica_set.out_of_rotation == {"r1"}
    assert pg["pg1"].port not in ports
