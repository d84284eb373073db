"""Servers that take connections and say nothing: nobody waits for them, or not for long."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import Queue
from typing import Any, NamedTuple, Self

import pytest
from django.db import Error, OperationalError, close_old_connections, connections, transaction
from django.db.backends.postgresql.base import DatabaseWrapper
from django.test import override_settings

from pinning_middleware import no_failover
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers import liveness
from pinning_middleware.servers.probe import endpoint_for
from tests.app.models import Book

from .conftest import (
    ASK_PORT,
    Asked,
    Heard,
    PostgreSQL,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    look_again,
    look_around,
    pool,
    pooled,
    port,
    port_for,
    position_in,
    server,
    server_for,
    stranger,
    take_out,
    titles,
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

# Seconds: what a read may take once, 2.5, on a machine that has other things to do.
ONCE = 6.0
# A read that nothing held up.
USUAL = 1.5
REPLICAS = {"pg1", "pg2"}
OTHER = {"pg1": "pg2", "pg2": "pg1"}


class Reading(NamedTuple):
    """Who answered a visitor, how long that took, and who was known to be out when it began."""

    port: int
    seconds: float
    out: frozenset[str]


class Visitors:
    """Threads that read all the time, each with connections of its own."""

    def __init__(self, token: str | None = None, number: int = 8) -> None:
        self.token = token
        self.readings: list[list[Reading]] = [[] for _ in range(number)]
        self._over = threading.Event()
        self._threads = ThreadPoolExecutor(number)
        self._done: list[Any] = []

    def __enter__(self) -> Self:
        self._done = [self._threads.submit(self._visit, mine) for mine in self.readings]
        # Until each of them has met all that it will meet.
        self.go_on(30)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._threads.shutdown()
        for one in self._done:
            one.result()

    def go_on(self, rounds: int = 20) -> list[Reading]:
        """Let each of them read so many times more; what they read since."""
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

    def _visit(self, mine: list[Reading]) -> None:
        try:
            while not self._over.is_set():
                out, began = pool().out, time.monotonic()
                by = port_for(self.token)
                mine.append(Reading(by, time.monotonic() - began, out))
                close_old_connections()
        finally:
            with suppress(Error):
                connections.close_all()


@pytest.fixture
def connecting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Who tried to connect to what, from here on: the alias, and the thread's name."""
    made: list[tuple[str, str]] = []
    connect = DatabaseWrapper.get_new_connection

    def noted(self: Any, params: Any) -> Any:
        made.append((self.alias, threading.current_thread().name))
        return connect(self, params)

    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", noted)
    return made


# Visitors of a site with a silent replica


def on_replicas(pg: PostgreSQL, **more: Any) -> dict[str, dict[str, Any]]:
    return {f"r{number}": database(pg[f"pg{number}"], **more) for number in (1, 2)}


@pytest.mark.parametrize("conn_max_age", [None, 0])
def test_a_frozen_replica_holds_up_visitors_once(
    pg: PostgreSQL, heard: Heard, conn_max_age: int | None
) -> None:
    entries = on_replicas(pg, conn_max_age=conn_max_age)
    with as_layout(pg, **entries), Visitors() as visitors:
        assert {one.port for one in visitors.go_on()} == {pg["pg1"].port, pg["pg2"].port}
        with frozen(pg["pg1"]):
            found = visitors.go_on()
            assert pool().out == {"r1"}
            later = visitors.go_on(50)
        assert max(one.seconds for one in found) < ONCE
        # After the first, nobody waits.
        known = [one for one in (*found, *later) if one.out_of_rotation]
        assert max(one.seconds for one in known) < USUAL
        assert {one.port for one in later} == {pg["pg2"].port}
        assert {one["replica"] for one in heard.of("replica_removed")} == {"r1"}
        look_again("r1")
        assert eventually(lambda: pool().out == frozenset())
        assert {one.port for one in visitors.go_on()} == {pg["pg1"].port, pg["pg2"].port}


