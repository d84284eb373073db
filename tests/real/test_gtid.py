"""Positions, lag and failover on MariaDB and MySQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from django.db import OperationalError, ProgrammingError, connections, transaction
from django.db.backends.mysql.base import DatabaseWrapper
from django.db.backends.signals import connection_created
from django.test import Client, override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import use_replica
from pinning_middleware.backend.read_timeouts import answers_probe
from pinning_middleware.exceptions import ReplicaWriteError
from pinning_middleware.servers import blocked_reads
from pinning_middleware.servers.budget import READ_BUDGET, read_budget
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects.mysql import MySQL
from tests.app.models import Book
from tests.conftest import Visit

from .conftest import (
    SentSignals,
    alias_of_port,
    endpoint,
    eventually,
    in_thread,
    make_retry_due,
    pin_in,
    pool,
    position_in,
    probe_replicas,
    queries,
    server,
    server_for,
    server_of,
    titles,
    unrelated_scope,
    write,
)
from .mariadb import Servers

pytestmark = pytest.mark.real

REPLICAS = {"my1", "my2"}
OTHER = {"my1": "my2", "my2": "my1"}


def create(request: Any = None) -> None:
    Book.objects.create(title="new")


def read(request: Any = None) -> tuple[str, list[str]]:
    return server(), sorted(Book.objects.values_list("title", flat=True))


# Positions


def test_pin_contains_a_position(my: Servers) -> None:
    assert position_in(write()) == my["my"].written


def test_position_is_read_after_the_commit(my: Servers) -> None:
    with unrelated_scope() as scope:
        with transaction.atomic(using="my"):
            create()
            assert pin_in(scope.token).position is None
        assert position_in(scope.token) == my["my"].written


def test_reads_use_the_primary_until_one_replica_has_caught_up(my: Servers, visit: Visit) -> None:
    my.pause()
    visit(create)
    assert [visit(read) for _ in range(3)] == [("my", ["new"])] * 3
    my.resume("my2")
    # It is probed at growing pauses while it is behind.
    assert eventually(lambda: visit(read) == ("my2", ["new"]))
    assert [visit(read) for _ in range(4)] == [("my2", ["new"])] * 4
    my.resume("my1")
    probe_replicas()
    assert {visit(read)[0] for _ in range(4)} == REPLICAS


def test_writes_are_always_visible(my: Servers) -> None:
    for number in range(100):
        token = write(f"book {number}")
        with unrelated_scope(token):
            assert Book.objects.filter(title=f"book {number}").exists()


@pytest.mark.usefixtures("untracked")
def test_number_of_added_queries(my: Servers, browser: Any, do: Callable[..., str]) -> None:
    r, w = (f"/sync/{do(act)}/" for act in (lambda request: Book.objects.count(), create))

    def added(address: str) -> int:
        with queries() as asked:
            browser.get(address)
        return len(asked.added)

    write()
    probe_replicas()
    assert [added(r) for _ in range(2)] == [0, 0]
    assert added(w) == 1
    my.wait_for()
    assert [added(r) for _ in range(3)] == [1, 0, 0]


def test_position_in_a_token_is_honoured_for_a_day(
    my: Servers, clock: FrozenDateTimeFactory
) -> None:
    my.pause()
    token = write()
    clock.tick(86_399)
    assert server_for(token) == "my"
    clock.tick(2)
    assert server_for(token) in REPLICAS


def test_thread_without_a_scope(my: Servers) -> None:
    """Its write pins it to the primary for the window."""
    my.pause()
    assert in_thread(lambda: (create(), server())[1]) == "my"


def test_atomic_requests(my: Servers, do: Callable[..., str]) -> None:
    connections.settings["my"]["ATOMIC_REQUESTS"] = True
    client, results = Client(), []

    def act(request: Any) -> None:
        results.extend([server(), create(), server()])

    client.get(f"/sync/{do(act)}/")
    assert results[0] in REPLICAS
    assert results[2] == "my"
    token = client.cookies["pinning"].value
    assert position_in(token) == my["my"].written


# Waiting


@override_settings(PINNING_WAIT=0.05)
def test_wait_times_out(my: Servers, sent_signals: SentSignals) -> None:
    my.pause()
    token = write()
    with unrelated_scope(token):
        assert [read(), read()] == [("my", ["new"])] * 2
    (waited,) = sent_signals.of("replica_wait_finished")
    assert not waited["reached"]


def test_unexpected_error_of_a_probe_is_logged_once(
    my: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for product in ("mariadb", "mysql"):
        monkeypatch.setitem(MySQL.REPORT, product, "no_such_function()")
    for _ in range(2):
        token = write()
        assert position_in(token) is None
        assert server_for(token) == "my"
    (message,) = [text for text in caplog.messages if "unexpected error" in text]
    assert message.startswith("my refuses the probe for its replication position")
    assert "1305" in message


# Promotion


def test_promotion_that_lost_a_commit(own: Servers) -> None:
    write("kept")
    own.wait_for()
    probe_replicas()
    for alias in REPLICAS:
        own[alias].execute(f"STOP {own[alias].REPLICA}")
    lost = write("lost")
    own["my"].stop()
    own["my1"].promote()
    own["my2"].follow(own["my1"])
    for number in range(3):
        own["my1"].execute(f"INSERT INTO app_book (title) VALUES ('{number}')", "site")
    own["my2"].wait_for(own["my1"].position)

    # Before the switch of the site: no server has the commit, and the primary is down.
    for _ in range(2):
        with unrelated_scope(lost), pytest.raises(OperationalError):
            server()
    assert pool().replica_set.out_of_rotation == {"my1"}
    assert endpoint("my1").out_of_rotation == "promoted"

    # After the switch: `my` is the promoted server now.
    connections["my"].close()
    connections.settings["my"]["PORT"] = connections.settings["my1"]["PORT"]
    connections["my1"].close()
    with override_settings(PINNING_REPLICAS={"my": ["my2"]}, PINNING_WAIT=0.02):
        assert [server_for(lost) for _ in range(3)] == ["my"] * 3
        token = write("new")
        assert position_in(token).items() >= own["my1"].written.items()
        assert eventually(lambda: server_for(token) == "my2")
        with unrelated_scope(lost) as scope:
            create()
        assert server_for(scope.token) == "my"


@pytest.mark.parametrize("are_replicas_reset", [True, False])
def test_log_that_was_reset_begins_a_new_history(own: Servers, are_replicas_reset: bool) -> None:
    """Its numbers are lower than those that the replicas have reported before."""
    for number in range(5):
        token = write(f"book {number}")
    own.wait_for()
    probe_replicas()
    assert server_for(token) in REPLICAS
    for alias in REPLICAS:
        own[alias].execute(f"STOP {own[alias].REPLICA}")
    own["my"].reset_log()
    if are_replicas_reset:
        for alias in REPLICAS:
            own[alias].reset_log()
            own[alias].follow(own["my"])
    own.pause()
    token = write("new")
    assert [server_for(token) for _ in range(20)] == ["my"] * 20
    if are_replicas_reset:
        own.resume()
        for alias in REPLICAS:
            # A MariaDB without any GTID had no position.
            server_of(alias).retry_position_at = time.monotonic()
        assert eventually(lambda: server_for(token) in REPLICAS)


@override_settings(PINNING_CONSISTENCY="monotonic-reads")
def test_monotonic_reads_after_two_promotions_use_replicas(own: Servers) -> None:
    """The logs of two servers are in use then."""
    write("one")
    own.wait_for()
    for primary, former in (("my1", "my"), ("my", "my1")):
        own[former].execute(f"SET GLOBAL {own[former].READ_ONLY} = 1")
        own[primary].wait_for(own[former].position)
        own[primary].promote()
        own[former].demote(own[primary])
        own["my2"].follow(own[primary])
        own[primary].execute("INSERT INTO app_book (title) VALUES ('other')", "site")
    own.wait_for()
    for alias in ("my", *REPLICAS):
        connections[alias].close()
    token: str | None = write("two")
    own.wait_for()
    found = []
    for _ in range(12):
        with unrelated_scope(token) as scope:
            found.append(server())
        token = scope.token
    assert set(found) <= REPLICAS


# Failover


def test_killed_connection_is_retried(one_book: Servers, sent_signals: SentSignals) -> None:
    with unrelated_scope():
        first = server()
        one_book.terminate(first)
        assert read() == (first, ["one"])
    assert sent_signals.of("read_retried") == []
    assert sent_signals.of("replica_removed") == []


@pytest.mark.parametrize("chunked", [False, True])
def test_failed_server_fails_over(
    one_book: Servers, sent_signals: SentSignals, chunked: bool
) -> None:
    with unrelated_scope():
        first = server()
        one_book[first].stop()
        books = Book.objects.values_list("title", flat=True)
        assert list(books.iterator(chunk_size=1) if chunked else books) == ["one"]
        assert server() == OTHER[first]
    assert sent_signals.of("read_retried")[0]["served"] == OTHER[first]
    assert sent_signals.of("replica_removed")[0]["reason"] == "unreachable"
    one_book[first].start()
    make_retry_due(first)
    assert eventually(lambda: server_for(None) == first)
    assert sent_signals.of("replica_restored") == [{"sender": "my", "replica": first}]


def test_server_that_fails_during_a_query_fails_over(one_book: Servers) -> None:
    running = (
        "SELECT count(*) FROM information_schema.processlist "
        "WHERE info LIKE '%SLEEP(30)%' AND id != connection_id()"
    )
    with unrelated_scope():
        first = server()
        port = one_book[first].port

        def stop() -> None:
            if eventually(lambda: one_book[first].execute(running)[0][0]):
                one_book[first].stop()

        thread = threading.Thread(target=stop)
        thread.start()
        sql = "SELECT id, title, IF(@@port = %s, SLEEP(30), 0) FROM app_book"
        assert [book.title for book in Book.objects.raw(sql, [port])] == ["one"]
        thread.join()


def test_both_replicas_down_fails_over_to_the_primary(one_book: Servers) -> None:
    with unrelated_scope():
        server()
        for alias in REPLICAS:
            one_book[alias].stop()
        assert read() == ("my", ["one"])
    assert titles() == ["one"]


def test_pinned_read_is_not_retried_on_a_replica_behind(one_book: Servers) -> None:
    one_book.pause("my2")
    token = write("two")
    one_book.wait_for("my1")
    with unrelated_scope(token):
        assert server() == "my1"
        one_book["my1"].stop()
        assert read() == ("my", ["one", "two"])


@pytest.fixture
def with_read_timeout(one_book: Servers) -> Servers:
    for alias in ("my", *REPLICAS):
        connections.settings[alias]["OPTIONS"]["read_timeout"] = 1
        connections[alias].close()
        del connections[alias]
    return one_book


def test_read_that_exceeds_read_timeout_is_not_retried(
    with_read_timeout: Servers, sent_signals: SentSignals
) -> None:
    """The server answers a probe, so the statement is slow. The server goes on with it."""
    running = (
        "SELECT count(*) FROM information_schema.processlist "
        "WHERE info LIKE '%SLEEP(60)%' AND id != connection_id()"
    )
    with unrelated_scope(), pytest.raises(OperationalError, match="2013"):
        list(Book.objects.raw("SELECT id, title FROM app_book WHERE SLEEP(60) = 0"))
    servers = [with_read_timeout[alias] for alias in ("my", *REPLICAS)]
    assert sum(server.execute(running)[0][0] for server in servers) == 1
    assert sent_signals == []
    assert not pool().replica_set.out_of_rotation
    for alias in REPLICAS:
        with_read_timeout.terminate(alias)


def test_frozen_server_is_unresponsive_after_read_timeout(
    with_read_timeout: Servers, sent_signals: SentSignals
) -> None:
    with unrelated_scope():
        first = server()
        with with_read_timeout[first].frozen():
            # The primary, if too little of the budget is left.
            assert read() in [(alias, ["one"]) for alias in (OTHER[first], "my")]
        assert sent_signals.of("replica_removed")[0]["reason"] == "unresponsive"
        assert [each["failed"] for each in sent_signals.of("read_retried")] == [first]


def test_time_of_a_read_that_a_frozen_server_did_not_answer_counts(
    with_read_timeout: Servers,
) -> None:
    """Otherwise each further frozen replica would be waited for as long again."""
    with unrelated_scope():
        first = server()
        error = OperationalError(2013, "Lost connection")
        read_budget.renew()
        with with_read_timeout[first].frozen():
            assert not answers_probe(connections[first], error, 1.0)
        assert read_budget.left <= READ_BUDGET - 1.0
        read_budget.renew()
        connections[OTHER[first]].ensure_connection()
        assert answers_probe(connections[OTHER[first]], error, 1.0)
        assert read_budget.left > READ_BUDGET - 1.0


def test_frozen_server_is_unresponsive_without_read_timeout(
    one_book: Servers, sent_signals: SentSignals
) -> None:
    with unrelated_scope():
        first = server()
        with one_book[first].frozen():
            # The primary, if too little of the budget is left.
            assert read() in [(alias, ["one"]) for alias in (OTHER[first], "my")]
        assert sent_signals.of("replica_removed")[0]["reason"] == "unresponsive"
        assert [each["failed"] for each in sent_signals.of("read_retried")] == [first]


def test_server_that_freezes_while_a_connection_is_set_up_is_abandoned(
    one_book: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django sends statements of its own, after the driver has connected."""
    first = server_for(None)
    connections[first].close()
    setting_up = DatabaseWrapper.init_connection_state
    with ExitStack() as stack:

        def freeze(self: Any) -> None:
            if self.alias == first and not self.is_dedicated and not frozen:
                frozen.append(stack.enter_context(one_book[first].frozen()))
            setting_up(self)

        frozen: list[object] = []
        monkeypatch.setattr(DatabaseWrapper, "init_connection_state", freeze)
        with connections[first].cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.db.alias != first
        assert frozen


