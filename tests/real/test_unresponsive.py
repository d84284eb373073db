"""Servers that accept connections and are unresponsive: requests wait briefly or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import Queue
from typing import Any, NamedTuple, Self

import pytest
from django.db import Error, OperationalError, close_old_connections, connections, transaction
from django.test import override_settings

from pinning_middleware import no_failover
from pinning_middleware.pins import Position
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import route
from pinning_middleware.servers import liveness
from pinning_middleware.servers.connect import BoundedConnect
from pinning_middleware.servers.monitor import Monitor
from pinning_middleware.servers.probe import endpoint_for
from pinning_middleware.servers.session_check import SessionStatus
from tests.app.models import Book

from .conftest import (
    PORT_QUERY,
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
    pooled,
    port,
    port_for,
    position_in,
    probe_replicas,
    server,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .layouts import (
    Address,
    Forwarder,
    Place,
    black_hole,
    database,
    frozen,
    haproxy,
    make_role,
    pgbouncer,
)

pytestmark = pytest.mark.real

# Seconds after which a test gives up.
DEADLINE = 20.0
REPLICAS = {"pg1", "pg2"}
OTHER = {"pg1": "pg2", "pg2": "pg1"}


class Reading(NamedTuple):
    """The server of a read, and the aliases out of rotation when it began."""

    port: int
    out: frozenset[str]


class Clients:
    """Threads that read continuously, each with its own connections."""

    def __init__(self, token: str | None = None, number: int = 8) -> None:
        self.token = token
        self.readings: list[list[Reading]] = [[] for _ in range(number)]
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(number)
        self._done: list[Any] = []

    def __enter__(self) -> Self:
        self._done = [self._threads.submit(self._read_repeatedly, mine) for mine in self.readings]
        # Wait until each thread has connected to every server.
        self.go_on(30)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._threads.shutdown()
        for one in self._done:
            one.result()

    def go_on(self, rounds: int = 20) -> list[Reading]:
        """Let each thread do this many more reads, and return them."""
        before = [len(mine) for mine in self.readings]

        def is_done() -> bool:
            if any(one.done() for one in self._done):
                return True
            return all(
                len(mine) >= start + rounds
                for mine, start in zip(self.readings, before, strict=True)
            )

        assert eventually(is_done, 60)
        for one in self._done:
            if one.done():
                one.result()
        return [
            reading
            for mine, start in zip(self.readings, before, strict=True)
            for reading in mine[start:]
        ]

    def _read_repeatedly(self, mine: list[Reading]) -> None:
        try:
            while not self._over.is_set():
                out = pool().replica_set.out_of_rotation
                mine.append(Reading(port_for(self.token), out))
                close_old_connections()
        finally:
            with suppress(Error):
                connections.close_all()


@pytest.fixture
def connecting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record attempts to connect: the alias, and the name of the thread."""
    made: list[tuple[str, str]] = []
    connect = BoundedConnect.connect

    def recording(self: Any) -> None:
        made.append((self.alias, threading.current_thread().name))
        connect(self)

    monkeypatch.setattr(BoundedConnect, "connect", recording)
    return made


# Clients of a site with an unresponsive replica


def on_replicas(pg: PostgreSQL, **more: Any) -> dict[str, dict[str, Any]]:
    return {f"r{number}": database(pg[f"pg{number}"], **more) for number in (1, 2)}


@pytest.mark.parametrize("conn_max_age", [None, 0])
def test_frozen_replica_delays_each_client_once(
    pg: PostgreSQL, sent_signals: SentSignals, conn_max_age: int | None
) -> None:
    entries = on_replicas(pg, conn_max_age=conn_max_age)
    with as_layout(pg, **entries), Clients() as clients:
        assert {one.port for one in clients.go_on()} == {pg["pg1"].port, pg["pg2"].port}
        with frozen(pg["pg1"]):
            found = clients.go_on()
            assert pool().replica_set.out_of_rotation == {"r1"}
            later = clients.go_on(50)
        # After the first read, no other tries it.
        known = [one for one in (*found, *later) if one.out]
        assert {one.port for one in known} == {pg["pg2"].port}
        assert {one["replica"] for one in sent_signals.of("replica_removed")} == {"r1"}
        make_retry_due("r1")
        assert eventually(lambda: pool().replica_set.out_of_rotation == frozenset())
        assert {one.port for one in clients.go_on()} == {pg["pg1"].port, pg["pg2"].port}