def test_a_black_hole_holds_up_visitors_once(pg: PostgreSQL, heard: Heard) -> None:
    with (
        black_hole() as place,
        as_layout(
            pg,
            hole=database(place, conn_max_age=None),
            r2=database(pg["pg2"], conn_max_age=None),
        ),
        Visitors() as visitors,
    ):
        found = [one for mine in visitors.readings for one in mine]
        assert pool().out == {"hole"}
        later = visitors.go_on(50)
        assert max(one.seconds for one in found) < ONCE
        assert max(one.seconds for one in (*found, *later) if one.out_of_rotation) < USUAL
        assert {one.port for one in (*found, *later)} == {pg["pg2"].port}
    assert [one["reason"] for one in heard.of("replica_removed")] == ["unreachable"]


def test_a_pool_of_connections_to_a_black_hole_is_given_up_soon(pg: PostgreSQL) -> None:
    """The pool's own patience would be 30 s."""
    with (
        black_hole() as place,
        as_layout(pg, hole=pooled(place), r2=database(pg["pg2"], conn_max_age=None)),
    ):
        began = time.monotonic()
        while not pool().out:
            assert port_for(None) == pg["pg2"].port
        assert time.monotonic() - began < ONCE
        began = time.monotonic()
        assert {port_for(None) for _ in range(6)} == {pg["pg2"].port}
        assert time.monotonic() - began < USUAL