def test_health_check_of_a_frozen_server_ends(one_book: Servers) -> None:
    """Django's check, with CONN_HEALTH_CHECKS."""
    first = server_for(None)
    with one_book[first].frozen():
        connections[first].health_check_enabled = True
        connections[first].health_check_done = False
        with connections[first].cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.db.alias != first
    connections[first].health_check_enabled = False


def test_threads_on_a_frozen_server_share_its_probes(
    one_book: Servers, sent_signals: SentSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []
    probe_afresh = blocked_reads.probe_afresh

    def counted(
        state: ConnectionState, seconds: float, session: int | None
    ) -> blocked_reads.ProbeOutcome:
        probed.append(state.alias)
        return probe_afresh(state, seconds, session)

    monkeypatch.setattr(blocked_reads, "probe_afresh", counted)
    ready, found = threading.Barrier(5), []

    def work(first: str) -> None:
        try:
            with use_replica():
                assert connections[first].ensure_connection() is None
                ready.wait(30)
                ready.wait(30)
                found.append(Book.objects.using(first).count())
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=("my1",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait(30)
    with one_book["my1"].frozen():
        ready.wait(30)
        for thread in threads:
            thread.join(30)
    assert found == [1, 1, 1, 1]
    # One for the server, and one for connections whose server is unknown.
    assert set(probed) == {"my1"}
    assert len(probed) <= 2


def test_slow_read_of_a_server_that_answers_is_left_alone(
    one_book: Servers, sent_signals: SentSignals
) -> None:
    with unrelated_scope():
        (book,) = Book.objects.raw("SELECT id, title, SLEEP(2) AS slept FROM app_book")
    assert book.title == "one"
    assert sent_signals == []
    assert not pool().replica_set.out_of_rotation


def test_slow_read_of_a_server_without_free_connections_is_left_alone(
    one_book: Servers, sent_signals: SentSignals
) -> None:
    """An error of the server is an answer."""
    driver = pytest.importorskip("MySQLdb")
    with unrelated_scope(), ExitStack() as stack:
        first = server()
        ((limit,),) = one_book[first].execute("SELECT @@max_connections")
        stack.callback(one_book[first].execute, f"SET GLOBAL max_connections = {limit}")
        one_book[first].execute("SET GLOBAL max_connections = 10")
        entry = connections.settings[first]
        with suppress(driver.OperationalError):
            for _ in range(20):
                # One more is left for an administrator.
                filler = driver.connect(
                    host=entry["HOST"],
                    port=int(entry["PORT"]),
                    user=entry["USER"],
                    password=entry["PASSWORD"],
                )
                stack.callback(filler.close)
        (book,) = Book.objects.raw("SELECT id, @@port AS port, SLEEP(1.5) AS slept FROM app_book")
    assert alias_of_port(book.port) == first
    assert sent_signals.of("replica_removed") == []


def test_error_of_one_probe_does_not_end_the_detection(one_book: Servers) -> None:
    failed: list[str] = []

    def fail_once(connection: Any, **kwargs: Any) -> None:
        if getattr(connection, "is_dedicated", False) and not failed:
            failed.append(connection.alias)
            raise ProgrammingError("once")

    with unrelated_scope():
        first = server()
        connection_created.connect(fail_once)
        try:
            list(Book.objects.raw("SELECT id, title, SLEEP(0.8) AS slept FROM app_book"))
        finally:
            connection_created.disconnect(fail_once)
        with one_book[first].frozen():
            assert read() in [(alias, ["one"]) for alias in (OTHER[first], "my")]


def test_read_on_a_connection_that_the_code_closed_opens_it_again(one_book: Servers) -> None:
    with use_replica(), connections["my1"].cursor() as cursor:
        cursor.execute("SELECT 1")
        connections["my1"].close()
        cursor.execute("SELECT 2")
        assert cursor.fetchall() == ((2,),)


@pytest.mark.parametrize("kind", ["timeout", "killed"])
def test_cancelled_query_is_not_retried(
    one_book: Servers, sent_signals: SentSignals, kind: str
) -> None:
    running = (
        "SELECT id FROM information_schema.processlist "
        "WHERE info LIKE '%BENCHMARK(%' AND id != connection_id()"
    )

    def kill() -> None:
        found: list[Any] = []
        assert eventually(lambda: found.extend(one_book[first].execute(running)) or found)
        one_book[first].execute(f"KILL QUERY {found[0][0]}")

    with unrelated_scope():
        first = server()
        sent_signals.clear()
        thread = threading.Thread(target=kill)
        if kind == "timeout":
            with connections[first].cursor() as cursor:
                cursor.execute(f"SET SESSION {one_book.STATEMENT_TIMEOUT}")
        else:
            thread.start()
        sql = "SELECT id, title FROM app_book WHERE BENCHMARK(10000000000, SHA2('x', 256)) = 0"
        with pytest.raises(OperationalError, match=r"1969|1317|3024"):
            list(Book.objects.raw(sql))
        if kind == "killed":
            thread.join()
    assert sent_signals == []


def test_statement_in_a_transaction_on_the_replica_is_not_retried(
    one_book: Servers, sent_signals: SentSignals
) -> None:
    with (  # noqa: PT012
        unrelated_scope(),
        pytest.raises(OperationalError),
        transaction.atomic(using="my1"),
    ):
        assert Book.objects.using("my1").count() == 1
        one_book.terminate("my1")
        Book.objects.using("my1").count()
    assert sent_signals.of("read_retried") == []


def test_write_is_never_retried(one_book: Servers) -> None:
    with unrelated_scope():
        create()
        one_book.terminate("my")
        with pytest.raises(OperationalError):
            create()
        connections["my"].close()
    one_book["my1"].stop()
    connections["my1"].close()
    with unrelated_scope(), pytest.raises(ReplicaWriteError):
        Book.objects.using("my1").update(title="lost")
    count = "SELECT count(*) FROM app_book WHERE title != 'lost'"
    assert one_book["my"].execute(count, "site") == [(2,)]


def test_freshest_replica_substitutes_the_primary(
    one_book: Servers, sent_signals: SentSignals
) -> None:
    one_book.pause("my1")
    write("two")
    one_book.wait_for("my2")
    one_book.pause("my2")
    token = write("three")
    one_book["my"].stop()
    with override_settings(PINNING_PRIMARY_DOWN="stale"):
        assert [titles(token) for _ in range(2)] == [["one", "two"]] * 2
    assert sent_signals.of("fell_back_to_replica")[-1]["served"] == "my2"


# Lag


@override_settings(PINNING_MAX_LAG=1.5)
def test_lagging_replica_is_out_of_rotation(my: Servers) -> None:
    """For any role: the lag is the age of the newest position that it has reached."""
    my.pause("my1")
    assert eventually(
        lambda: (write(), server_for(None), pool().replica_set.out_of_rotation == {"my1"})[-1]
    )
    assert {server_for(None) for _ in range(4)} == {"my2"}
    my.resume("my1")
    assert eventually(lambda: server_for(None) == "my1")


def test_idle_primary_causes_no_lag(my: Servers) -> None:
    """Seconds_Behind_Master is NULL if replication is stopped."""
    write()
    my.wait_for()
    my.pause()
    with use_replica(max_lag=0.05):
        assert eventually(lambda: server() in REPLICAS)


def test_connect_timeout_applies(my: Servers) -> None:
    assert connections["my1"].get_connection_params()["connect_timeout"] == 2
    assert "connect_timeout" not in connections["my"].get_connection_params()
