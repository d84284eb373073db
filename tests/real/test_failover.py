"""Failover on PostgreSQL: servers that fail, restart, cancel queries or are unresponsive."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from django.db import OperationalError, connections, transaction
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.backends.utils import CursorWrapper
from django.db.models import Max
from django.test import override_settings

from pinning_middleware import pin_this_request, use_primary, use_replica
from pinning_middleware.backend import read_errors
from pinning_middleware.exceptions import ReplicaWriteError
from pinning_middleware.pins import PoolKey, Position
from pinning_middleware.reasons import Fault
from pinning_middleware.scopes.scope import current_scope
from pinning_middleware.servers.connect import BoundedConnect
from pinning_middleware.servers.dialects.postgresql import PostgreSQL as Dialect
from pinning_middleware.servers.probe import probe, state_of
from pinning_middleware.servers.registry import registry
from tests.app.models import Author, Book
from tests.conftest import Visit

from .conftest import (
    PostgreSQL,
    SentSignals,
    alias_of_port,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    make_retry_due,
    mark_unreachable,
    pool,
    pooled,
    port_for,
    position_in,
    probe_replicas,
    server,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .layouts import Forwarder, database

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
OTHER = {"pg1": "pg2", "pg2": "pg1"}

READS: dict[str, Callable[[], Any]] = {
    "list": lambda: [book.title for book in Book.objects.all()],
    "values_list": lambda: list(Book.objects.values_list("title", flat=True)),
    "get": lambda: [Book.objects.get().title],
    "count": lambda: ["one"] * Book.objects.count(),
    "exists": lambda: ["one"] * Book.objects.exists(),
    "aggregate": lambda: [Book.objects.aggregate(last=Max("title"))["last"]],
    "related": lambda: [book.title for book in Book.objects.select_related("author")],
    "prefetch": lambda: [b.title for b in Book.objects.prefetch_related("tags")],
    "raw": lambda: [book.title for book in Book.objects.raw("SELECT * FROM app_book")],
    "iterator": lambda: [book.title for book in Book.objects.iterator()],
    "chunks": lambda: list(Book.objects.values_list("title", flat=True).iterator(chunk_size=1)),
    "cursor": lambda: cursor_read(),
}


def choose(alias: str | None) -> None:
    """Let the scope read from this replica, or from the next one if None."""
    current_scope().keep_replica(PoolKey("pg"), alias)


def cursor_read() -> list[str]:
    with connections[Book.objects.db].cursor() as cursor:
        cursor.execute("SELECT title FROM app_book")
        return [title for (title,) in cursor.fetchall()]


@pytest.fixture
def one_book(pg: PostgreSQL) -> PostgreSQL:
    with unrelated_scope():
        Book.objects.create(title="one")
    pg.wait_for()
    return pg


# A replica fails


@pytest.mark.parametrize("kind", READS)
def test_read_fails_over_if_its_replica_fails(
    one_book: PostgreSQL, kind: str, sent_signals: SentSignals
) -> None:
    with unrelated_scope():
        first = server()
        one_book[first].stop("immediate")
        assert READS[kind]() == ["one"]
        assert server() == OTHER[first]
    reruns = sent_signals.of("read_retried")
    assert (reruns[0]["sender"], reruns[0]["failed"]) == ("pg", first)
    assert reruns[0]["served"] == OTHER[first]
    assert sent_signals.of("replica_removed")[0]["replica"] == first
    assert sent_signals.of("fell_back_to_primary") == []


@pytest.mark.parametrize("kind", READS)
def test_read_is_retried_if_its_connection_is_lost(
    one_book: PostgreSQL, kind: str, sent_signals: SentSignals
) -> None:
    """A lost connection does not take the replica out of rotation."""
    with unrelated_scope():
        first = server()
        one_book.terminate(first)
        assert READS[kind]() == ["one"]
        assert server() == first
    assert sent_signals.of("read_retried") == []
    assert sent_signals.of("replica_removed") == sent_signals.of("fell_back_to_primary") == []


def test_failover_is_logged(one_book: PostgreSQL, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pinning_middleware"), unrelated_scope():
        first = server()
        one_book[first].stop("immediate")
        server()
        one_book[first].start()
        make_retry_due(first)
        assert eventually(lambda: server_for(None) == first)
    assert f"{first} is out of rotation (unreachable): " in caplog.text
    assert f"Could not read from {first}; read from {OTHER[first]} instead: " in caplog.text
    assert f"{first} is back in rotation." in caplog.text


def test_requests_fail_over_if_their_replica_fails(one_book: PostgreSQL, visit: Visit) -> None:
    def act(request: Any) -> tuple[str, list[str]]:
        return server(), READS["list"]()

    first, _ = visit(act)
    one_book[first].stop("immediate")
    assert [visit(act) for _ in range(4)] == [(OTHER[first], ["one"])] * 4
    assert "pinning" not in visit.browser.cookies


def test_both_replicas_down_uses_the_primary(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    with unrelated_scope():
        server()
        for alias in REPLICAS:
            one_book[alias].stop("immediate")
        assert [READS["list"](), READS["chunks"]()] == [["one"]] * 2
        assert server() == "pg"
    assert server_for(None) == "pg"
    assert {one["reason"] for one in sent_signals.of("fell_back_to_primary")} == {"no_replica"}


def test_both_replicas_down_from_the_start_uses_the_primary(one_book: PostgreSQL) -> None:
    for alias in REPLICAS:
        one_book[alias].stop("immediate")
        connections[alias].close()
    assert [titles() for _ in range(3)] == [["one"]] * 3
    assert [in_thread(titles) for _ in range(2)] == [["one"]] * 2


def test_replica_that_is_starting_up_is_skipped(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    """Connecting raises 57P03."""
    one_book["pg1"].stop("immediate")
    connections["pg1"].close()
    while server_for(None) != "pg2" or not sent_signals.of("replica_removed"):
        pass
    assert pool().replica_set.out_of_rotation == {"pg1"}


SLOW_HERE = """
SELECT id, title, CASE inet_server_port() WHEN %s THEN pg_sleep(30)::text END FROM app_book
"""


@contextmanager
def during_a_query(pg: PostgreSQL, alias: str, act: Callable[[], None]) -> Iterator[Any]:
    """Call `act` during a query that is slow on this replica only."""
    running = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%WHEN%pg_sleep(30)%FROM app_book%'"

    def wait_and_act() -> None:
        if eventually(lambda: pg[alias].execute(f"{running} AND pid != pg_backend_pid()")):
            act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield Book.objects.raw(SLOW_HERE, [pg[alias].port])
    thread.join()


def test_replica_shuts_down_during_a_query(one_book: PostgreSQL) -> None:
    with unrelated_scope():
        first = server()
        with during_a_query(one_book, first, lambda: one_book[first].stop("fast")) as books:
            assert [book.title for book in books] == ["one"]
        assert server() == OTHER[first]


def test_query_that_conflicts_with_recovery_fails_over(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    """The snapshot needs rows that the primary has vacuumed: 40001."""
    for alias in REPLICAS:
        one_book[alias].execute("ALTER SYSTEM SET max_standby_streaming_delay = 0")
        one_book[alias].execute("SELECT pg_reload_conf()")

    def vacuum() -> None:
        for sql in (
            "INSERT INTO app_tag (name) VALUES ('x')",
            "DELETE FROM app_tag",
            "VACUUM (FREEZE) app_tag",
        ):
            one_book["pg"].execute(sql, database="site")

    try:
        with unrelated_scope():
            first = server()
            with during_a_query(one_book, first, vacuum) as books:
                assert [book.title for book in books] == ["one"]
            assert server() == first
    finally:
        for alias in REPLICAS:
            one_book[alias].execute("ALTER SYSTEM RESET max_standby_streaming_delay")
            one_book[alias].execute("SELECT pg_reload_conf()")
    (rerun,) = sent_signals.of("read_retried")
    assert (rerun["failed"], rerun["served"]) == (first, OTHER[first])
    assert "conflict with recovery" in str(rerun["error"])
    assert sent_signals.of("replica_removed") == []


def test_terminated_connection_leaves_its_replica_in_rotation(one_book: PostgreSQL) -> None:
    for _ in range(5):
        one_book.terminate("pg1")
        one_book.terminate("pg2")
        assert {server_for(None) for _ in range(2)} == REPLICAS
    assert pool().replica_set.out_of_rotation == frozenset()


# Server-side cursors


def is_server_side(cursor: Any) -> bool:
    return hasattr(cursor.cursor, "name")


@pytest.mark.parametrize("is_unreachable", [True, False])
def test_moved_server_side_cursor_follows_the_settings_of_its_new_alias(
    pg: PostgreSQL, is_unreachable: bool
) -> None:
    """DISABLE_SERVER_SIDE_CURSORS is set where a pooler would lose them."""
    write("one")
    pg.wait_for()
    with (
        Forwarder(pg["pg1"]) as address,
        as_layout(
            pg,
            direct=database(address, conn_max_age=None),
            pooled=database(pg["pg2"], conn_max_age=None, DISABLE_SERVER_SIDE_CURSORS=True),
        ),
        unrelated_scope(),
    ):
        if not is_unreachable:
            connections["direct"].ensure_connection()
        address.stop()
        with connections["direct"].chunked_cursor() as cursor:
            cursor.execute("SELECT title FROM app_book")
            assert (cursor.db.alias, is_server_side(cursor)) == ("pooled", False)
            assert cursor.fetchall() == [("one",)]


def test_server_side_cursor_of_a_test_mirror_follows_the_settings_of_the_primary(
    pg: PostgreSQL,
) -> None:
    mirror = database(pg["pg"], DISABLE_SERVER_SIDE_CURSORS=True)
    with (
        as_layout(pg, mirror=mirror),
        unrelated_scope(),
        connections["mirror"].chunked_cursor() as cursor,
    ):
        assert (cursor.db.alias, is_server_side(cursor)) == ("site", True)


# Statements that are not retried


def test_statement_timeout_is_not_retried(one_book: PostgreSQL, sent_signals: SentSignals) -> None:
    for alias in REPLICAS:
        connections[alias].close()
        connections.settings[alias]["OPTIONS"]["options"] = "-c statement_timeout=20"
    sent_signals.clear()
    with unrelated_scope(), pytest.raises(OperationalError, match="statement timeout"):
        list(Book.objects.raw("SELECT id, pg_sleep(10)::text FROM app_book"))
    assert sent_signals == []


def test_invalid_query_is_not_retried(one_book: PostgreSQL, sent_signals: SentSignals) -> None:
    with unrelated_scope(), pytest.raises(Exception, match="division by zero"):
        list(Book.objects.raw("SELECT 1/0 AS id"))
    assert sent_signals == []


def test_statement_in_a_transaction_on_the_replica_is_not_retried(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    with (  # noqa: PT012
        unrelated_scope(),
        pytest.raises(OperationalError),
        transaction.atomic(using="pg1"),
    ):
        assert Book.objects.using("pg1").count() == 1
        one_book.terminate("pg1")
        Book.objects.using("pg1").count()
    assert sent_signals.of("read_retried") == []
    assert Book.objects.using("pg1").count() == 1


@pytest.mark.parametrize("setting", [False, True])
def test_raw_transaction_stays_on_a_replica_that_leaves_the_rotation(
    one_book: PostgreSQL, setting: bool
) -> None:
    connection = connections["pg1"]
    connection.ensure_connection()
    assert probe(connection) is not None
    with unrelated_scope(), connection.cursor() as cursor:
        if setting:
            connection.set_autocommit(False)
        else:
            cursor.execute("BEGIN")
        cursor.execute("SELECT 1")
        state = state_of(connection)
        assert state.server is not None
        registry.set_status(state.server, Fault.LAG, 1000, "by the test")
        cursor.execute("SELECT 2")
        assert (cursor.fetchone(), cursor.db.alias) == ((2,), "pg1")
        cursor.execute("ROLLBACK")
        if setting:
            connection.set_autocommit(True)


def test_replica_whose_session_cannot_be_set_up_serves_no_read(one_book: PostgreSQL) -> None:
    failed: list[str] = []
    prepared: list[Any] = []

    def set_up(connection: Any, **kwargs: Any) -> None:
        is_own = getattr(connection, "is_dedicated", False)
        if connection.alias in REPLICAS and not is_own and not failed:
            failed.append(connection.alias)
            raise OperationalError("canceling statement due to statement timeout")
        prepared.append(connection.connection)

    for alias in REPLICAS:
        connections[alias].close()
    connection_created.connect(set_up)
    try:
        for _ in range(4):
            with unrelated_scope():
                assert READS["list"]() == ["one"]
                assert connections[server()].connection in prepared
    finally:
        connection_created.disconnect(set_up)
    assert failed


def test_transaction_is_not_started_on_another_server(one_book: PostgreSQL) -> None:
    """A transaction on a replica is not moved to the primary."""
    one_book["pg1"].stop("immediate")
    connections["pg1"].close()
    with unrelated_scope(), pytest.raises(OperationalError), transaction.atomic(using="pg1"):
        Book.objects.using("pg1").count()


@pytest.mark.parametrize("down", ["error", "stale"])
def test_write_is_never_retried(one_book: PostgreSQL, sent_signals: SentSignals, down: str) -> None:
    with override_settings(PINNING_PRIMARY_DOWN=down), unrelated_scope():
        Book.objects.create(title="two")
        one_book.terminate("pg")
        with pytest.raises(OperationalError):
            Book.objects.create(title="lost")
        connections["pg"].close()
    assert sent_signals.of("read_retried") == []
    assert one_book["pg"].execute("SELECT count(*) FROM app_book", database="site") == [(2,)]


@pytest.mark.parametrize("down", ["error", "stale"])
def test_locking_read_is_never_retried(
    one_book: PostgreSQL, sent_signals: SentSignals, down: str
) -> None:
    with override_settings(PINNING_PRIMARY_DOWN=down), unrelated_scope():
        connections["pg"].ensure_connection()
        one_book.terminate("pg")
        with (
            pytest.raises(OperationalError),
            connections["pg"].cursor() as cursor,
        ):
            cursor.execute("SELECT * FROM app_book FOR UPDATE")
        connections["pg"].close()
    assert sent_signals.of("read_retried") == []


def test_error_of_an_explicit_primary_read_propagates(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    """A function that writes, and that the package does not know, must not run twice."""
    with unrelated_scope():
        pin_this_request()
        assert READS["list"]() == ["one"]
        one_book.terminate("pg")
        with pytest.raises(OperationalError):
            READS["list"]()
        connections["pg"].close()
        assert READS["list"]() == ["one"]
    assert sent_signals == []


# Writes are still rejected


def test_write_on_a_replica_that_is_down_is_rejected(one_book: PostgreSQL) -> None:
    """Also if the cursor belongs to the primary."""
    for alias in REPLICAS:
        one_book[alias].stop("immediate")
        connections[alias].close()
    with unrelated_scope():
        with pytest.raises(ReplicaWriteError):
            Book.objects.using("pg1").update(title="lost")
        with pytest.raises(ReplicaWriteError), connections["pg1"].cursor() as cursor:
            cursor.execute("INSERT INTO app_book (title) VALUES ('lost')")
        with pytest.raises(ReplicaWriteError), connections["pg1"].cursor() as cursor:
            cursor.executemany("INSERT INTO app_book (title) VALUES (%s)", [("lost",)])
        with pytest.raises(ReplicaWriteError), connections["pg1"].cursor() as cursor:
            cursor.copy("COPY app_book FROM STDIN")
        with pytest.raises(ReplicaWriteError), connections["pg1"].cursor() as cursor:
            cursor.callproc("now")
        assert Book.objects.using("pg1").count() == 1
    assert one_book["pg"].execute("SELECT title FROM app_book", database="site") == [("one",)]


def test_cursor_that_failed_over_still_rejects_writes(one_book: PostgreSQL) -> None:
    with unrelated_scope(), connections["pg1"].cursor() as cursor:
        cursor.execute("SELECT title FROM app_book")
        for alias in REPLICAS:
            one_book[alias].stop("immediate")
        cursor.execute("SELECT title FROM app_book")
        assert cursor.fetchall() == [("one",)]
        with pytest.raises(ReplicaWriteError):
            cursor.execute("DELETE FROM app_book")
    assert one_book["pg"].execute("SELECT title FROM app_book", database="site") == [("one",)]


# Pinned reads


def test_pinned_read_is_not_retried_on_a_replica_behind(one_book: PostgreSQL) -> None:
    one_book.pause("pg2")
    token = write("two")
    one_book.wait_for("pg1")
    with unrelated_scope(token):
        assert server() == "pg1"
        one_book["pg1"].stop("immediate")
        assert READS["values_list"]() == ["one", "two"]
        assert server() == "pg"
    assert [titles(token) for _ in range(4)] == [["one", "two"]] * 4


def test_pinned_read_is_retried_on_a_caught_up_replica(one_book: PostgreSQL) -> None:
    token = write("two")
    one_book.wait_for()
    with unrelated_scope(token):
        first = server()
        one_book[first].stop("immediate")
        assert READS["values_list"]() == ["one", "two"]
        assert server() == OTHER[first]


def test_pinned_read_with_a_conflict_uses_no_replica_behind(one_book: PostgreSQL) -> None:
    """Also on a server that the read failed over to."""
    one_book.pause("pg2")
    token = write("two")
    one_book.wait_for("pg1")
    with unrelated_scope(token):
        assert server() == "pg1"
    one_book["pg1"].stop("immediate")
    connections["pg1"].close()
    # An earlier request found it caught up, but it has failed since.
    assert [titles(token) for _ in range(3)] == [["one", "two"]] * 3


@pytest.mark.parametrize("lost", ["terminated", "restarted"])
def test_pinned_read_probes_a_new_connection(one_book: PostgreSQL, lost: str) -> None:
    """The server may have restarted, with an older replay position."""
    one_book["pg1"].execute("CHECKPOINT")
    one_book.pause("pg2")
    token = write("two")
    one_book.wait_for("pg1")
    with unrelated_scope(token):
        assert server() == "pg1"
        if lost == "terminated":
            one_book.terminate("pg1")
            assert server() == "pg1"
        else:
            one_book["pg1"].set_delay(3600)
            try:
                one_book["pg1"].restart("immediate")
                assert READS["values_list"]() == ["one", "two"]
                assert server() == "pg"
            finally:
                one_book["pg1"].set_delay(0)
        assert READS["values_list"]() == ["one", "two"]


def test_pinned_read_probes_a_new_connection_of_a_failover_candidate(one_book: PostgreSQL) -> None:
    """It had caught up, and was restarted; then the current replica failed."""
    one_book["pg2"].execute("CHECKPOINT")
    token = write("two")
    one_book.wait_for()
    probe_replicas()
    one_book["pg2"].set_delay(3600)
    try:
        one_book["pg2"].restart("immediate")
        connections["pg2"].close()
        with unrelated_scope(token):
            choose("pg1")
            assert server() == "pg1"
            one_book["pg1"].stop("immediate")
            assert READS["values_list"]() == ["one", "two"]
        connections["pg2"].close()
        assert titles(token) == ["one", "two"]
    finally:
        one_book["pg2"].set_delay(0)


def test_connection_lost_during_a_probe(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cursor opened before belongs to the lost connection."""
    token = write("two")
    one_book.wait_for()
    identify, lost = Dialect.identify, []

    def lose(self: Any, *args: Any) -> Any:
        if not lost:
            lost.append(first)
            one_book.terminate(first)
        return identify(self, *args)

    with unrelated_scope(token):
        first = server()
        connections[first].close()
        monkeypatch.setattr(Dialect, "identify", lose)
        assert READS["values_list"]() == ["one", "two"]
        assert server() == first
    assert lost == [first]


