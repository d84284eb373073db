"""Replicas that die, restart, cancel and never answer, on PostgreSQL: nobody notices."""

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
from django.db.backends.utils import CursorWrapper
from django.db.models import Max
from django.test import override_settings

from pinning_middleware import pin_this_request, use_replica
from pinning_middleware.exceptions import ReplicaWriteError
from pinning_middleware.scopes.scope import current_scope
from pinning_middleware.servers.dialects.postgresql import PostgreSQL as Dialect
from pinning_middleware.servers.registry import registry
from tests.app.models import Author, Book
from tests.conftest import Visit

from .conftest import (
    Heard,
    PostgreSQL,
    alias_of_port,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    look_again,
    look_around,
    pool,
    pooled,
    port_for,
    position_in,
    server,
    server_for,
    stranger,
    take_out,
    titles,
    write,
)

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


def cursor_read() -> list[str]:
    with connections[Book.objects.db].cursor() as cursor:
        cursor.execute("SELECT title FROM app_book")
        return [title for (title,) in cursor.fetchall()]


@pytest.fixture
def one_book(pg: PostgreSQL) -> PostgreSQL:
    with stranger():
        Book.objects.create(title="one")
    pg.wait_for()
    return pg


# A replica dies


@pytest.mark.parametrize("kind", READS)
def test_a_read_outlives_its_replica(one_book: PostgreSQL, kind: str, heard: Heard) -> None:
    with stranger():
        first = server()
        one_book[first].stop("immediate")
        assert READS[kind]() == ["one"]
        assert server() == OTHER[first]
    reruns = heard.of("read_retried")
    assert (reruns[0]["sender"], reruns[0]["failed"]) == ("pg", first)
    assert reruns[0]["served"] == OTHER[first]
    assert heard.of("replica_removed")[0]["replica"] == first
    assert heard.of("fell_back_to_primary") == []


@pytest.mark.parametrize("kind", READS)
def test_a_read_outlives_its_connection(one_book: PostgreSQL, kind: str, heard: Heard) -> None:
    """A lost connection is no dead replica: it serves again, and is not left out."""
    with stranger():
        first = server()
        one_book.terminate(first)
        assert READS[kind]() == ["one"]
        assert server() == first
    assert [(one["failed"], one["served"]) for one in heard.of("read_retried")] == [(first, first)]
    assert heard.of("replica_removed") == heard.of("fell_back_to_primary") == []