def test_black_hole_delays_each_client_once(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    with (
        black_hole() as place,
        as_layout(
            pg,
            hole=database(place, conn_max_age=None),
            r2=database(pg["pg2"], conn_max_age=None),
        ),
        Clients() as clients,
    ):
        found = [one for mine in clients.readings for one in mine]
        assert pool().replica_set.out_of_rotation == {"hole"}
        later = clients.go_on(50)
        assert {one.port for one in (*found, *later)} == {pg["pg2"].port}
    assert [one["reason"] for one in sent_signals.of("replica_removed")] == ["unreachable"]


def test_connection_pool_of_a_black_hole_times_out_early(pg: PostgreSQL) -> None:
    """The default timeout of the pool is 30 s."""
    with (
        black_hole() as place,
        as_layout(pg, hole=pooled(place), r2=database(pg["pg2"], conn_max_age=None)),
    ):
        assert connections["hole"].pool.timeout > DEADLINE
        while not pool().replica_set.out_of_rotation:
            # Little of the budget is left for the other replica.
            assert in_thread(lambda: port_for(None)) in (pg["pg2"].port, pg["pg"].port)
        assert {port_for(None) for _ in range(6)} == {pg["pg2"].port}


def test_djangos_health_check_detects_a_frozen_replica(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    """Once: an alias that is marked unresponsive is not connected to."""
    entries = on_replicas(pg, conn_max_age=None, CONN_HEALTH_CHECKS=True)
    with as_layout(pg, **entries):
        with unrelated_scope(), no_failover():
            for alias in entries:
                connections[alias].ensure_connection()
        # Same as at the beginning of a request.
        for alias in entries:
            connections[alias].close_if_unusable_or_obsolete()
        connecting.clear()
        with frozen(pg["pg1"]):
            with unrelated_scope():
                assert list(Book.objects.using("r1")) == []
            assert ("r1", threading.current_thread().name) not in connecting
            assert pool().replica_set.out_of_rotation == {"r1"}


def test_idle_pool_connections_to_a_frozen_replica_delay_reads_briefly(
    pg: PostgreSQL,
) -> None:
    """Django lets the pool check each connection at checkout, also a new one."""
    r1, r2 = (
        database(pg[alias], pool={"min_size": 4}, CONN_HEALTH_CHECKS=True)
        for alias in ("pg1", "pg2")
    )

    def read() -> int:
        with unrelated_scope():
            (book,) = Book.objects.using("r1").raw(PORT_QUERY["postgresql"])
        return int(book.port)

    with ThreadPoolExecutor(4) as threads, as_layout(pg, r1=r1, r2=r2):
        assert read() == pg["pg1"].port
        connections["r1"].close()
        connections["r1"].pool.wait()
        with frozen(pg["pg1"]):
            reads = [threads.submit(in_thread, read) for _ in range(4)]
            assert [each.result(DEADLINE) for each in reads] == [pg["pg2"].port] * 4
            assert pool().replica_set.out_of_rotation == {"r1"}


def test_replica_unresponsive_after_an_error_is_detected(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    """Django then checks with a query whether the connection is usable."""
    probe_replicas()
    connecting.clear()
    with ExitStack() as stack:
        freeze_once = iter([pg["pg1"]])

        def fail(execute: Any, *call: Any) -> Any:
            for node in freeze_once:
                stack.enter_context(frozen(node))
                raise OperationalError("of its own")
            return execute(*call)

        with unrelated_scope(), connections["pg1"].execute_wrapper(fail):
            (book,) = Book.objects.using("pg1").raw(PORT_QUERY["postgresql"])
        assert book.port == pg["pg2"].port
        assert pool().replica_set.out_of_rotation == {"pg1"}
    assert ("pg1", threading.current_thread().name) not in connecting


# Unresponsive primary


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain settings": {},
    "max_lag": {"PINNING_MAX_LAG": 5},
    "monotonic": {"PINNING_CONSISTENCY": "monotonic-reads"},
}


@pytest.mark.parametrize("role", ["superuser", "plain"])
@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=list(LAYOUTS))
def test_frozen_primary_does_not_delay_replica_reads(
    pg: PostgreSQL, asked: Asked, settings: dict[str, Any], role: str
) -> None:
    """For unpinned reads, and for pins whose position is known to be reached."""
    more = {"user": make_role(pg.cluster)} if role == "plain" else {}
    entries = on_replicas(pg, conn_max_age=None, **more)
    with as_layout(pg, **entries), override_settings(**settings):
        for alias in entries:
            assert eventually(lambda alias=alias: write_and_catch_up(pg, alias))
        token = write("last")
        pg.wait_for()
        for alias in entries:
            assert eventually(lambda alias=alias: is_known_caught_up(alias, token))
        with Clients(number=4) as clients, Clients(token, number=4) as pinned:
            asked.all.clear()
            with frozen(pg["pg"]):
                found = [*clients.go_on(100), *pinned.go_on(100)]
            assert {one.port for one in found} == {pg["pg1"].port, pg["pg2"].port}
            assert pool().replica_set.out_of_rotation == frozenset()
        assert "site" not in asked.by_requests


def write_and_catch_up(pg: PostgreSQL, alias: str) -> bool:
    """Write, and probe the replica; an unprivileged role needs a second write."""
    token = write()
    pg.wait_for()
    return eventually(lambda: is_known_caught_up(alias, token), 0.5)


def is_known_caught_up(alias: str, token: str) -> bool:
    wanted = position_in(token)
    return bool(
        pool().replica_set.caught_up(alias, Position(wanted))
        or pool().replica_set.probe_caught_up(alias, Position(wanted))
    )


def test_unpinned_read_does_not_probe_in_any_receiver_state(pg: PostgreSQL, asked: Asked) -> None:
    """A replica without a receiver stays in rotation for unpinned reads."""
    for alias in REPLICAS:
        pg[alias].execute("ALTER SYSTEM SET primary_conninfo = ''")
        pg[alias].execute("SELECT pg_reload_conf()")
    try:
        receiver = "SELECT count(*) FROM pg_stat_wal_receiver"
        assert eventually(lambda: all(pg[a].execute(receiver) == [(0,)] for a in REPLICAS))
        with frozen(pg["pg"]):
            assert {server_for(None) for _ in range(6)} == REPLICAS
        assert asked.by_requests == []
    finally:
        for alias in REPLICAS:
            pg[alias].execute("ALTER SYSTEM RESET primary_conninfo")
            pg[alias].execute("SELECT pg_reload_conf()")


def test_new_pin_reads_replicas_while_the_primary_is_unresponsive(pg: PostgreSQL) -> None:
    token = write("one")
    pg.wait_for()
    with frozen(pg["pg"]):
        assert {server_for(token) for _ in range(6)} <= REPLICAS
        assert titles(token) == ["one"]


@pytest.mark.parametrize("pooling", [None, {"min_size": 0, "max_size": 4}], ids=["plain", "pool"])
def test_probe_does_not_wait_to_connect_to_an_unresponsive_primary(
    pg: PostgreSQL, pooling: dict[str, Any] | None
) -> None:
    """An unprivileged role probes the primary; the timeouts of the site are unchanged."""
    user = make_role(pg.cluster)

    def decide(token: str) -> None:
        with unrelated_scope(token):
            route(pools().by_primary["site"])

    with as_layout(pg, r1=database(pg["pg1"], conn_max_age=None, user=user)):
        connections["site"].close()
        connections.settings["site"].update(database(pg["pg"], user=user, pool=pooling))
        del connections["site"]
        try:
            with ThreadPoolExecutor(1) as threads:
                token = write("one")
                pg.wait_for("pg1")
                for connection in connections.all(initialized_only=True):
                    connection.close()
                if pooling is not None:
                    connections["site"].close_pool()
                with override_settings(PINNING_SECONDS=30), frozen(pg["pg"]):
                    # Discard all state of this process.
                    threads.submit(in_thread, lambda: decide(token)).result(DEADLINE)
                    assert endpoint_for(connections["site"]).out_of_rotation == "unreachable"
                if pooling is not None:
                    assert connections["site"].pool.timeout > DEADLINE
        finally:
            if pooling is not None:
                connections["site"].close_pool()


def test_probe_does_not_wait_for_the_pool_check_of_an_unresponsive_primary(
    pg: PostgreSQL,
) -> None:
    with as_layout(pg, r1=database(pg["pg1"], conn_max_age=None)):
        connections["site"].close()
        connections.settings["site"].update(
            database(pg["pg"], pool={"min_size": 1}, CONN_HEALTH_CHECKS=True)
        )
        del connections["site"]
        try:
            write("one")
            connections["site"].close()
            with ThreadPoolExecutor(1) as threads, frozen(pg["pg"]):
                asking = threads.submit(in_thread, lambda: pool().current_position())
                assert asking.result(DEADLINE) is None
        finally:
            connections["site"].close_pool()


@pytest.mark.parametrize("conn_max_age", [None, 0])
def test_unresponsive_primary_with_a_substitute_fails_over(
    pg: PostgreSQL, conn_max_age: int | None
) -> None:
    """It is used again as soon as it recovers."""
    connections.settings["pg"]["CONN_MAX_AGE"] = conn_max_age
    connections["pg"].settings_dict["CONN_MAX_AGE"] = conn_max_age
    connections["pg"].close()
    write("one")
    pg.wait_for()
    pg.pause()
    token = write("two")
    assert titles(token) == ["one", "two"]
    close_old_connections()
    with override_settings(PINNING_PRIMARY_DOWN="stale"):
        with frozen(pg["pg"]):
            # A monitor may just have started a probe.
            assert titles(token) == ["one"]
            assert [titles(token) for _ in range(5)] == [["one"]] * 5
        assert eventually(lambda: titles(token) == ["one", "two"], 5)
        assert not pool().endpoint.out_of_rotation


# Slow queries


SLEEP = "SELECT 1 AS id, inet_server_port() AS port, pg_sleep(%s)::text AS slept"
RUNNING = """
SELECT count(*) FROM pg_stat_activity
WHERE query LIKE '%inet_server_port() AS port, %pg_sleep%' AND state = 'active'
  AND pid != pg_backend_pid()
"""


def record_liveness_checks(monkeypatch: pytest.MonkeyPatch) -> list[SessionStatus]:
    """Record the results of checks of waiting reads on fresh connections."""
    check, found = liveness.check_session, list[SessionStatus]()

    def recording(*args: Any) -> SessionStatus:
        found.append(check(*args))
        return found[-1]

    monkeypatch.setattr(liveness, "check_session", recording)
    return found


def test_slow_query_completes_and_runs_once(
    pg: PostgreSQL, sent_signals: SentSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = record_liveness_checks(monkeypatch)
    with unrelated_scope():
        expected = server()
        running = []

        def sleep() -> tuple[str, int]:
            with unrelated_scope():
                (book,) = Book.objects.using(expected).raw(SLEEP, [2.5])
            return book.slept, book.port

        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(in_thread, sleep)
            while not slow.done():
                running.append(sum(pg[alias].execute(RUNNING)[0][0] for alias in ("pg", *REPLICAS)))
            assert slow.result() == ("", pg[expected].port)
        assert max(running) == 1
        assert server() == expected
    assert set(found) <= {SessionStatus.RUNNING}
    assert sent_signals == []


HERE = """
SELECT 1 AS id, inet_server_port() AS port,
       CASE inet_server_port() WHEN %s THEN pg_sleep(60)::text END AS slept
"""


def test_reads_hanging_on_a_frozen_server_are_retried_on_another(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """All of them, after one liveness check."""
    running = PIDS.replace("pid", "count(*)", 1)

    def wait() -> int:
        with unrelated_scope():
            (book,) = Book.objects.using("pg1").raw(HERE, [pg["pg1"].port])
        return int(book.port)

    with ThreadPoolExecutor(4) as threads, ExitStack() as stack:
        waiting = [threads.submit(in_thread, wait) for _ in range(4)]
        assert eventually(lambda: pg["pg1"].execute(running) == [(4,)])
        stack.enter_context(frozen(pg["pg1"]))
        served = [one.result(30) for one in waiting]
    assert served == [pg["pg2"].port] * 4
    (left,) = sent_signals.of("replica_removed")
    assert (left["replica"], left["reason"]) == ("pg1", "unresponsive")
    pg["pg1"].execute(f"SELECT pg_terminate_backend(pid) FROM ({PIDS}) AS waiting")


PIDS = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%'"
PIDS += " AND pid != pg_backend_pid()"


def places_for(pg: PostgreSQL, way: str, stack: ExitStack) -> tuple[Place, ...]:
    """Return the addresses of both replicas, or that of a pooler of the first one."""
    nodes = pg["pg1"], pg["pg2"]
    if way == "haproxy":
        return (stack.enter_context(haproxy(*nodes)),)
    if way == "pgbouncer":
        return (stack.enter_context(pgbouncer(pg["pg1"])),)
    return nodes


def register_servers(alias: str, number: int) -> None:
    """Read until this many servers behind an alias are registered."""

    def is_registered() -> int:
        connections[alias].close()
        assert pool().health.probe(connections[alias]) is not None
        return len(endpoint(alias).servers)

    assert eventually(lambda: is_registered() == number)


@pytest.mark.parametrize("role", ["superuser", "plain"])
@pytest.mark.parametrize(
    ("way", "known"),
    [
        ("hosts", 2),
        ("haproxy", 2),
        ("pgbouncer", 1),
        ("hosts", 0),
        ("haproxy", 0),
        ("pgbouncer", 0),
    ],
)
def test_slow_query_completes_behind_proxies_and_poolers(
    pg: PostgreSQL,
    sent_signals: SentSignals,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    known: int,
    role: str,
) -> None:
    found = record_liveness_checks(monkeypatch)
    more = {"user": make_role(pg.cluster)} if role == "plain" else {}
    with ExitStack() as stack:
        places = places_for(pg, way, stack)
        stack.enter_context(as_layout(pg, many=database(*places, conn_max_age=None, **more)))
        if known:
            register_servers("many", known)
        with unrelated_scope():
            expected = port()
            (book,) = Book.objects.using("many").raw(SLEEP, [2])
            assert (book.slept, book.port) == ("", expected)
    assert set(found) <= {SessionStatus.RUNNING}
    assert sent_signals == []


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("to", ["other", "nobody"])
def test_reads_do_not_wait_for_a_server_whose_address_has_moved(
    pg: PostgreSQL, known: bool, to: str
) -> None:
    """It failed without closing its connections; new ones reach another server or are refused."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        ThreadPoolExecutor(1) as threads,
        Forwarder(pg["pg1"]) as address,
        as_layout(pg, moving=database(address, conn_max_age=None)),
    ):
        nobody = Address(*taken.getsockname())
        taken.close()
        moved = threading.Event()
        is_connected = threading.Event()

        def wait() -> int:
            with unrelated_scope():
                assert port() == pg["pg1"].port
                if known:
                    register_servers("moving", 1)
                is_connected.set()
                assert moved.wait(DEADLINE)
                return port()

        reading = threads.submit(in_thread, wait)
        assert is_connected.wait(DEADLINE)
        with frozen(pg["pg1"]):
            address.point_to(pg["pg2"] if to == "other" else nobody, cut=False)
            moved.set()
            by = reading.result(DEADLINE)
        assert by == pg["pg2" if to == "other" else "pg"].port


@pytest.mark.parametrize("way", ["hosts", "haproxy"])
@pytest.mark.parametrize("known", [2, 0])
def test_frozen_server_is_detected_while_another_responds_at_its_address(
    pg: PostgreSQL, way: str, known: int
) -> None:
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        places = places_for(pg, way, stack)
        stack.enter_context(as_layout(pg, many=database(*places, conn_max_age=None)))
        connected: Queue[int] = Queue()
        has_frozen = threading.Event()

        def wait() -> int:
            with unrelated_scope():
                if known:
                    register_servers("many", known)
                connected.put(port())
                assert has_frozen.wait(DEADLINE)
                return port()

        reading = threads.submit(in_thread, wait)
        first = connected.get(timeout=DEADLINE)
        with frozen(next(pg[alias] for alias in REPLICAS if pg[alias].port == first)):
            has_frozen.set()
            by = reading.result(DEADLINE)
        assert by != first


@pytest.mark.parametrize("way", ["hosts", "haproxy"])
def test_frozen_server_is_detected_while_reads_of_another_of_its_alias_are_answered(
    pg: PostgreSQL, way: str
) -> None:
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        places = places_for(pg, way, stack)
        options = {"options": {"load_balance_hosts": "random"}} if way == "hosts" else {}
        stack.enter_context(as_layout(pg, many=database(*places, conn_max_age=None, **options)))
        over = threading.Event()
        stack.callback(over.set)
        connected: Queue[int] = Queue()
        is_frozen = threading.Event()
        frozen_port = pg["pg1"].port

        def connect_to(is_wanted: Callable[[int], bool]) -> None:
            while not is_wanted(port_for(None)):
                connections["many"].close()
            connected.put(1)
            assert is_frozen.wait(DEADLINE)

        def read() -> int:
            connect_to(lambda found: found == frozen_port)
            return port_for(None)

        def read_repeatedly() -> None:
            connect_to(lambda found: found != frozen_port)
            while not over.is_set():
                port_for(None)

        others = threads.submit(in_thread, read_repeatedly)
        reading = threads.submit(in_thread, read)
        for _ in range(2):
            connected.get(timeout=DEADLINE)
        with frozen(pg["pg1"]):
            is_frozen.set()
            assert reading.result(DEADLINE) != frozen_port
            over.set()
            others.result(DEADLINE)


class UnnoticedClose(Forwarder):
    """A forwarder that does not propagate the end of a connection."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.over = threading.Event()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        self.over.wait()

    def stop(self) -> None:
        self.over.set()
        super().stop()


def test_lost_session_leaves_its_server_in_rotation(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    with (
        UnnoticedClose(pg["pg1"]) as address,
        as_layout(pg, r1=database(address, conn_max_age=None)),
    ):
        probe_replicas()
        with unrelated_scope():
            assert port() == pg["pg1"].port
            pg.terminate("pg1")
            assert port() == pg["pg1"].port
        address.over.set()
    assert sent_signals.of("read_retried") == []
    assert sent_signals.of("replica_removed") == []


def test_server_with_too_many_connections_is_not_unresponsive(
    pg: PostgreSQL, sent_signals: SentSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = record_liveness_checks(monkeypatch)
    user = make_role(pg.cluster)
    with as_layout(pg, r1=database(pg["pg1"], conn_max_age=None, user=user)), unrelated_scope():
        with no_failover():
            connections["r1"].ensure_connection()
        pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT 1")
        pg.wait_for("pg1")
        try:
            (book,) = Book.objects.using("r1").raw(SLEEP, [2])
            assert (book.slept, book.port) == ("", pg["pg1"].port)
        finally:
            pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT -1")
    assert set(found) <= {SessionStatus.RUNNING}
    assert sent_signals == []


def test_monitor_without_a_free_connection_takes_out_no_server_that_answers(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    user = make_role(pg.cluster)
    with as_layout(pg, r1=database(pg["pg1"], conn_max_age=None, user=user)), unrelated_scope():
        assert port() == pg["pg1"].port
        pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT 1")
        pg.wait_for("pg1")
        try:
            checker = Monitor("r1", "site", pool().health.update_status)
            assert checker._probe("r1") is None
            assert port() == pg["pg1"].port
        finally:
            pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT -1")
    assert sent_signals.of("replica_removed") == []


# Probes


def test_probe_without_a_reply_takes_the_server_out_of_rotation(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    pg.pause("pg2")
    probe_replicas()
    token = write("one")
    pg.wait_for("pg1")
    with frozen(pg["pg1"]):
        while not pool().replica_set.out_of_rotation:
            assert titles(token) == ["one"]
        assert [server_for(token) for _ in range(4)] == ["pg"] * 4
        assert in_thread(lambda: titles(token)) == ["one"]
    (left,) = sent_signals.of("replica_removed")
    assert (left["replica"], left["reason"]) == ("pg1", "unresponsive")


def test_thawed_replica_is_returned_to_rotation_by_its_monitor(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    probe_replicas()
    # The monitor may connect as soon as the replica is out of rotation.
    connecting.clear()
    with frozen(pg["pg1"]):
        assert not pool().replica_set.probe_caught_up("pg1", Position(position_in(write())))
        assert pool().replica_set.out_of_rotation == {"pg1"}
    make_retry_due("pg1")
    assert eventually(lambda: pool().replica_set.out_of_rotation == frozenset())
    assert {thread for alias, thread in connecting if alias == "pg1"} == {"pinning-monitor-pg1"}
    pg.wait_for()
    assert {server_for(None) for _ in range(4)} == REPLICAS


@pytest.mark.parametrize("how", ["no_failover", "transaction"])
def test_reachable_replica_returns_when_its_retry_is_due(pg: PostgreSQL, how: str) -> None:
    probe_replicas()
    with frozen(pg["pg1"]):
        assert not pool().replica_set.probe_caught_up("pg1", Position(position_in(write())))
    endpoint("pg1").retry_at = time.monotonic() + 1000
    with unrelated_scope(), no_failover() if how == "direct" else transaction.atomic(using="pg1"):
        connections["pg1"].ensure_connection()
        (book,) = Book.objects.using("pg1").raw(SLEEP, [1.5])
        assert (book.slept, book.port) == ("", pg["pg1"].port)
        assert endpoint("pg1").out_of_rotation == "unresponsive"


@pytest.mark.usefixtures("untracked")
def test_replica_returns_while_every_client_is_pinned(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    """Its monitor retries it; no request does."""
    token = write("one")
    pg.wait_for()
    probe_replicas()
    mark_unreachable("pg1", 0.2)
    connecting.clear()
    served = set()
    assert eventually(lambda: served.add(server_for(token)) or "pg1" in served)
    assert served <= REPLICAS
    assert {thread for _, thread in connecting} <= {"pinning-monitor-pg1"}
    assert ("pg1", "pinning-monitor-pg1") in connecting


@override_settings(PINNING_WAIT=30)
def test_replica_is_probed_once_for_all_waiting_requests(pg: PostgreSQL, asked: Asked) -> None:
    pg.pause()
    token = write("one")

    def wait() -> str:
        with unrelated_scope(token):
            connections["pg1"].ensure_connection()
            connections["pg2"].ensure_connection()
            return server()

    with ThreadPoolExecutor(16) as threads:
        waiting = [threads.submit(in_thread, wait) for _ in range(16)]
        assert eventually(lambda: len(asked.by_monitors) > 20)
        assert eventually(lambda: len(asked.by_requests) >= 1)
        asked_before = len(asked.by_monitors)
        assert eventually(lambda: len(asked.by_monitors) > asked_before + 20)
        pg["pg1"].resume()
        served = [one.result(30) for one in waiting]
    assert served == ["pg1"] * 16
    # Each thread probes both replicas once before it waits, and then the selected one.
    assert len([alias for alias in asked.by_requests if alias in REPLICAS]) <= 16 * 3


def test_unknown_server_that_does_not_answer_leaves_others_of_its_alias_in_rotation(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """Neither read's connection was identified, so that the alias alone is known."""
    with (
        haproxy(pg["pg1"], pg["pg2"]) as proxy,
        as_layout(pg, many=database(proxy, conn_max_age=None)),
        ThreadPoolExecutor(1) as threads,
    ):
        register_servers("many", 2)
        connections["many"].close()
        with unrelated_scope():
            mine = port()
        is_connected, is_frozen = threading.Event(), threading.Event()

        def read_from_the_other() -> int:
            while port_for(None) == mine:
                connections["many"].close()
            is_connected.set()
            assert is_frozen.wait(DEADLINE)
            return port_for(None)

        reading = threads.submit(in_thread, read_from_the_other)
        assert is_connected.wait(DEADLINE)
        (other,) = (node for node in (pg["pg1"], pg["pg2"]) if node.port != mine)
        with frozen(other):
            is_frozen.set()
            with unrelated_scope():
                (book,) = Book.objects.using("many").raw(SLEEP, [2])
            assert (book.port, book.slept) == (mine, "")
            assert reading.result(DEADLINE) == pg["pg"].port
        assert sent_signals.of("replica_removed") == []


def test_pooler_whose_connections_are_all_in_use_is_not_unresponsive(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """New connections wait in the pooler, while the reads before them are answered."""
    with (
        pgbouncer(pg["pg1"], default_pool_size="2") as bouncer,
        as_layout(pg, r1=database(bouncer, conn_max_age=None)),
    ):
        assert pool().health.probe(connections["r1"])
        connections["r1"].close()
        connected = threading.Barrier(10, timeout=DEADLINE)

        def read(_: int) -> list[int]:
            try:
                connections["r1"].ensure_connection()
                connected.wait()
                with unrelated_scope():
                    found = (Book.objects.using("r1").raw(SLEEP, [0.25]) for _ in range(4))
                    return [book.port for (book,) in found]
            finally:
                connections.close_all()

        assert in_threads(read, 10) == [[pg["pg1"].port] * 4] * 10
        assert sent_signals == []


def test_request_ends_while_a_connection_with_an_error_is_to_a_frozen_replica(
    pg: PostgreSQL,
) -> None:
    """Django then checks with a query whether the connection is usable."""
    connections["pg1"].ensure_connection()
    connections["pg1"].errors_occurred = True
    with frozen(pg["pg1"]):
        close_old_connections()
        assert connections["pg1"].connection is None
