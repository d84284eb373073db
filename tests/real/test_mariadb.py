"""Positions, lag and failover on MariaDB."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.test import Client, override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import use_replica
from pinning_middleware.exceptions import ReplicaWriteError
from pinning_middleware.scopes.scope import enter
from tests.app.models import Book
from tests.conftest import Visit

from .conftest import (
    SentSignals,
    as_databases,
    empty_tables,
    endpoint,
    eventually,
    in_thread,
    make_retry_due,
    make_tables,
    pin_in,
    pool,
    position_in,
    probe_replicas,
    queries,
    server,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .mariadb import Servers, running_servers

pytestmark = pytest.mark.real

REPLICAS = {"my1", "my2"}
OTHER = {"my1": "my2", "my2": "my1"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Servers]:
    with running_servers() as servers:
        yield servers


@pytest.fixture
def my(shared: Servers, django_db_setup: None, django_db_blocker: Any) -> Iterator[Servers]:
    """Servers that tests may break and must repair, with all models on them."""
    with django_db_blocker.unblock(), as_databases(shared.entries()):
        make_tables("my")
        empty_tables("my")
        shared.wait_for()
        enter(None)
        try:
            yield shared
        finally:
            shared.repair()


@pytest.fixture
def own(django_db_setup: None, django_db_blocker: Any) -> Iterator[Servers]:
    """Servers that the test may change permanently."""
    with (
        django_db_blocker.unblock(),
        running_servers() as servers,
        as_databases(servers.entries()),
    ):
        make_tables("my")
        servers.wait_for()
        enter(None)
        yield servers


@pytest.fixture
def one_book(my: Servers) -> Servers:
    with unrelated_scope():
        Book.objects.create(title="one")
    my.wait_for()
    return my


def create(request: Any = None) -> None:
    Book.objects.create(title="new")


def read(request: Any = None) -> tuple[str, list[str]]:
    return server(), sorted(Book.objects.values_list("title", flat=True))


# Positions


def test_pin_contains_a_position(my: Servers) -> None:
    position = position_in(write())
    assert set(position) == {"0-1"}
    assert f"0-1-{position['0-1']}" == my["my"].position


def test_position_is_read_after_the_commit(my: Servers) -> None:
    with unrelated_scope() as scope:
        with transaction.atomic(using="my"):
            create()
            assert pin_in(scope.token).position is None
        assert f"0-1-{position_in(scope.token)['0-1']}" == my["my"].position


def test_reads_use_the_primary_until_one_replica_has_caught_up(my: Servers, visit: Visit) -> None:
    my.pause()
    visit(create)
    assert [visit(read) for _ in range(3)] == [("my", ["new"])] * 3
    my.resume("my2")
    assert [visit(read) for _ in range(4)] == [("my2", ["new"])] * 4
    my.resume("my1")
    probe_replicas()
    assert {visit(read)[0] for _ in range(4)} == REPLICAS


def test_writes_are_always_visible(my: Servers) -> None:
    for number in range(100):
        token = write(f"book {number}")
        with unrelated_scope(token):
            assert Book.objects.filter(title=f"book {number}").exists()


@pytest.mark.usefixtures("unfollowed")
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
    assert f"0-1-{position_in(token)['0-1']}" == my["my"].position


# Waiting


@override_settings(PINNING_WAIT=0.05)
def test_wait_times_out(my: Servers, sent_signals: SentSignals) -> None:
    my.pause()
    token = write()
    with unrelated_scope(token):
        assert [read(), read()] == [("my", ["new"])] * 2
    (waited,) = sent_signals.of("replica_wait_finished")
    assert not waited["reached"]


def test_replica_is_not_probed_inside_a_transaction(my: Servers) -> None:
    """A wait inside it returns "reached", and its snapshot does not change."""
    with (
        override_settings(PINNING_WAIT=0.05),
        transaction.atomic(using="my1"),
        transaction.atomic(using="my2"),
    ):
        for alias in REPLICAS:
            with connections[alias].cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT count(*) FROM app_book")
        token = write()
        my.wait_for()
        assert titles(token) == ["new"]
        assert server_for(token) == "my"


# GTIDs


def set_domain(number: int) -> None:
    with connections["my"].cursor() as cursor:
        cursor.execute(f"SET SESSION gtid_domain_id = {number}")


def test_every_shared_domain_is_required(own: Servers) -> None:
    """Reads after writes in two domains are causal in both."""
    own.pause()
    with unrelated_scope() as scope:
        create()
        set_domain(5)
        create()
        set_domain(0)
    position = position_in(scope.token)
    assert {log.lstrip("?") for log in position} >= {"0-1", "5-1"}
    assert server_for(scope.token) == "my"
    own.resume("my2")
    assert server_for(scope.token) == "my2"
    # A later write in one domain still requires the position in the other.
    own.pause()
    with unrelated_scope() as five:
        set_domain(5)
        create()
        set_domain(0)
    with unrelated_scope(five.token) as both:
        create()
    assert server_for(both.token) == "my"
    own.resume("my1")
    assert server_for(both.token) == "my1"


def test_domain_without_a_replica_is_not_required(own: Servers) -> None:
    """Other clients write in it; a pin in another domain is still reached."""
    for alias in REPLICAS:
        own[alias].follow(own["my"], IGNORE_DOMAIN_IDS="(9)")
    try:
        own["my"].execute("SET SESSION gtid_domain_id = 9; CREATE DATABASE IF NOT EXISTS local")
        token = write()
        assert any(log.startswith("9-") for log in pin_in(token).position.optional)
        assert eventually(lambda: server_for(token) in REPLICAS)
    finally:
        for alias in REPLICAS:
            own[alias].follow(own["my"], IGNORE_DOMAIN_IDS="()")


@pytest.mark.parametrize("kind", ["no-op", "rollback", "read"])
def test_last_gtid_of_a_persistent_connection(my: Servers, kind: str) -> None:
    """
    It is that of an earlier request if this one wrote nothing. Data this scope has read from the
    primary, including writes of others, is included in its position.
    """
    write("mine")
    in_thread(lambda: write("theirs"))
    my.wait_for()
    my.pause()
    with unrelated_scope() as scope:
        if kind == "no-op":
            Book.objects.filter(title="mine").update(title="mine")
        elif kind == "rollback":
            with transaction.atomic(using="my"):
                create()
                transaction.set_rollback(True, using="my")
        else:
            assert server() in REPLICAS
    if kind == "read":
        assert scope.token is None
        return
    assert f"0-1-{position_in(scope.token)['0-1']}" == my["my"].position
    # The domain is not required if no replica has it.
    assert server_for(scope.token) in REPLICAS


def test_position_of_another_server_is_never_reached(my: Servers) -> None:
    from pinning_middleware import tokens
    from pinning_middleware.pins import Pin, PinKey, Position

    token = write()
    my.wait_for()
    for log in ("0-7", "7-1", "0-12"):
        other = tokens.dumps({PinKey("my"): Pin(pin_in(token).until, 0.0, Position({log: 1}))})
        assert server_for(other) == "my"
    assert server_for(token) in REPLICAS


def test_promotion_that_lost_a_commit(own: Servers) -> None:
    write("kept")
    own.wait_for()
    probe_replicas()
    for alias in REPLICAS:
        own[alias].execute("STOP SLAVE")
    lost = write("lost")
    own["my"].stop()
    own["my1"].promote()
    own["my2"].follow(own["my1"])
    for number in range(3):
        own["my1"].execute(f"INSERT INTO app_book (title) VALUES ('{number}')", "site")
    position = own["my1"].position
    assert own["my2"].execute(f"SELECT MASTER_GTID_WAIT('{position}', 30)") == [(0,)]
    # MariaDB itself considers the lost transaction as replayed.
    gtid = f"0-1-{position_in(lost)['0-1']}"
    assert own["my2"].execute(f"SELECT MASTER_GTID_WAIT('{gtid}', 0)") == [(0,)]

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
        assert set(position_in(token)) == {"0-2"}
        assert eventually(lambda: server_for(token) == "my2")
        with unrelated_scope(lost) as scope:
            create()
        assert server_for(scope.token) == "my"


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
                cursor.execute("SET SESSION max_statement_time = 0.02")
        else:
            thread.start()
        sql = "SELECT id, title FROM app_book WHERE BENCHMARK(10000000000, MD5('x')) = 0"
        with pytest.raises(OperationalError, match=r"1969|1317"):
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