def test_it_is_said_in_the_log(one_book: PostgreSQL, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pinning_middleware"), stranger():
        first = server()
        one_book[first].stop("immediate")
        server()
        one_book[first].start()
        look_again(first)
        assert eventually(lambda: server_for(None) == first)
    assert f"{first} serves nobody (connect): " in caplog.text
    assert f"A read of {first} went to {OTHER[first]}: " in caplog.text
    assert f"{first} serves again." in caplog.text


def test_requests_outlive_their_replica(one_book: PostgreSQL, visit: Visit) -> None:
    def act(request: Any) -> tuple[str, list[str]]:
        return server(), READS["list"]()

    first, _ = visit(act)
    one_book[first].stop("immediate")
    assert [visit(act) for _ in range(4)] == [(OTHER[first], ["one"])] * 4
    assert "pinning" not in visit.browser.cookies


def test_with_both_down_the_primary_serves(one_book: PostgreSQL, heard: Heard) -> None:
    with stranger():
        server()
        for alias in REPLICAS:
            one_book[alias].stop("immediate")
        assert [READS["list"](), READS["chunks"]()] == [["one"]] * 2
        assert server() == "pg"
    assert server_for(None) == "pg"
    assert {one["reason"] for one in heard.of("fell_back_to_primary")} == {"no_replica"}


def test_with_both_down_from_the_start_the_primary_serves(one_book: PostgreSQL) -> None:
    for alias in REPLICAS:
        one_book[alias].stop("immediate")
        connections[alias].close()
    assert [titles() for _ in range(3)] == [["one"]] * 3
    assert [in_thread(titles) for _ in range(2)] == [["one"]] * 2


def test_a_replica_that_is_starting_up_is_left_out(one_book: PostgreSQL, heard: Heard) -> None:
    """57P03 comes at the connection."""
    one_book["pg1"].stop("immediate")
    connections["pg1"].close()
    while server_for(None) != "pg2" or not heard.of("replica_removed"):
        pass
    assert pool().out == {"pg1"}


SLOW_HERE = """
SELECT id, title, CASE inet_server_port() WHEN %s THEN pg_sleep(30)::text END FROM app_book
"""


@contextmanager
def during_a_query(pg: PostgreSQL, alias: str, act: Callable[[], None]) -> Iterator[Any]:
    """Act while a query runs on that replica, one that takes long there and only there."""
    running = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%WHEN%pg_sleep(30)%FROM app_book%'"

    def wait_and_act() -> None:
        if eventually(lambda: pg[alias].execute(f"{running} AND pid != pg_backend_pid()")):
            act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield Book.objects.raw(SLOW_HERE, [pg[alias].port])
    thread.join()


def test_a_replica_that_shuts_down_during_a_query(one_book: PostgreSQL) -> None:
    with stranger():
        first = server()
        with during_a_query(one_book, first, lambda: one_book[first].stop("fast")) as books:
            assert [book.title for book in books] == ["one"]
        assert server() == OTHER[first]


def test_a_query_that_conflicts_with_recovery(one_book: PostgreSQL, heard: Heard) -> None:
    """A snapshot that needs what the primary has vacuumed away: 40001."""
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
        with stranger():
            first = server()
            with during_a_query(one_book, first, vacuum) as books:
                assert [book.title for book in books] == ["one"]
            assert server() == first
    finally:
        for alias in REPLICAS:
            one_book[alias].execute("ALTER SYSTEM RESET max_standby_streaming_delay")
            one_book[alias].execute("SELECT pg_reload_conf()")
    (rerun,) = heard.of("read_retried")
    assert (rerun["failed"], rerun["served"]) == (first, OTHER[first])
    assert "conflict with recovery" in str(rerun["error"])
    assert heard.of("replica_removed") == []


def test_one_terminated_connection_of_many_takes_no_replica_out(one_book: PostgreSQL) -> None:
    for _ in range(5):
        one_book.terminate("pg1")
        one_book.terminate("pg2")
        assert {server_for(None) for _ in range(2)} == REPLICAS
    assert pool().out == frozenset()


# What is not run again


def test_a_statement_timeout_is_not_run_again(one_book: PostgreSQL, heard: Heard) -> None:
    for alias in REPLICAS:
        connections[alias].close()
        connections.settings[alias]["OPTIONS"]["options"] = "-c statement_timeout=20"
    heard.clear()
    with stranger(), pytest.raises(OperationalError, match="statement timeout"):
        list(Book.objects.raw("SELECT id, pg_sleep(10)::text FROM app_book"))
    assert heard == []


def test_a_wrong_query_is_not_run_again(one_book: PostgreSQL, heard: Heard) -> None:
    with stranger(), pytest.raises(Exception, match="division by zero"):
        list(Book.objects.raw("SELECT 1/0 AS id"))
    assert heard == []


def test_nothing_is_run_again_inside_a_transaction_on_the_replica(
    one_book: PostgreSQL, heard: Heard
) -> None:
    with (  # noqa: PT012
        stranger(),
        pytest.raises(OperationalError),
        transaction.atomic(using="pg1"),
    ):
        assert Book.objects.using("pg1").count() == 1
        one_book.terminate("pg1")
        Book.objects.using("pg1").count()
    assert heard.of("read_retried") == []
    assert Book.objects.using("pg1").count() == 1


def test_no_transaction_begins_elsewhere(one_book: PostgreSQL) -> None:
    """Where it was asked for on the replica, it is not the primary's business."""
    one_book["pg1"].stop("immediate")
    connections["pg1"].close()
    with stranger(), pytest.raises(OperationalError), transaction.atomic(using="pg1"):
        Book.objects.using("pg1").count()


@pytest.mark.parametrize("down", ["error", "stale"])
def test_a_write_is_never_run_again(one_book: PostgreSQL, heard: Heard, down: str) -> None:
    with override_settings(PINNING_PRIMARY_DOWN=down), stranger():
        Book.objects.create(title="two")
        one_book.terminate("pg")
        with pytest.raises(OperationalError):
            Book.objects.create(title="lost")
        connections["pg"].close()
    assert heard.of("read_retried") == []
    assert one_book["pg"].execute("SELECT count(*) FROM app_book", database="site") == [(2,)]


@pytest.mark.parametrize("down", ["error", "stale"])
def test_a_lock_is_never_run_again(one_book: PostgreSQL, heard: Heard, down: str) -> None:
    with override_settings(PINNING_PRIMARY_DOWN=down), stranger():
        connections["pg"].ensure_connection()
        one_book.terminate("pg")
        with (
            pytest.raises(OperationalError),
            connections["pg"].cursor() as cursor,
        ):
            cursor.execute("SELECT * FROM app_book FOR UPDATE")
        connections["pg"].close()
    assert heard.of("read_retried") == []


def test_a_read_of_the_primary_gets_its_error(one_book: PostgreSQL, heard: Heard) -> None:
    with stranger():
        pin_this_request()
        assert READS["list"]() == ["one"]
        one_book.terminate("pg")
        with pytest.raises(OperationalError):
            READS["list"]()
        connections["pg"].close()
        assert READS["list"]() == ["one"]
    assert heard == []


# Writes stay refused


def test_a_write_on_a_replica_that_is_down_is_refused(one_book: PostgreSQL) -> None:
    """Also where the cursor is the primary's."""
    for alias in REPLICAS:
        one_book[alias].stop("immediate")
        connections[alias].close()
    with stranger():
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


def test_a_cursor_that_failed_over_stays_a_replica_s(one_book: PostgreSQL) -> None:
    with stranger(), connections["pg1"].cursor() as cursor:
        cursor.execute("SELECT title FROM app_book")
        for alias in REPLICAS:
            one_book[alias].stop("immediate")
        cursor.execute("SELECT title FROM app_book")
        assert cursor.fetchall() == [("one",)]
        with pytest.raises(ReplicaWriteError):
            cursor.execute("DELETE FROM app_book")
    assert one_book["pg"].execute("SELECT title FROM app_book", database="site") == [("one",)]


# Under a pin


def test_under_a_pin_nothing_is_run_on_a_replica_that_is_behind(one_book: PostgreSQL) -> None:
    one_book.pause("pg2")
    token = write("two")
    one_book.wait_for("pg1")
    with stranger(token):
        assert server() == "pg1"
        one_book["pg1"].stop("immediate")
        assert READS["values_list"]() == ["one", "two"]
        assert server() == "pg"
    assert [titles(token) for _ in range(4)] == [["one", "two"]] * 4


def test_under_a_pin_it_is_run_on_a_replica_that_has_it(one_book: PostgreSQL) -> None:
    token = write("two")
    one_book.wait_for()
    with stranger(token):
        first = server()
        one_book[first].stop("immediate")
        assert READS["values_list"]() == ["one", "two"]
        assert server() == OTHER[first]


def test_under_a_pin_a_conflict_goes_to_no_replica_that_is_behind(one_book: PostgreSQL) -> None:
    """What was opened elsewhere counts too."""
    one_book.pause("pg2")
    token = write("two")
    one_book.wait_for("pg1")
    with stranger(token):
        assert server() == "pg1"
    one_book["pg1"].stop("immediate")
    connections["pg1"].close()
    # Known to have it, by an earlier request, but not there any more.
    assert [titles(token) for _ in range(3)] == [["one", "two"]] * 3


@pytest.mark.parametrize("lost", ["terminated", "restarted"])
def test_under_a_pin_a_new_connection_is_asked(one_book: PostgreSQL, lost: str) -> None:
    """Behind it may be a server that was restarted, and has replayed less than it had."""
    one_book["pg1"].execute("CHECKPOINT")
    one_book.pause("pg2")
    token = write("two")
    one_book.wait_for("pg1")
    with stranger(token):
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


def test_under_a_pin_a_candidate_s_new_connection_is_asked(one_book: PostgreSQL) -> None:
    """It was known to have it; then it was restarted, and the one that served died."""
    one_book["pg2"].execute("CHECKPOINT")
    token = write("two")
    one_book.wait_for()
    look_around()
    one_book["pg2"].set_delay(3600)
    try:
        one_book["pg2"].restart("immediate")
        connections["pg2"].close()
        with stranger(token):
            current_scope()["pg"].replica = "pg1"
            assert server() == "pg1"
            one_book["pg1"].stop("immediate")
            assert READS["values_list"]() == ["one", "two"]
        connections["pg2"].close()
        assert titles(token) == ["one", "two"]
    finally:
        one_book["pg2"].set_delay(0)


def test_a_connection_that_is_lost_while_it_is_asked(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cursor that was opened before belongs to the lost one."""
    token = write("two")
    one_book.wait_for()
    identify, lost = Dialect.identify, []

    def lose(self: Any, *args: Any) -> Any:
        if not lost:
            lost.append(first)
            one_book.terminate(first)
        return identify(self, *args)

    with stranger(token):
        first = server()
        connections[first].close()
        monkeypatch.setattr(Dialect, "identify", lose)
        assert READS["values_list"]() == ["one", "two"]
        assert server() == first
    assert lost == [first]


def test_one_that_is_cut_off_at_its_first_question_is_made_again(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    token = write("two")
    one_book.wait_for()
    for alias in REPLICAS:
        connections[alias].close()
    identify, lost = Dialect.identify, []

    def lose(self: Any, ask: Any, where: tuple[str, int], way: Any) -> Any:
        if not lost:
            lost.append(alias_of_port(where[1]))
            one_book.terminate(lost[0])
        return identify(self, ask, where, way)

    monkeypatch.setattr(Dialect, "identify", lose)
    with stranger(token):
        assert server() == lost[0]
    assert heard.of("replica_removed") == []


def test_one_that_is_cut_off_while_it_is_made_is_made_again(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, heard: Heard
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
    with stranger():
        assert server() == lost[0]
    assert heard.of("replica_removed") == []


def test_a_pool_s_connections_that_were_cut_off_take_no_replica_out(
    one_book: PostgreSQL, heard: Heard
) -> None:
    """A pool hands out what was ended long ago, as often as it has such."""
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
    assert heard.of("replica_removed") == []


def test_a_read_that_somebody_ends_is_not_run_again_and_again(one_book: PostgreSQL) -> None:
    """It may be the very reason why: once more where it was, and once elsewhere."""
    ran: list[str] = []

    def noted(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        ran.append(context["cursor"].db.alias)
        return execute(sql, params, many, context)

    for alias in ("pg", *REPLICAS):
        connections[alias].close()
    with stranger():
        alias = Book.objects.db
        with (
            connections[alias].execute_wrapper(noted),
            connections[alias].cursor() as cursor,
            pytest.raises(OperationalError),
        ):
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert ran == [alias, alias, OTHER[alias], "pg"]


# A replica that accepts connections and never answers


class Attempts(NamedTuple):
    """The aliases to which a connection was tried."""

    by_requests: list[str]
    by_watchers: list[str]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Who tried to connect where, from here on."""
    made = Attempts([], [])
    connect = DatabaseWrapper.get_new_connection

    def noted(self: Any, params: Any) -> Any:
        is_watcher = threading.current_thread().name.startswith("pinning-watcher")
        (made.by_watchers if is_watcher else made.by_requests).append(self.alias)
        return connect(self, params)

    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", noted)
    for alias in ("pg", *pool().replicas):
        # One that was made before has its own way to connect at hand.
        connections[alias].close()
        del connections[alias]
    return made


@pytest.fixture
def mute(one_book: PostgreSQL) -> Iterator[PostgreSQL]:
    """`pg1` is a socket that nobody accepts from."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        connections["pg1"].close()
        connections.settings["pg1"]["PORT"] = str(listening.getsockname()[1])
        yield one_book


def test_a_mute_replica_is_left_out(mute: PostgreSQL, attempts: Attempts, heard: Heard) -> None:
    connections["pg2"].ensure_connection()
    attempts.by_requests.clear()
    assert [titles() for _ in range(6)] == [["one"]] * 6
    assert attempts.by_requests.count("pg1") == 1
    assert heard.of("replica_removed") == [
        {"sender": "pg", "replica": "pg1", "reason": "connect", "seconds": 10.0}
    ]
    # With the jitter, up to 12.5 s.
    assert 7.0 < endpoint("pg1").retry_at - time.monotonic() < 12.5


def test_a_mute_replica_is_tried_again_by_nobody_s_request(
    mute: PostgreSQL, attempts: Attempts, heard: Heard
) -> None:
    take_out("pg1")
    attempts.by_watchers.clear()
    look_again("pg1")
    # By its watcher, which is given no answer either.
    assert eventually(lambda: "pg1" in attempts.by_watchers)
    assert [titles() for _ in range(4)] == [["one"]] * 4
    assert eventually(lambda: endpoint("pg1").retry_at > time.monotonic() + 5)
    assert "pg1" not in attempts.by_requests
    assert len(heard.of("replica_removed")) == 1


def test_a_scope_that_had_chosen_it_does_not_try(mute: PostgreSQL, attempts: Attempts) -> None:
    """Another request found out in the meantime."""
    with stranger():
        while Book.objects.db != "pg1":
            current_scope()["pg"].leave("pg2")
        chosen = Book.objects.all()
        take_out("pg1")
        assert [book.title for book in chosen.using("pg1")] == ["one"]
        assert READS["list"]() == ["one"]
    assert "pg1" not in attempts.by_requests


def test_pinned_requests_do_not_wait_for_a_mute_replica(
    mute: PostgreSQL, attempts: Attempts
) -> None:
    mute.pause("pg2")
    token = write("two")
    assert [titles(token) for _ in range(5)] == [["one", "two"]] * 5
    assert attempts.by_requests.count("pg1") == 1


def test_connecting_is_bounded(pg: PostgreSQL) -> None:
    assert connections["pg1"].get_connection_params()["connect_timeout"] == 2
    assert "connect_timeout" not in connections["pg"].get_connection_params()
    connections.settings["pg2"]["OPTIONS"]["connect_timeout"] = 7
    assert connections["pg2"].get_connection_params()["connect_timeout"] == 7


# What is no replica


def test_an_alias_that_is_the_primary_is_simply_the_primary(
    one_book: PostgreSQL, heard: Heard
) -> None:
    connections["pg1"].close()
    connections.settings["pg1"].update(
        HOST="localhost", PORT=connections.settings["pg"]["PORT"], OPTIONS={"sslmode": "disable"}
    )
    # By the port it can't be told from the primary's alias.
    assert {server_for(None) for _ in range(4)} == REPLICAS
    one_book.pause("pg2")
    token = write("two")
    assert [titles(token) for _ in range(4)] == [["one", "two"]] * 4
    assert heard.of("replica_removed") == []


# The primary is down


@pytest.fixture
def stale() -> Iterator[None]:
    with override_settings(PINNING_PRIMARY_DOWN="stale"):
        yield


def test_a_pinned_read_gets_the_primary_s_error(one_book: PostgreSQL, heard: Heard) -> None:
    one_book.pause()
    token = write("two")
    one_book["pg"].stop("immediate")
    for _ in range(2):
        with stranger(token), pytest.raises(OperationalError):
            READS["list"]()
    connections["pg"].close()
    with stranger(token), pytest.raises(OperationalError):
        READS["list"]()
    assert {server_for(None) for _ in range(4)} == REPLICAS
    assert "primary_down" not in [one["reason"] for one in heard.of("fell_back_to_primary")]


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("connected", [True, False])
def test_the_freshest_replica_serves_for_the_primary(
    one_book: PostgreSQL, heard: Heard, caplog: pytest.LogCaptureFixture, connected: bool
) -> None:
    one_book.pause("pg1")
    with stranger():
        Book.objects.create(title="two")
    one_book.wait_for("pg2")
    one_book.pause("pg2")
    token = write("three")
    one_book["pg"].stop("immediate")
    if not connected:
        connections["pg"].close()
    with stranger(token):
        assert READS["values_list"]() == ["one", "two"]
        assert server() == "pg2"
        assert READS["list"]() == ["one", "two"]
    said = heard.of("fell_back_to_primary")
    assert {"sender": "pg", "served": "pg2", "reason": "primary_down"} in said
    assert "pg2" in caplog.text
    assert [one["replica"] for one in heard.of("replica_removed")] == []


@pytest.mark.usefixtures("stale")
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("pin", ["method", "by hand", "token"])
def test_every_pinned_read_of_a_scope_is_served(
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
    """Return a function that runs an action in a scope that is pinned in this way."""
    from django.test import Client

    def run(pin: str, token: str, action: Callable[[], Any]) -> Any:
        if pin == "method":
            results: list[Any] = []
            Client().post(f"/sync/{do(lambda request: results.append(action()))}/")
            return results[0]
        with stranger(token if pin == "token" else None):
            if pin == "by hand":
                pin_this_request()
            return action()

    return run


@pytest.mark.usefixtures("stale")
def test_a_lost_connection_is_not_a_lost_primary(one_book: PostgreSQL, heard: Heard) -> None:
    one_book.pause()
    with stranger():
        Book.objects.create(title="two")
        one_book.terminate("pg")
        assert READS["values_list"]() == ["one", "two"]
        assert server() == "pg"
    assert heard.of("fell_back_to_primary") == []


@pytest.mark.usefixtures("stale")
def test_connecting_to_a_primary_that_has_a_stand_in_is_bounded(pg: PostgreSQL) -> None:
    assert connections["pg"].get_connection_params()["connect_timeout"] == 2


@pytest.mark.usefixtures("stale")
def test_writes_get_the_primary_s_error(one_book: PostgreSQL) -> None:
    one_book["pg"].stop("immediate")
    connections["pg"].close()
    with stranger() as scope:
        with pytest.raises(OperationalError):
            Author.objects.create(name="lost")
        assert READS["list"]() == ["one"]
        assert READS["list"]() == ["one"]
    assert scope.token is None or scope.token


@pytest.mark.parametrize("primary_down", ["error", "stale"])
def test_replicas_that_are_restarted_meanwhile_serve(
    one_book: PostgreSQL, primary_down: str
) -> None:
    """Without a primary nobody can tell their timeline: enough for who has no pin."""
    with override_settings(PINNING_PRIMARY_DOWN=primary_down):
        wanted = position_in(write("two"))
        one_book.wait_for()
        look_around()
        one_book["pg"].stop("immediate")
        for alias in REPLICAS:
            one_book[alias].restart("fast")

        def served() -> str:
            try:
                return server_for(None)
            except OperationalError:
                return "nobody"

        assert eventually(lambda: {served() for _ in range(4)} == REPLICAS)
        assert pool().holder(wanted, ask=True) is None


@pytest.mark.usefixtures("stale")
def test_a_primary_that_is_back_is_used(one_book: PostgreSQL, attempts: Attempts) -> None:
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
def test_with_everything_down_the_error_is_the_primary_s(one_book: PostgreSQL) -> None:
    token = write("two")
    for alias in ("pg", "pg1", "pg2"):
        one_book[alias].stop("immediate")
        connections[alias].close()
    with stranger(token), pytest.raises(OperationalError) as caught:
        READS["list"]()
    assert str(one_book["pg"].port) in str(caught.value)


# Locks


def test_no_lock_is_held_while_a_database_is_asked(
    one_book: PostgreSQL, monkeypatch: pytest.MonkeyPatch, heard: Heard
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
            look_around()
    finally:
        for signal in told:
            signal.disconnect(receive)
    assert locked == []
    assert len(asked) > 10
    told_of = {name for name, _ in heard}
    assert {"fell_back_to_primary", "replica_removed", "replica_wait_finished"} <= told_of