def test_connection_closed_at_the_first_probe_is_reopened(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, sent_signals: SentSignals
) -> None:
    token = write("two")
    one_book.wait_for()
    for alias in REPLICAS:
        connections[alias].close()
    identify, lost = Dialect.identify, []

    def lose(self: Any, query: Any, driver: tuple[str, int], strategy: Any) -> Any:
        if not lost:
            lost.append(alias_of_port(driver[1]))
            one_book.terminate(lost[0])
        return identify(self, query, driver, strategy)

    monkeypatch.setattr(Dialect, "identify", lose)
    with unrelated_scope(token):
        assert server() == lost[0]
    assert sent_signals.of("replica_removed") == []


def test_connection_closed_while_connecting_is_retried(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, sent_signals: SentSignals
) -> None:
    connect, lost = DatabaseWrapper.get_new_connection, []

    def lose(self: DatabaseWrapper, params: Any) -> Any:
        raw = connect(self, params)
        if not lost:
            lost.append(self.alias)
            one_book.terminate(self.alias)
            raw.execute("SELECT 1")
        return raw

    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", lose)
    for alias in REPLICAS:
        connections[alias].close()
        del connections[alias]
    with unrelated_scope():
        assert server() == lost[0]
    assert sent_signals.of("replica_removed") == []