def test_a_frozen_replica_is_found_out_by_django_s_health_check(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    """Once: what was told to be silent is not connected to."""
    entries = on_replicas(pg, conn_max_age=None, CONN_HEALTH_CHECKS=True)
    with as_layout(pg, **entries):
        with stranger(), no_failover():
            for alias in entries:
                connections[alias].ensure_connection()
        # As a new request does.
        for alias in entries:
            connections[alias].close_if_unusable_or_obsolete()
        connecting.clear()
        with frozen(pg["pg1"]):
            began = time.monotonic()
            with stranger():
                assert list(Book.objects.using("r1")) == []
            assert time.monotonic() - began < ONCE
            assert ("r1", threading.current_thread().name) not in connecting
            assert pool().out == {"r1"}


def test_a_pool_s_idle_connections_to_a_frozen_replica_hold_up_nobody_for_long(
    pg: PostgreSQL,
) -> None:
    """Django lets a pool check each that it hands out, also one that nobody has had before."""
    r1, r2 = (
        database(pg[alias], pool={"min_size": 4}, CONN_HEALTH_CHECKS=True)
        for alias in ("pg1", "pg2")
    )

    def read() -> tuple[int, float]:
        began = time.monotonic()
        with stranger():
            (book,) = Book.objects.using("r1").raw(ASK_PORT["postgresql"])
        return int(book.port), time.monotonic() - began

    with ThreadPoolExecutor(4) as threads, as_layout(pg, r1=r1, r2=r2):
        assert read()[0] == pg["pg1"].port
        connections["r1"].close()
        connections["r1"].pool.wait()
        with frozen(pg["pg1"]):
            reads = [threads.submit(in_thread, read) for _ in range(4)]
            for reading in reads:
                by, seconds = reading.result(3 * ONCE)
                assert by == pg["pg2"].port
                assert seconds < ONCE
            assert pool().out == {"r1"}


def test_a_replica_that_falls_silent_after_an_error_is_lost(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    """Whether its connection is still good is asked of it then."""
    look_around()
    connecting.clear()
    with ExitStack() as stack:
        freeze_once = iter([pg["pg1"]])

        def fail(execute: Any, *call: Any) -> Any:
            for node in freeze_once:
                stack.enter_context(frozen(node))
                raise OperationalError("of its own")
            return execute(*call)

        with stranger(), connections["pg1"].execute_wrapper(fail):
            (book,) = Book.objects.using("pg1").raw(ASK_PORT["postgresql"])
        assert book.port == pg["pg2"].port
        assert pool().out == {"pg1"}
    assert ("pg1", threading.current_thread().name) not in connecting


# The primary is silent


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain settings": {},
    "max_lag": {"PINNING_MAX_LAG": 5},
    "monotonic": {"PINNING_CONSISTENCY": "monotonic-reads"},
}


@pytest.mark.parametrize("role", ["superuser", "plain"])
@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_frozen_primary_is_no_visitor_s_business(
    pg: PostgreSQL, asked: Asked, settings: dict[str, Any], role: str
) -> None:
    """Unpinned reads, and pins that are known to be reached."""
    more = {"user": make_role(pg.cluster)} if role == "plain" else {}
    entries = on_replicas(pg, conn_max_age=None, **more)
    with as_layout(pg, **entries), override_settings(**settings):
        for alias in entries:
            assert eventually(lambda alias=alias: has_what_is_written(pg, alias))
        token = write("last")
        pg.wait_for()
        for alias in entries:
            assert eventually(lambda alias=alias: is_known_to_have(alias, token))
        with Visitors(number=4) as visitors, Visitors(token, number=4) as pinned:
            asked.all.clear()
            with frozen(pg["pg"]):
                found = [*visitors.go_on(100), *pinned.go_on(100)]
            assert max(one.seconds for one in found) < USUAL
            assert {one.port for one in found} == {pg["pg1"].port, pg["pg2"].port}
            assert pool().out == frozenset()
        assert "site" not in asked.by_requests


def has_what_is_written(pg: PostgreSQL, alias: str) -> bool:
    """Write, and have it asked for; a role without rights is told at the second write."""
    token = write()
    pg.wait_for()
    return eventually(lambda: is_known_to_have(alias, token), 0.5)


def is_known_to_have(alias: str, token: str) -> bool:
    wanted = position_in(token)
    return bool(pool().has(alias, wanted) or pool().asked_has(alias, wanted))


def test_an_unpinned_read_asks_nobody_whatever_the_state_of_the_receiver(
    pg: PostgreSQL, asked: Asked
) -> None:
    """A replica that follows nobody serves visitors all the same."""
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


def test_a_new_pin_is_served_by_replicas_while_the_primary_is_silent(pg: PostgreSQL) -> None:
    token = write("one")
    pg.wait_for()
    with frozen(pg["pg"]):
        began = time.monotonic()
        assert {server_for(token) for _ in range(6)} <= REPLICAS
        assert titles(token) == ["one"]
        assert time.monotonic() - began < USUAL


@pytest.mark.parametrize("pooling", [None, {"min_size": 0, "max_size": 4}], ids=["plain", "pool"])
def test_a_question_does_not_wait_until_a_silent_primary_takes_a_connection(
    pg: PostgreSQL, pooling: dict[str, Any] | None
) -> None:
    """The primary is asked for a role without rights; the site's own patience is its own."""
    user = make_role(pg.cluster)

    def decide(token: str) -> float:
        began = time.monotonic()
        with stranger(token):
            pools().by_primary["site"].decide()
        return time.monotonic() - began

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
                    # Of what this process knew, nothing is left.
                    assert threads.submit(in_thread, lambda: decide(token)).result(ONCE) < ONCE
                    assert endpoint_for(connections["site"]).out_of_rotation == "unreachable"
                if pooling is not None:
                    assert connections["site"].pool.timeout > ONCE
        finally:
            if pooling is not None:
                connections["site"].close_pool()


def test_a_question_does_not_wait_for_the_check_of_a_silent_primary_s_pool(
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
                asking = threads.submit(in_thread, lambda: pool().position_now())
                assert asking.result(ONCE) is None
        finally:
            connections["site"].close_pool()


@pytest.mark.parametrize("conn_max_age", [None, 0])
def test_a_silent_primary_that_has_a_stand_in(pg: PostgreSQL, conn_max_age: int | None) -> None:
    """It is used at once when it is back."""
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
            began = time.monotonic()
            # A watcher may just have begun to ask.
            assert titles(token) == ["one"]
            assert time.monotonic() - began < ONCE
            began = time.monotonic()
            assert [titles(token) for _ in range(5)] == [["one"]] * 5
            assert time.monotonic() - began < USUAL
        assert eventually(lambda: titles(token) == ["one", "two"], 5)
        assert not pool().endpoint.out_of_rotation


# A slow query is no silence


SLEEP = "SELECT 1 AS id, inet_server_port() AS port, pg_sleep(%s)::text AS slept"
RUNNING = """
SELECT count(*) FROM pg_stat_activity
WHERE query LIKE '%inet_server_port() AS port, %pg_sleep%' AND state = 'active'
  AND pid != pg_backend_pid()
"""


def note_answers(monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """What was found when a read had to be looked into, from here on."""
    answers, looked_into = liveness._answers, list[bool | None]()

    def noted(*args: Any) -> bool | None:
        looked_into.append(answers(*args))
        return looked_into[-1]

    monkeypatch.setattr(liveness, "_answers", noted)
    return looked_into


def test_a_slow_query_runs_to_its_end_and_once(
    pg: PostgreSQL, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_into = note_answers(monkeypatch)
    with stranger():
        expected = server()
        running = []

        def sleep() -> tuple[str, int]:
            with stranger():
                (book,) = Book.objects.using(expected).raw(SLEEP, [2.5])
            return book.slept, book.port

        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(in_thread, sleep)
            while not slow.done():
                running.append(sum(pg[alias].execute(RUNNING)[0][0] for alias in ("pg", *REPLICAS)))
            assert slow.result() == ("", pg[expected].port)
        assert max(running) == 1
        assert server() == expected
    assert looked_into
    assert all(looked_into)
    assert heard == []


HERE = """
SELECT 1 AS id, inet_server_port() AS port,
       CASE inet_server_port() WHEN %s THEN pg_sleep(60)::text END AS slept
"""


def test_reads_that_wait_on_a_frozen_server_run_elsewhere(pg: PostgreSQL, heard: Heard) -> None:
    """All of them, after one look."""
    running = PIDS.replace("pid", "count(*)", 1)

    def wait() -> int:
        with stranger():
            (book,) = Book.objects.using("pg1").raw(HERE, [pg["pg1"].port])
        return int(book.port)

    with ThreadPoolExecutor(4) as threads, ExitStack() as stack:
        waiting = [threads.submit(in_thread, wait) for _ in range(4)]
        assert eventually(lambda: pg["pg1"].execute(running) == [(4,)])
        began = time.monotonic()
        stack.enter_context(frozen(pg["pg1"]))
        served = [one.result(30) for one in waiting]
        assert time.monotonic() - began < ONCE
    assert served == [pg["pg2"].port] * 4
    (left,) = heard.of("replica_removed")
    assert (left["replica"], left["reason"]) == ("pg1", "unresponsive")
    pg["pg1"].execute(f"SELECT pg_terminate_backend(pid) FROM ({PIDS}) AS waiting")


PIDS = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%'"
PIDS += " AND pid != pg_backend_pid()"


def way_to(pg: PostgreSQL, way: str, stack: ExitStack) -> tuple[Place, ...]:
    """What leads to both replicas, or through a pooler to the first one."""
    nodes = pg["pg1"], pg["pg2"]
    if way == "haproxy":
        return (stack.enter_context(haproxy(*nodes)),)
    if way == "pgbouncer":
        return (stack.enter_context(pgbouncer(pg["pg1"])),)
    return nodes


def meet(alias: str, number: int) -> None:
    """Let so many servers be known behind an alias; the connection leads to one of them."""

    def met() -> int:
        connections[alias].close()
        assert pool().look_at(connections[alias]) is not None
        return len(endpoint(alias).servers)

    assert eventually(lambda: met() == number)


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
def test_a_slow_query_runs_to_its_end_behind_whatever_leads_there(
    pg: PostgreSQL,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    known: int,
    role: str,
) -> None:
    looked_into = note_answers(monkeypatch)
    more = {"user": make_role(pg.cluster)} if role == "plain" else {}
    with ExitStack() as stack:
        places = way_to(pg, way, stack)
        stack.enter_context(as_layout(pg, many=database(*places, conn_max_age=None, **more)))
        if known:
            meet("many", known)
        with stranger():
            expected = port()
            (book,) = Book.objects.using("many").raw(SLEEP, [2])
            assert (book.slept, book.port) == ("", expected)
    assert looked_into
    assert all(looked_into)
    assert heard == []


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("to", ["other", "nobody"])
def test_reads_do_not_wait_for_a_server_whose_address_has_moved(
    pg: PostgreSQL, known: bool, to: str
) -> None:
    """It has died without a farewell, and whoever connects is answered by another, or refused."""
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

        def wait() -> tuple[int, float]:
            with stranger():
                assert port() == pg["pg1"].port
                if known:
                    meet("moving", 1)
                is_connected.set()
                assert moved.wait(ONCE)
                began = time.monotonic()
                return port(), time.monotonic() - began

        reading = threads.submit(in_thread, wait)
        assert is_connected.wait(ONCE)
        with frozen(pg["pg1"]):
            address.point_to(pg["pg2"] if to == "other" else nobody, cut=False)
            moved.set()
            by, seconds = reading.result(3 * ONCE)
        assert by == pg["pg2" if to == "other" else "pg"].port
        assert seconds < ONCE


@pytest.mark.parametrize("way", ["hosts", "haproxy"])
@pytest.mark.parametrize("known", [2, 0])
def test_a_frozen_server_is_noticed_while_another_answers_at_its_address(
    pg: PostgreSQL, way: str, known: int
) -> None:
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        places = way_to(pg, way, stack)
        stack.enter_context(as_layout(pg, many=database(*places, conn_max_age=None)))
        connected: Queue[int] = Queue()
        has_frozen = threading.Event()

        def wait() -> tuple[int, float]:
            with stranger():
                if known:
                    meet("many", known)
                connected.put(port())
                assert has_frozen.wait(ONCE)
                began = time.monotonic()
                return port(), time.monotonic() - began

        reading = threads.submit(in_thread, wait)
        first = connected.get(timeout=ONCE)
        with frozen(next(pg[alias] for alias in REPLICAS if pg[alias].port == first)):
            has_frozen.set()
            by, seconds = reading.result(3 * ONCE)
        assert by != first
        assert seconds < ONCE


class Unheard(Forwarder):
    """An address behind which the end of a connection is not heard of."""

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


def test_a_lost_session_says_nothing_of_its_server(pg: PostgreSQL, heard: Heard) -> None:
    with Unheard(pg["pg1"]) as address, as_layout(pg, r1=database(address, conn_max_age=None)):
        look_around()
        with stranger():
            assert port() == pg["pg1"].port
            pg.terminate("pg1")
            began = time.monotonic()
            assert port() == pg["pg1"].port
            assert time.monotonic() - began < ONCE
        address.over.set()
    assert len(heard.of("read_retried")) == 1
    assert heard.of("replica_removed") == []


def test_a_server_without_room_for_a_connection_is_not_silent(
    pg: PostgreSQL, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_into = note_answers(monkeypatch)
    user = make_role(pg.cluster)
    with as_layout(pg, r1=database(pg["pg1"], conn_max_age=None, user=user)), stranger():
        with no_failover():
            connections["r1"].ensure_connection()
        pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT 1")
        pg.wait_for("pg1")
        try:
            (book,) = Book.objects.using("r1").raw(SLEEP, [2])
            assert (book.slept, book.port) == ("", pg["pg1"].port)
        finally:
            pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT -1")
    assert looked_into == [True]
    assert heard == []


# Our own questions


def test_a_question_that_is_not_answered_takes_the_server_out(pg: PostgreSQL, heard: Heard) -> None:
    pg.pause("pg2")
    look_around()
    token = write("one")
    pg.wait_for("pg1")
    with frozen(pg["pg1"]):
        began = time.monotonic()
        while not pool().out:
            assert titles(token) == ["one"]
        assert time.monotonic() - began < ONCE
        began = time.monotonic()
        assert [server_for(token) for _ in range(4)] == ["pg"] * 4
        assert in_thread(lambda: titles(token)) == ["one"]
        assert time.monotonic() - began < USUAL
    (left,) = heard.of("replica_removed")
    assert (left["replica"], left["reason"]) == ("pg1", "unresponsive")


def test_a_thawed_replica_is_taken_back_by_its_watcher(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    look_around()
    # The watcher may connect as soon as it is out.
    connecting.clear()
    with frozen(pg["pg1"]):
        assert not pool().asked_has("pg1", position_in(write()))
        assert pool().out == {"pg1"}
    look_again("pg1")
    assert eventually(lambda: pool().out == frozenset())
    assert {thread for alias, thread in connecting if alias == "pg1"} == {"pinning-watcher-pg1"}
    pg.wait_for()
    assert {server_for(None) for _ in range(4)} == REPLICAS


@pytest.mark.parametrize("how", ["no_failover", "transaction"])
def test_a_replica_that_answers_again_may_take_its_time_before_it_is_back(
    pg: PostgreSQL, how: str
) -> None:
    look_around()
    with frozen(pg["pg1"]):
        assert not pool().asked_has("pg1", position_in(write()))
    endpoint("pg1").retry_at = time.monotonic() + 1000
    with stranger(), no_failover() if how == "direct" else transaction.atomic(using="pg1"):
        connections["pg1"].ensure_connection()
        (book,) = Book.objects.using("pg1").raw(SLEEP, [1.5])
        assert (book.slept, book.port) == ("", pg["pg1"].port)
        assert endpoint("pg1").out_of_rotation == "unresponsive"


def test_a_replica_comes_back_where_every_visitor_is_pinned(
    pg: PostgreSQL, connecting: list[tuple[str, str]]
) -> None:
    """No request tries it: its watcher does."""
    token = write("one")
    pg.wait_for()
    look_around()
    take_out("pg1", 0.2)
    connecting.clear()
    served = set()
    assert eventually(lambda: served.add(server_for(token)) or "pg1" in served)
    assert served <= REPLICAS
    assert {thread for _, thread in connecting} <= {"pinning-watcher-pg1"}
    assert ("pg1", "pinning-watcher-pg1") in connecting


@override_settings(PINNING_WAIT=30)
def test_a_replica_is_asked_once_for_all_who_wait(pg: PostgreSQL, asked: Asked) -> None:
    pg.pause()
    token = write("one")

    def wait() -> str:
        with stranger(token):
            connections["pg1"].ensure_connection()
            connections["pg2"].ensure_connection()
            return server()

    with ThreadPoolExecutor(16) as threads:
        waiting = [threads.submit(in_thread, wait) for _ in range(16)]
        assert eventually(lambda: len(asked.by_watchers) > 20)
        assert eventually(lambda: len(asked.by_requests) >= 1)
        asked_before = len(asked.by_watchers)
        assert eventually(lambda: len(asked.by_watchers) > asked_before + 20)
        pg["pg1"].resume()
        served = [one.result(30) for one in waiting]
    assert served == ["pg1"] * 16
    # Each has looked at either once before it waits, and at the one that it is given.
    assert len([alias for alias in asked.by_requests if alias in REPLICAS]) <= 16 * 3