def test_closed_pool_connections_leave_their_replica_in_rotation(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    """The pool returns each of its closed connections in turn."""
    replica = one_book["pg1"]
    with as_layout(one_book, r1=pooled(replica)):
        kept = connections["r1"].pool  # type: ignore[attr-defined]
        kept.open()
        for raw in [kept.getconn() for _ in range(12)]:
            kept.putconn(raw)
        one_book.terminate("pg1")
        assert [port_for(None) for _ in range(12)] == [replica.port] * 12
        token = write("two")
        one_book.wait_for()
        one_book.terminate("pg1")
        assert port_for(token) == replica.port
    assert sent_signals.of("replica_removed") == []


def servers_of_a_terminated_read() -> list[str]:
    """Run a read that ends its own session; return the aliases that ran it, the first included."""
    ran: list[str] = []

    def recording(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        ran.append(context["cursor"].db.alias)
        return execute(sql, params, many, context)

    alias = Book.objects.db
    with (
        connections[alias].execute_wrapper(recording),
        connections[alias].cursor() as cursor,
        pytest.raises(OperationalError),
    ):
        cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert ran[0] == alias
    return ran


def test_terminated_read_is_retried_a_limited_number_of_times(one_book: PostgreSQL) -> None:
    """The read may be the cause: retried once on the same server, once on another."""
    for alias in ("pg", *REPLICAS):
        connections[alias].close()
    with unrelated_scope():
        first, *retries = servers_of_a_terminated_read()
    assert retries == [first, OTHER[first], "pg"]


def test_read_that_is_ended_while_it_runs_leaves_its_servers_in_rotation(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, sent_signals: SentSignals
) -> None:
    """As by an administrator, or by a proxy with a timeout."""
    monkeypatch.setattr(read_errors, "RETRY_IF_FAILED_WITHIN", 0.0)
    with unrelated_scope():
        first, *retries = servers_of_a_terminated_read()
    assert retries == [OTHER[first], "pg"]
    assert sent_signals.of("replica_removed") == []


# Unresponsive replicas


class Attempts(NamedTuple):
    """The aliases of attempted connections."""

    by_requests: list[str]
    by_monitors: list[str]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Record attempts to connect."""
    made = Attempts([], [])
    connect = BoundedConnect.connect

    def recording(self: Any) -> None:
        is_watcher = threading.current_thread().name.startswith("pinning-monitor")
        (made.by_monitors if is_watcher else made.by_requests).append(self.alias)
        connect(self)

    monkeypatch.setattr(BoundedConnect, "connect", recording)
    for alias in ("pg", *pool().replicas):
        # Existing wrappers have a reference to the original method.
        connections[alias].close()
        del connections[alias]
    return made


@pytest.fixture
def unresponsive(one_book: PostgreSQL) -> Iterator[PostgreSQL]:
    """Make `pg1` a socket that accepts no connections."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        connections["pg1"].close()
        connections.settings["pg1"]["PORT"] = str(listening.getsockname()[1])
        yield one_book


def test_unresponsive_replica_is_skipped(
    unresponsive: PostgreSQL, attempts: Attempts, sent_signals: SentSignals
) -> None:
    connections["pg2"].ensure_connection()
    attempts.by_requests.clear()
    assert [titles() for _ in range(6)] == [["one"]] * 6
    assert attempts.by_requests.count("pg1") == 1
    assert sent_signals.of("replica_removed") == [
        {"sender": "pg", "replica": "pg1", "reason": "unreachable", "seconds": 10.0}
    ]
    # With the jitter, up to 12.5 s.
    assert 7.0 < endpoint("pg1").retry_at - time.monotonic() < 12.5


def test_unresponsive_replica_is_not_retried_by_requests(
    unresponsive: PostgreSQL, attempts: Attempts, sent_signals: SentSignals
) -> None:
    mark_unreachable("pg1")
    attempts.by_monitors.clear()
    make_retry_due("pg1")
    # By its monitor, which receives no reply either.
    assert eventually(lambda: "pg1" in attempts.by_monitors)
    assert [titles() for _ in range(4)] == [["one"]] * 4
    assert eventually(lambda: endpoint("pg1").retry_at > time.monotonic() + 5)
    assert "pg1" not in attempts.by_requests
    assert len(sent_signals.of("replica_removed")) == 1


def test_scope_that_selected_an_unresponsive_replica_does_not_connect(
    unresponsive: PostgreSQL, attempts: Attempts
) -> None:
    """Another request has detected it in the meantime."""
    with unrelated_scope():
        while Book.objects.db != "pg1":
            choose(None)
        chosen = Book.objects.all()
        mark_unreachable("pg1")
        assert [book.title for book in chosen.using("pg1")] == ["one"]
        assert READS["list"]() == ["one"]
    assert "pg1" not in attempts.by_requests


def test_pinned_requests_do_not_wait_for_an_unresponsive_replica(
    unresponsive: PostgreSQL, attempts: Attempts
) -> None:
    unresponsive.pause("pg2")
    token = write("two")
    assert [titles(token) for _ in range(5)] == [["one", "two"]] * 5
    assert attempts.by_requests.count("pg1") == 1


def test_connect_timeout_applies(pg: PostgreSQL) -> None:
    assert connections["pg1"].get_connection_params()["connect_timeout"] == 2
    assert "connect_timeout" not in connections["pg"].get_connection_params()
    connections.settings["pg2"]["OPTIONS"]["connect_timeout"] = 7
    assert connections["pg2"].get_connection_params()["connect_timeout"] == 7


# Replica aliases of the primary


def test_replica_alias_of_the_primary_is_treated_as_the_primary(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    connections["pg1"].close()
    connections.settings["pg1"].update(
        HOST="localhost", PORT=connections.settings["pg"]["PORT"], OPTIONS={"sslmode": "disable"}
    )
    # Its port is that of the primary.
    assert {server_for(None) for _ in range(4)} == REPLICAS
    one_book.pause("pg2")
    token = write("two")
    assert [titles(token) for _ in range(4)] == [["one", "two"]] * 4
    assert sent_signals.of("replica_removed") == []


# Transactions that the code begins by a statement


RAW_TRANSACTIONS = {
    "a statement timeout": (
        "SET LOCAL statement_timeout = 50",
        "SELECT pg_sleep(10)",
        "statement timeout",
    ),
    "the end of its session": (
        "SELECT 1",
        "SELECT pg_terminate_backend(pg_backend_pid())",
        "terminating connection",
    ),
}


@pytest.mark.parametrize("case", RAW_TRANSACTIONS)
@pytest.mark.parametrize("alias", ["pg", "pg1"])
@pytest.mark.parametrize("down", ["error", "stale"])
def test_error_in_a_raw_transaction_is_raised(
    one_book: PostgreSQL, down: str, alias: str, case: str
) -> None:
    """On another connection the rest of the transaction would be lost, or see another snapshot."""
    first, read, error = RAW_TRANSACTIONS[case]
    with (
        override_settings(PINNING_PRIMARY_DOWN=down),
        unrelated_scope(),
        connections[alias].cursor() as cursor,
    ):
        cursor.execute("BEGIN")
        if alias == "pg":
            cursor.execute("UPDATE app_book SET title = 'changed'")
        cursor.execute(first)
        with pytest.raises(OperationalError, match=error):
            cursor.execute(read)
        assert cursor.db.alias == alias
    connections[alias].close()
    with unrelated_scope():
        assert not Book.objects.using("pg").filter(title="changed").exists()


# The primary is down


@pytest.fixture
def stale() -> Iterator[None]:
    with override_settings(PINNING_PRIMARY_DOWN="stale"):
        yield


def test_error_of_the_primary_propagates_to_a_pinned_read(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    one_book.pause()
    token = write("two")
    one_book["pg"].stop("immediate")
    for _ in range(2):
        with unrelated_scope(token), pytest.raises(OperationalError):
            READS["list"]()
    connections["pg"].close()
    with unrelated_scope(token), pytest.raises(OperationalError):
        READS["list"]()
    assert {server_for(None) for _ in range(4)} == REPLICAS
    assert "primary_down" not in [one["reason"] for one in sent_signals.of("fell_back_to_primary")]


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("connected", [True, False])
def test_freshest_replica_substitutes_the_primary(
    one_book: PostgreSQL,
    sent_signals: SentSignals,
    caplog: pytest.LogCaptureFixture,
    connected: bool,
) -> None:
    one_book.pause("pg1")
    with unrelated_scope():
        Book.objects.create(title="two")
    one_book.wait_for("pg2")
    one_book.pause("pg2")
    token = write("three")
    one_book["pg"].stop("immediate")
    if not connected:
        connections["pg"].close()
    with unrelated_scope(token):
        assert READS["values_list"]() == ["one", "two"]
        assert server() == "pg2"
        assert READS["list"]() == ["one", "two"]
    said = sent_signals.of("fell_back_to_replica")
    assert {"sender": "pg", "served": "pg2", "reason": "primary_down"} in said
    assert "pg2" in caplog.text
    assert [one["replica"] for one in sent_signals.of("replica_removed")] == []


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("pin", ["method", "by hand", "token"])
def test_every_pinned_read_of_a_scope_fails_over(
    one_book: PostgreSQL, connected: bool, pin: str, act_in: Any
) -> None:
    one_book.pause()
    token = write("two")
    connections["pg"].ensure_connection()
    one_book["pg"].stop("immediate")
    if not connected:
        connections["pg"].close()
    assert act_in(pin, token, lambda: [READS["values_list"]() for _ in range(3)]) == [["one"]] * 3


@pytest.fixture
def act_in(do: Callable[..., str]) -> Callable[..., Any]:
    """Return a function that runs an action in a scope with this kind of pin."""
    from django.test import Client

    def run(pin: str, token: str, action: Callable[[], Any]) -> Any:
        if pin == "method":
            results: list[Any] = []
            Client().post(f"/sync/{do(lambda request: results.append(action()))}/")
            return results[0]
        with unrelated_scope(token if pin == "token" else None):
            if pin == "by hand":
                pin_this_request()
            return action()

    return run


@pytest.mark.usefixtures("stale")
def test_lost_connection_does_not_mark_the_primary_down(
    one_book: PostgreSQL, sent_signals: SentSignals
) -> None:
    one_book.pause()
    with unrelated_scope():
        Book.objects.create(title="two")
        one_book.terminate("pg")
        assert READS["values_list"]() == ["one", "two"]
        assert server() == "pg"
    assert sent_signals.of("fell_back_to_primary") == []


@pytest.mark.usefixtures("stale")
def test_read_of_the_primary_that_is_ended_while_it_runs_has_no_substitute(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, sent_signals: SentSignals
) -> None:
    monkeypatch.setattr(read_errors, "RETRY_IF_FAILED_WITHIN", 0.0)
    with (
        unrelated_scope(),
        use_primary(),
        connections["pg"].cursor() as cursor,
        pytest.raises(OperationalError, match="terminating connection"),
    ):
        cursor.execute(
            "SELECT pg_terminate_backend(pg_backend_pid()) WHERE NOT pg_is_in_recovery()"
        )
    connections["pg"].close()
    assert sent_signals.of("fell_back_to_replica") == []


@pytest.mark.usefixtures("stale")
def test_write_is_tried_while_the_primary_is_marked_down(one_book: PostgreSQL) -> None:
    connections["pg"].close()
    mark_unreachable("pg")
    with unrelated_scope():
        Book.objects.create(title="two")
    connections["pg"].close()
    assert one_book["pg"].execute("SELECT count(*) FROM app_book", database="site") == [(2,)]


@pytest.mark.usefixtures("stale")
def test_connect_timeout_applies_to_a_primary_with_a_substitute(pg: PostgreSQL) -> None:
    assert connections["pg"].get_connection_params()["connect_timeout"] == 2


@pytest.mark.usefixtures("stale")
def test_error_of_the_primary_propagates_to_writes(one_book: PostgreSQL) -> None:
    one_book["pg"].stop("immediate")
    connections["pg"].close()
    with unrelated_scope() as scope:
        with pytest.raises(OperationalError):
            Author.objects.create(name="lost")
        assert READS["list"]() == ["one"]
        assert READS["list"]() == ["one"]
    assert scope.token is None or scope.token


@pytest.mark.parametrize("primary_down", ["error", "stale"])
def test_replicas_restarted_while_the_primary_is_down_are_used(
    one_book: PostgreSQL, primary_down: str
) -> None:
    """Without a primary their timeline is unknown, which is enough for unpinned reads."""
    with override_settings(PINNING_PRIMARY_DOWN=primary_down):
        wanted = position_in(write("two"))
        one_book.wait_for()
        probe_replicas()
        one_book["pg"].stop("immediate")
        for alias in REPLICAS:
            one_book[alias].restart("fast")

        def served() -> str:
            try:
                return server_for(None)
            except OperationalError:
                return "nobody"

        assert eventually(lambda: {served() for _ in range(4)} == REPLICAS)
        replicas = pool().replica_set
        order = replicas.rotation.order()
        assert replicas.find_caught_up(order, Position(wanted), probe=True) is None


@pytest.mark.usefixtures("stale")
def test_recovered_primary_is_used(one_book: PostgreSQL, attempts: Attempts) -> None:
    one_book.pause()
    token = write("two")
    one_book["pg"].stop("immediate")
    connections["pg"].close()
    attempts.by_requests.clear()
    assert [titles(token) for _ in range(20)] == [["one"]] * 20
    assert attempts.by_requests.count("pg") <= 4
    one_book["pg"].start()
    assert eventually(lambda: titles(token) == ["one", "two"])


@pytest.mark.usefixtures("stale")
def test_error_of_the_primary_propagates_with_all_servers_down(one_book: PostgreSQL) -> None:
    token = write("two")
    for alias in ("pg", "pg1", "pg2"):
        one_book[alias].stop("immediate")
        connections[alias].close()
    with unrelated_scope(token), pytest.raises(OperationalError) as caught:
        READS["list"]()
    assert str(one_book["pg"].port) in str(caught.value)


# Locks


def test_no_lock_is_held_during_database_calls(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, sent_signals: SentSignals
) -> None:
    locked: list[str] = []
    connect, execute = DatabaseWrapper.get_new_connection, CursorWrapper._execute  # type: ignore[attr-defined]
    asked: list[str] = []

    def connecting(self: Any, params: Any) -> Any:
        asked.append("connect")
        if registry._lock.locked():
            locked.append(f"connecting {self.alias}")
        return connect(self, params)

    def executing(self: Any, sql: str, *args: Any) -> Any:
        asked.append(sql)
        if registry._lock.locked():
            locked.append(sql)
        return execute(self, sql, *args)

    def receive(**kwargs: Any) -> None:
        if registry._lock.locked():
            locked.append(str(kwargs["signal"]))

    from pinning_middleware import signals

    told = [getattr(signals, name) for name in signals.__all__]
    for signal in told:
        signal.connect(receive)
    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", connecting)
    monkeypatch.setattr(CursorWrapper, "_execute", executing)
    try:
        with override_settings(PINNING_MAX_LAG=0.001, PINNING_WAIT=0.01, PINNING_RETRY_AFTER=0):
            one_book.pause()
            token = write("two")
            for _ in range(4):
                titles(token)
                titles()
                with use_replica(max_lag=0.001):
                    server()
            one_book.resume()
            one_book["pg1"].stop("immediate")
            for _ in range(4):
                titles(token)
                titles()
            one_book["pg1"].start()
            probe_replicas()
    finally:
        for signal in told:
            signal.disconnect(receive)
    assert locked == []
    assert len(asked) > 10
    told_of = {name for name, _ in sent_signals}
    assert {"fell_back_to_primary", "replica_removed", "replica_wait_finished"} <= told_of
