"""Pins that end when a replica has caught up, on PostgreSQL."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.management import BaseCommand, call_command
from django.db import OperationalError, connections, transaction
from django.test import Client, override_settings
from freezegun import freeze_time
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware import (
    is_pinned,
    pin_this_request,
    tokens,
    use_primary,
    use_replica,
)
from pinning_middleware.pins import Pin, PinKey, Position
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import route
from pinning_middleware.scopes.scope import enter
from pinning_middleware.servers import monitor
from pinning_middleware.testing import advance_window, capture_reads
from pinning_middleware.testing.clock import reset_window
from sample_site.cluster import Node
from tests.app.models import Book
from tests.conftest import Visit

from .conftest import (
    NODES,
    PostgreSQL,
    SentSignals,
    as_databases,
    as_layout,
    entries_of,
    eventually,
    in_thread,
    make_tables,
    mark_unreachable,
    pin_in,
    pool,
    port,
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
from .layouts import Forwarder, database, frozen

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}


def create(request: Any = None) -> None:
    Book.objects.create(title="new")


def read(request: Any = None) -> tuple[str, list[str]]:
    """Return the server and the titles of two reads of one scope."""
    return server(), sorted(Book.objects.values_list("title", flat=True))


# Contents of a pin


def test_pin_contains_a_position(pg: PostgreSQL) -> None:
    ((log, point),) = position_in(write()).items()
    (system,) = pg["pg"].execute("SELECT system_identifier FROM pg_control_system()")[0]
    assert log == f"{system:x}-1"
    inserted = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"
    assert 0 < point <= pg["pg"].execute(inserted)[0][0]


def test_position_is_read_after_the_commit(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        with transaction.atomic(using="pg"):
            create()
            assert pin_in(scope.token).position is None
            inside = pg["pg"].execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")[0][0]
        (point,) = position_in(scope.token).values()
    # The commit's own record is 34 bytes or more.
    assert point > inside


def test_position_includes_an_asynchronous_commit(pg: PostgreSQL) -> None:
    with connections["pg"].cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
    pg["pg"].execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    pg["pg"].execute("SELECT pg_reload_conf()")
    try:
        for number in range(20):
            before = pg["pg"].execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
            token = write(str(number))
            (point,) = position_in(token).values()
            assert point > before[0][0]
        assert server_for(token) == "pg"
    finally:
        pg["pg"].execute("ALTER SYSTEM RESET wal_writer_delay")
        pg["pg"].execute("SELECT pg_reload_conf()")


@pytest.mark.parametrize("commit", ["on", "off"])
def test_writes_are_always_visible(pg: PostgreSQL, commit: str) -> None:
    with connections["pg"].cursor() as cursor:
        cursor.execute("SET synchronous_commit = %s" % commit)  # noqa: UP031
    for number in range(150):
        token = write(f"book {number}")
        with unrelated_scope(token):
            assert Book.objects.filter(title=f"book {number}").exists()


# Servers of a pinned scope


def test_reads_use_the_primary_until_one_replica_has_caught_up(
    pg: PostgreSQL, visit: Visit
) -> None:
    visit(create)
    pg.wait_for()
    visit.browser.cookies.clear()
    pg.pause()
    visit(create)
    assert [visit(read) for _ in range(4)] == [("pg", ["new", "new"])] * 4
    pg.resume("pg2")
    # At most both replicas are probed; the one behind is never selected.
    assert [visit(read) for _ in range(6)] == [("pg2", ["new", "new"])] * 6
    assert "pinning" in visit.browser.cookies
    pg.resume("pg1")
    probe_replicas()
    assert {visit(read)[0] for _ in range(6)} == REPLICAS


def test_scope_uses_one_replica(pg: PostgreSQL) -> None:
    token = write()
    pg.wait_for()
    for _ in range(4):
        with unrelated_scope(token):
            assert len({server() for _ in range(5)}) == 1


@override_settings(PINNING_BALANCE_BY="query")
def test_spread_by_query_never_uses_the_replica_behind(pg: PostgreSQL) -> None:
    pg.pause("pg1")
    token = write()
    pg.wait_for("pg2")
    with unrelated_scope(token):
        assert {server() for _ in range(6)} == {"pg2"}
    pg.resume("pg1")
    probe_replicas()
    with unrelated_scope(token):
        assert {server() for _ in range(8)} == REPLICAS


def test_later_write_advances_the_position(pg: PostgreSQL) -> None:
    first = write("first")
    pg.wait_for()
    pg.pause()
    assert server_for(first) in REPLICAS
    with unrelated_scope(first) as scope:
        Book.objects.create(title="second")
    assert server_for(scope.token) == "pg"
    assert server_for(first) in REPLICAS


def test_reason_names_a_replica_behind(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    pg.pause()
    token = write()
    sent_signals.clear()
    assert server_for(token) == "pg"
    assert sent_signals == [
        ("fell_back_to_primary", {"sender": "pg", "served": "pg", "reason": "not_caught_up"}),
    ]


def test_unpinned_scopes_read_replicas_meanwhile(pg: PostgreSQL) -> None:
    pg.pause()
    write()
    assert {server_for(None) for _ in range(4)} == REPLICAS
    assert titles() == []


def test_manual_pin_has_a_position(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        pin_this_request()
        assert server() == "pg"
    token = scope.token
    assert position_in(token)
    pg.wait_for()
    assert server_for(token) in REPLICAS


def test_manual_pin_with_seconds_is_primary_only(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        pin_this_request(seconds=30)
        create()
    pg.wait_for()
    assert server_for(scope.token) == "pg"


# Number of queries


def reads_twice(request: Any = None) -> None:
    Book.objects.count()
    Book.objects.count()


def identify_servers() -> None:
    """Register all servers, as in a process that has run for a while."""
    write()
    probe_replicas()


def test_number_of_added_queries(pg: PostgreSQL, browser: Any, do: Callable[..., str]) -> None:
    addresses = {name: f"/sync/{do(act)}/" for name, act in [("read", reads_twice), ("w", create)]}

    def added(name: str) -> int:
        with queries() as asked:
            browser.get(addresses[name])
        return len(asked.added)

    identify_servers()
    assert [added("read") for _ in range(3)] == [0, 0, 0]
    pg.pause()
    assert added("w") == 1
    # Each replica is probed while none is known to have caught up, and none twice.
    with queries() as asked:
        browser.get(addresses["read"])
    assert (len(asked.questions["pg1"]), len(asked.questions["pg2"])) == (1, 1)
    assert len(asked["pg"]) == 2
    assert "pg" not in asked.questions
    pg.resume("pg2")
    # The next replica is probed first, then the other one: at most one probe of each.
    assert added("read") <= 2
    assert [added("read") for _ in range(3)] == [0, 0, 0]
    pg.resume("pg1")


@pytest.mark.usefixtures("untracked")
def test_pinned_request_probes_once_with_healthy_replicas(
    pg: PostgreSQL, browser: Any, do: Callable[..., str]
) -> None:
    w, r = (f"/sync/{do(act)}/" for act in (create, reads_twice))
    identify_servers()
    browser.get(w)
    pg.wait_for()
    counts = []
    for _ in range(3):
        with queries() as asked:
            browser.get(r)
        counts.append(len(asked.added))
    assert counts == [1, 0, 0]


def test_known_position_is_shared_by_threads(pg: PostgreSQL) -> None:
    token = write()
    pg.wait_for()
    served = server_for(token)
    with queries() as asked:
        with unrelated_scope(token):
            Book.objects.count()
        assert asked.added == []
    # A new connection may resolve to another server, so it is probed again.
    with queries():
        assert in_thread(lambda: titles(token)) == ["new"]
    assert server_of(served).position


# The end of a pin


def test_pinned_reads_are_spread_in_a_process_that_has_not_written(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_replicas()
    with monkeypatch.context() as other_process:
        other_process.setattr(monitor.Monitors, "track", lambda *args, **kwargs: None)
        token = write("one")
    pg.wait_for()
    # The first of them probes one replica, and the other one is probed afterwards.
    assert eventually(lambda: {server_for(token) for _ in range(4)} == {"pg1", "pg2"})


def test_cookie_is_kept_until_it_expires(pg: PostgreSQL, visit: Visit) -> None:
    """A reached pin needs no query, and a read never removes it."""
    visit(create)
    pg.wait_for()
    value = visit.browser.cookies["pinning"].value
    probe_replicas()
    for _ in range(4):
        with queries() as asked:
            assert visit(read)[0] in REPLICAS
        assert asked.added == []
        assert not visit.response.cookies
    assert visit.browser.cookies["pinning"].value == value


def test_replica_out_of_rotation_serves_no_pinned_read(pg: PostgreSQL) -> None:
    token = write()
    pg.wait_for()
    mark_unreachable("pg1")
    with unrelated_scope(token) as scope:
        assert server() == "pg2"
    assert scope.token == token


def test_position_in_a_token_is_honoured_for_a_day(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    pg.pause()
    token = write()
    clock.tick(86_399)
    assert server_for(token) == "pg"
    clock.tick(2)
    assert server_for(token) in REPLICAS


def test_copy_longer_than_the_window_pins(pg: PostgreSQL, clock: FrozenDateTimeFactory) -> None:
    """The write ends when the copy is exited or all rows are fetched, not when it is called."""
    pg.pause()
    with unrelated_scope() as copied, connections["pg"].cursor() as cursor:
        with cursor.copy("COPY app_book (title) FROM STDIN") as copy:
            copy.write_row(["copied"])
            clock.tick(60)
        clock.tick(5)
    assert position_in(copied.token)
    assert titles(copied.token) == ["copied"]
    with unrelated_scope() as streamed, connections["pg"].cursor() as cursor:
        for _ in cursor.stream("INSERT INTO app_book (title) VALUES ('one') RETURNING id"):
            clock.tick(60)
        clock.tick(5)
    assert position_in(streamed.token)
    assert titles(streamed.token) == ["copied", "one"]


# Waiting


@override_settings(PINNING_WAIT=30)
def test_wait_until_a_replica_has_caught_up(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    pg.pause()
    token = write()
    waiting = threading.Event()

    def resume() -> None:
        waiting.wait(20)
        pg["pg1"].resume()

    thread = threading.Thread(target=resume)
    thread.start()

    begin = monitor.Monitors.wait_for

    def begun(*args: Any) -> Any:
        waiting.set()
        return begin(*args)

    with pytest.MonkeyPatch.context() as patch, unrelated_scope(token):
        patch.setattr(monitor.Monitors, "wait_for", begun)
        assert read() == ("pg1", ["new"])
    thread.join()
    (waited,) = sent_signals.of("replica_wait_finished")
    assert waited == {
        "sender": "pg",
        "replica": "pg1",
        "seconds": waited["seconds"],
        "reached": True,
    }
    assert sent_signals.of("fell_back_to_primary") == []


@override_settings(PINNING_WAIT=0.05)
def test_wait_times_out(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    pg.pause()
    token = write()
    with unrelated_scope(token):
        # Once for each scope, not for each read.
        assert [read(), read()] == [("pg", ["new"])] * 2
    (waited,) = sent_signals.of("replica_wait_finished")
    assert not waited["reached"]
    assert waited["seconds"] >= 0.05
    assert [one["reason"] for one in sent_signals.of("fell_back_to_primary")] == ["not_caught_up"]


@override_settings(PINNING_WAIT=0.05)
def test_wait_times_out_while_freezegun_stops_the_clock(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    pg.pause()
    token = write()
    with freeze_time(), unrelated_scope(token):
        assert read() == ("pg", ["new"])
    (waited,) = sent_signals.of("replica_wait_finished")
    assert not waited["reached"]


def test_read_does_not_wait_if_nothing_can_catch_up(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    token = write()
    pg.wait_for()
    with override_settings(PINNING_WAIT=30):
        assert server_for(token) in REPLICAS
        assert server_for(None) in REPLICAS
    assert sent_signals.of("replica_wait_finished") == []


# Edge cases of positions


INSERT = "SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint"


def emit(node: Node, size: int) -> None:
    """Write a record of about this size."""
    # Before PostgreSQL 17 it is flushed in the background:
    # https://www.postgresql.org/docs/17/functions-admin.html#FUNCTIONS-REPLICATION
    can_flush = int(node.execute("SHOW server_version_num")[0][0]) >= 170000
    flush = ", true" if can_flush else ""
    node.execute(f"SELECT pg_logical_emit_message(false, '', repeat('x', %s){flush})", (size,))


def fill_page(pg: PostgreSQL) -> bool:
    """Write a record that ends a page; return whether no other record interfered."""
    node = pg["pg"]
    while (start := node.execute(INSERT)[0][0]) % 8192 > 6000:
        emit(node, 1000)
    emit(node, 500)
    middle = node.execute(INSERT)[0][0]
    emit(node, 8192 - middle % 8192 - (middle - start - 500))
    return bool(node.execute(INSERT)[0][0] % 8192 in (24, 40))


def test_position_at_the_end_of_a_page_is_reached(pg: PostgreSQL) -> None:
    """The insert position is past the header of a page without records."""

    def end_of_page() -> tuple[int, Any] | None:
        with unrelated_scope() as scope:
            create()
            if not fill_page(pg):
                return None
            token = scope.token
            inserted = pg["pg"].execute(INSERT)[0][0]
            return (inserted, token) if inserted % 8192 in (24, 40) else None

    found = None
    for _ in range(50):
        if (found := end_of_page()) is not None:
            break
    assert found is not None
    inserted, token = found
    assert list(position_in(token).values()) == [inserted - inserted % 8192]
    assert eventually(lambda: server_for(token) in REPLICAS)


def test_position_at_the_end_of_a_page_includes_its_record(pg: PostgreSQL) -> None:
    assert eventually(lambda: fill_page(pg))
    pg.wait_for()
    pg.pause()
    ((_, point),) = position_in(write()).items()
    reported = {
        alias: pg[alias].execute("SELECT pg_last_wal_replay_lsn() - '0/0'") for alias in REPLICAS
    }
    assert all(int(rows[0][0]) < point for rows in reported.values())


def test_position_of_another_cluster_is_never_reached(pg: PostgreSQL) -> None:
    ((log, _),) = position_in(write()).items()
    system, _, timeline = log.rpartition("-")
    other = f"{int(system, 16) + 1:x}-{timeline}"
    until = time.time() + 10
    assert server_for(tokens.dumps({PinKey("pg"): Pin(until, 0.0, Position({log: 1}))})) in REPLICAS
    assert server_for(tokens.dumps({PinKey("pg"): Pin(until, 0.0, Position({other: 1}))})) == "pg"


def test_position_of_another_timeline_is_never_reached(pg: PostgreSQL) -> None:
    ((log, _),) = position_in(write()).items()
    until = time.time() + 10
    for timeline in ("2", "", "11"):
        token = tokens.dumps(
            {PinKey("pg"): Pin(until, None, Position({f"{log.rpartition('-')[0]}-{timeline}": 1}))}
        )
        assert server_for(token) == "pg"


def test_restarted_replica_is_probed_again(pg: PostgreSQL) -> None:
    """After a crash it replays from its last checkpoint, with an older position."""
    pg["pg1"].execute("CHECKPOINT")
    pg.pause("pg2")
    token = write()
    pg.wait_for("pg1")
    assert server_for(token) == "pg1"
    pg["pg1"].set_delay(3600)
    try:
        pg["pg1"].restart("immediate")
        assert pg["pg1"].execute("SELECT count(*) FROM app_book", database="site") == [(0,)]
        assert [titles(token) for _ in range(3)] == [["new"]] * 3
        assert server_for(token) == "pg"
    finally:
        pg["pg1"].set_delay(0)


@override_settings(PINNING_POSITIONS=False)
def test_pin_without_positions_lasts_for_the_window(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    with queries() as asked:
        token = write()
        assert pin_in(token) == Pin(time.time() + 15)
        pg.wait_for()
        assert server_for(token) == "pg"
    assert asked.added == []
    clock.tick(16)
    assert server_for(token) in REPLICAS


# Privileges


@pytest.fixture
def role(pg: PostgreSQL) -> Iterator[Callable[..., None]]:
    """Return a function that connects as a role with privileges on the tables only."""
    pg["pg"].execute("CREATE ROLE plain LOGIN")
    grant = "GRANT ALL ON ALL {} IN SCHEMA public TO plain"
    pg["pg"].execute(grant.format("TABLES"), database="site")
    pg["pg"].execute(grant.format("SEQUENCES"), database="site")
    pg.wait_for()

    def become(name: str = "plain") -> None:
        for alias in ("pg", "pg1", "pg2"):
            connections[alias].close()
            connections[alias].settings_dict["USER"] = name

    become()
    yield become
    become("postgres")
    pg.resume()
    pg["pg"].execute("DROP OWNED BY plain", database="site")
    pg["pg"].execute("DROP ROLE plain")


@pytest.mark.usefixtures("role")
def test_unprivileged_role_is_sufficient(pg: PostgreSQL) -> None:
    pg.pause()
    token = write()
    ((log, _),) = position_in(token).items()
    assert log.endswith("-1")
    assert server_for(token) == "pg"
    pg.resume("pg2")
    # Its monitor resolves the timeline from reports of the primary before and after.
    assert eventually(lambda: write() and server_for(token) == "pg2")
    assert [server_for(token) for _ in range(4)] == ["pg2"] * 4
    assert "new" in titles(token)


@override_settings(PINNING_POSITIONS="lsn")
def test_pin_without_permission_for_the_position_lasts_for_the_window(
    pg: PostgreSQL,
    role: Any,
    visit: Visit,
    clock: FrozenDateTimeFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pinning_middleware")
    function = "EXECUTE ON FUNCTION pg_current_wal_insert_lsn()"
    pg["pg"].execute(f"REVOKE {function} FROM PUBLIC", database="site")
    try:
        visit(create)
    finally:
        pg["pg"].execute(f"GRANT {function} TO PUBLIC", database="site")
    assert visit.response.status_code == 200
    assert pin_in(visit.browser.cookies["pinning"].value).position is None
    assert "its pins last the full window: permission denied" in caplog.text
    pg.wait_for()
    assert visit(read)[0] == "pg"
    clock.tick(16)
    assert visit(read)[0] in REPLICAS


@override_settings(PINNING_POSITIONS="lsn")
def test_replica_without_permission_for_the_position_has_not_caught_up(
    pg: PostgreSQL, role: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pinning_middleware")
    function = "EXECUTE ON FUNCTION pg_last_wal_replay_lsn()"
    pg["pg"].execute(f"REVOKE {function} FROM PUBLIC", database="site")
    try:
        token = write()
        pg.wait_for()
        assert server_for(token) == "pg"
        assert server_for(None) in REPLICAS
    finally:
        pg["pg"].execute(f"GRANT {function} TO PUBLIC", database="site")
    assert "cannot report a replication position" in caplog.text


def test_connection_lost_before_the_position_is_read(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        create()
        pg.terminate("pg")
    assert position_in(scope.token)
    pg.wait_for()
    assert server_for(scope.token) in REPLICAS


def test_primary_fails_before_the_position_is_read(
    pg: PostgreSQL, visit: Visit, caplog: pytest.LogCaptureFixture
) -> None:
    def write_and_crash(request: Any) -> None:
        create()
        pg["pg"].stop("immediate")

    visit(write_and_crash)
    assert visit.response.status_code == 200
    assert pin_in(visit.browser.cookies["pinning"].value).position is None
    assert "Could not read the position of pg" in caplog.text


# Transactions and locks


@pytest.fixture
def atomic_requests(pg: PostgreSQL) -> None:
    connections.settings["pg"]["ATOMIC_REQUESTS"] = True
    connections["pg"].settings_dict["ATOMIC_REQUESTS"] = True


@pytest.fixture
def act(do: Callable[..., str]) -> Callable[..., Any]:
    """Return a function that runs an action in a sync view, with the test's cookies."""
    client = Client()

    def run(action: Callable[[Any], Any], method: str = "get") -> Any:
        results: list[Any] = []
        address = f"/sync/{do(lambda request: results.append(action(request)))}/"
        run.response = getattr(client, method)(address)  # type: ignore[attr-defined]
        return results[0]

    run.client = client  # type: ignore[attr-defined]
    return run


@pytest.mark.usefixtures("atomic_requests")
def test_atomic_requests_read_replicas_with_correct_positions(pg: PostgreSQL, act: Any) -> None:
    before, _, after = act(lambda request: (server(), create(), server()))
    assert before in REPLICAS
    assert after == "pg"
    pin = pin_in(act.client.cookies["pinning"].value)
    assert pin.position
    pg.wait_for()
    served, found = act(read)
    assert served in REPLICAS
    assert found
    act.client.cookies.clear()
    pg.pause()
    act(create)
    assert act(read)[0] == "pg"


@pytest.mark.usefixtures("atomic_requests")
def test_atomic_requests_pin_after_a_rollback(pg: PostgreSQL, act: Any) -> None:
    def fail(request: Any) -> None:
        create()
        transaction.set_rollback(True, using="pg")

    act(fail)
    assert pin_in(act.client.cookies["pinning"].value).position
    pg.wait_for()
    assert act(read)[1] == []


def lock(request: Any = None) -> tuple[str, str, str]:
    before = server()
    with transaction.atomic(using="pg"):
        list(Book.objects.select_for_update())
    return before, server(), server()


def test_locking_read_keeps_the_scope_on_the_primary_without_a_pin(
    pg: PostgreSQL, act: Any
) -> None:
    before, *after = act(lock)
    assert before in REPLICAS
    assert after == ["pg", "pg"]
    assert "pinning" not in act.client.cookies
    assert act(read)[0] in REPLICAS


@pytest.mark.usefixtures("atomic_requests")
def test_locking_read_under_atomic_requests_keeps_the_scope_on_the_primary(
    pg: PostgreSQL, act: Any
) -> None:
    def lock_at_once(request: Any) -> tuple[str, list[tuple[str, str]], str]:
        before = server()
        with capture_reads() as reads:
            list(Book.objects.select_for_update())
        return before, [(read.served, read.reason) for read in reads], server()

    before, reads, after = act(lock_at_once)
    assert before in REPLICAS
    assert reads == [("pg", "lock")]
    assert after == "pg"
    assert "pinning" not in act.client.cookies


def test_open_transaction_does_not_probe_twice(pg: PostgreSQL) -> None:
    token = write()
    pg.wait_for()
    with unrelated_scope(token), transaction.atomic(using="pg"):
        assert server() == "pg"
    assert server_for(token) in REPLICAS


def test_replica_is_not_probed_inside_a_transaction(pg: PostgreSQL) -> None:
    """Its snapshot does not change."""
    with transaction.atomic(using="pg1"), transaction.atomic(using="pg2"):
        for alias in REPLICAS:
            with connections[alias].cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("SELECT count(*) FROM app_book")
        token = write()
        pg.wait_for()
        assert titles(token) == ["new"]
        assert server_for(token) == "pg"


# Outside requests


def test_thread_without_a_scope(pg: PostgreSQL) -> None:
    """Its write pins it to the primary for the window."""

    def work() -> str:
        create()
        return server()

    assert in_thread(work) == "pg"


def test_thread_without_a_scope_pins_no_other_thread(pg: PostgreSQL) -> None:
    pg.pause()
    in_thread(create)
    assert in_thread(server) in REPLICAS
    assert server() in REPLICAS


class Work(BaseCommand):
    def handle(self, *args: Any, **options: Any) -> str:
        before = server()
        create()
        return f"{before} {server()}"


def test_management_command(pg: PostgreSQL, capsys: pytest.CaptureFixture[str]) -> None:
    pg.pause()
    call_command(Work())
    before, after = capsys.readouterr().out.split()
    assert before in REPLICAS
    assert after == "pg"
    assert server() == "pg", "for the window"


def test_ambient_scope_does_not_probe_on_every_read(pg: PostgreSQL) -> None:
    pg.pause()
    create()
    with queries() as asked:
        for _ in range(20):
            assert server() == "pg"
    # One probe of the primary's position, one of each replica (again after a second).
    assert len(asked.added) <= 6


def test_token_contains_the_position(pg: PostgreSQL) -> None:
    pg.pause()
    token = write()
    assert in_thread(lambda: (server_for(token), server_for(token))) == ("pg", "pg")
    pg.resume("pg1")
    assert in_thread(lambda: server_for(token)) == "pg1"


def test_scope_propagates_inherited_pins(pg: PostgreSQL) -> None:
    pg.pause()
    token = write()
    with unrelated_scope(token) as scope:
        assert server() == "pg"
        assert scope.token == token
    with unrelated_scope(scope.token) as scope:
        create()
    assert next(iter(position_in(scope.token).values())) > next(iter(position_in(token).values()))


@async_to_sync
async def read_asynchronously(token: str | None) -> tuple[str, list[str], int, str | None]:
    from asgiref.sync import sync_to_async

    with unrelated_scope(token) as scope:
        found = [book.title async for book in Book.objects.order_by("title")]
        counted = await Book.objects.acount()
        async for _ in Book.objects.aiterator(chunk_size=1):
            pass
        return await sync_to_async(server)(), found, counted, await scope.atoken()


def test_async_code(pg: PostgreSQL) -> None:
    pg.pause()
    token = write()
    assert read_asynchronously(token) == ("pg", ["new"], 1, token)
    pg.resume("pg2")
    assert read_asynchronously(token) == ("pg2", ["new"], 1, token)
    pg.resume("pg1")
    assert read_asynchronously(token)[0] in REPLICAS


def test_async_view_with_async_iteration(
    pg: PostgreSQL, browser: Any, do: Callable[..., str]
) -> None:
    results: list[Any] = []

    async def action(request: Any) -> None:
        found = [book.title async for book in Book.objects.aiterator()]
        results.append(found)

    async def write_asynchronously(request: Any) -> None:
        await Book.objects.acreate(title="new")

    pg.pause()
    browser.get(f"/async/{do(write_asynchronously)}/")
    assert position_in(browser.cookies["pinning"].value)
    browser.get(f"/async/{do(action)}/")
    pg.resume()
    browser.get(f"/async/{do(action)}/")
    browser.get(f"/async/{do(action)}/")
    assert results == [["new"]] * 3


# Several pools


def test_each_pool_has_its_own_position(pg: PostgreSQL) -> None:
    pg["pg"].execute("CREATE DATABASE shop")
    pg.wait_for()
    entries = {
        alias.replace("pg", "shop"): {**entry, "NAME": "shop"}
        for alias, entry in entries_of(pg.cluster).items()
    }
    try:
        with as_databases(entries):
            replicas = {"pg": ["pg1", "pg2"], "shop": ["shop1", "shop2"]}
            with override_settings(PINNING_REPLICAS=replicas):
                make_tables("shop")
                enter(None)
                pg.wait_for()
                pg.pause()
                with unrelated_scope() as scope:
                    Book.objects.using("shop").create(title="new")
                pins = tokens.loads(scope.token or "")
                assert set(pins) == {PinKey("shop")}
                with unrelated_scope(scope.token) as both:
                    assert is_pinned("shop")
                    assert not is_pinned("pg")
                    Book.objects.using("pg").create(title="new")
                pins = tokens.loads(both.token or "")
                assert set(pins) == {PinKey("pg"), PinKey("shop")}
                assert all(pin.position for pin in pins.values()), pins
                by_primary = pools().by_primary
                with unrelated_scope(both.token):
                    assert route(by_primary["pg"]) == "pg"
                    assert route(by_primary["shop"]) == "shop"
                pg.resume()
                with unrelated_scope(both.token) as after:
                    assert route(by_primary["shop"]) in ("shop1", "shop2")
                with unrelated_scope(after.token):
                    assert route(by_primary["pg"]) in ("pg1", "pg2")
    finally:
        pg.resume()
        pg["pg"].execute("DROP DATABASE shop WITH (FORCE)")


# monotonic-reads


def titles_here() -> list[str]:
    return sorted(Book.objects.values_list("title", flat=True))


@pytest.fixture
def monotonic(pg: PostgreSQL) -> Iterator[None]:
    with override_settings(PINNING_CONSISTENCY="monotonic-reads"):
        yield


@pytest.mark.usefixtures("monotonic")
def test_monotonic_reads_across_requests(pg: PostgreSQL, act: Any) -> None:
    pg.pause("pg1")
    in_thread(create)
    pg.wait_for("pg2")

    def starts_fresh() -> bool:
        act.client.cookies.clear()
        return bool(act(read) == ("pg2", ["new"]))

    assert eventually(starts_fresh)
    assert [act(read) for _ in range(8)] == [("pg2", ["new"])] * 8


@pytest.mark.usefixtures("monotonic")
def test_monotonic_reads_after_the_primary(pg: PostgreSQL) -> None:
    pg.pause()
    in_thread(create)
    with unrelated_scope() as scope, use_primary():
        assert len(Book.objects.all()) == 1
    assert [titles(scope.token) for _ in range(4)] == [["new"]] * 4
    assert server_for(scope.token) == "pg"


@pytest.mark.usefixtures("monotonic")
@pytest.mark.parametrize("read_on", [True, False])
def test_monotonic_reads_after_a_replica_failed(pg: PostgreSQL, act: Any, read_on: bool) -> None:
    """Its position is unavailable, so the pin lasts for the window."""
    pg.pause("pg1")
    in_thread(create)
    pg.wait_for("pg2")

    def read_and_crash(request: Any) -> str:
        served, found = read()
        if served == "pg2":
            assert found == ["new"]
            pg["pg2"].stop("immediate")
            if read_on:
                Book.objects.count()
        return served

    def starts_fresh() -> bool:
        act.client.cookies.clear()
        return bool(act(read_and_crash) == "pg2")

    assert eventually(starts_fresh)
    assert [act(read) for _ in range(4)] == [("pg", ["new"])] * 4


@pytest.mark.parametrize("is_identified", [True, False])
def test_monotonic_reads_after_an_alias_has_moved_to_a_replica_behind(
    pg: PostgreSQL, is_identified: bool
) -> None:
    """Within a scope, whose connection was lost; and in the next one."""
    pg.pause("pg2")
    in_thread(create)
    pg.wait_for("pg1")
    with (
        Forwarder(pg["pg1"]) as address,
        as_layout(pg, many=database(address, conn_max_age=None)),
        override_settings(PINNING_CONSISTENCY="monotonic-reads"),
    ):
        # Both servers are known behind the alias.
        for node in (pg["pg2"], pg["pg1"]):
            address.point_to(node)
            connections["many"].close()
            probe_replicas()
        if not is_identified:
            connections["many"].close()
        with unrelated_scope() as scope:
            assert (port(), titles_here()) == (pg["pg1"].port, ["new"])
            address.point_to(pg["pg2"])
            assert titles_here() == ["new"]
            assert port() == pg["pg"].port
        assert titles(scope.token) == ["new"]


@pytest.mark.usefixtures("monotonic")
def test_monotonic_reads_add_one_query(pg: PostgreSQL, act: Any) -> None:
    act(read)
    for _ in range(3):
        with queries() as asked:
            act(read)
        assert len(asked.added) == 1


@pytest.mark.usefixtures("monotonic")
def test_monotonic_reads_after_a_write_query_the_primary_once(pg: PostgreSQL, act: Any) -> None:
    def create_and_read(request: Any) -> None:
        create()
        assert server() == "pg"

    act(create_and_read)
    with queries() as asked:
        act(create_and_read)
    assert len(asked.added) == 1


@pytest.fixture
def commit_that_waits(pg: PostgreSQL) -> Iterator[None]:
    """A commit that pg2 shows, and the primary hides until its synchronous standby confirms it."""
    primary = pg["pg"]
    primary.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{NODES['pg1']}'")
    primary.execute("SELECT pg_reload_conf()")
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    try:
        with ThreadPoolExecutor() as threads, frozen(pg["pg1"]):
            # The checkpointer applies the setting a moment later, and before a checkpoint.
            shown = "SHOW synchronous_standby_names"
            assert eventually(lambda: primary.execute(shown) == [(NODES["pg1"],)])
            primary.execute("CHECKPOINT")
            threads.submit(in_thread, create)
            assert eventually(lambda: primary.execute(waits) == [(1,)])
            found = "SELECT count(*) FROM app_book"
            assert eventually(lambda: pg["pg2"].execute(found, database="site") == [(1,)])
            yield
    finally:
        primary.execute("ALTER SYSTEM RESET synchronous_standby_names")
        primary.execute("SELECT pg_reload_conf()")


@pytest.mark.usefixtures("monotonic", "commit_that_waits")
def test_post_after_reading_a_commit_that_waits_for_a_synchronous_standby(visit: Visit) -> None:
    """Until it writes, it reads from a replica that shows the commit, as the client has seen it."""

    def read_and_write(request: Any) -> list[str]:
        return [read()[0], pin_this_request() or read()[0]]  # type: ignore[func-returns-value]

    mark_unreachable("pg1")
    assert visit(read) == ("pg2", ["new"])
    assert visit(read, method="post") == ("pg2", ["new"])
    assert visit(read_and_write, method="post") == ["pg2", "pg"]
    visit.browser.cookies.clear()
    assert visit(read, method="post") == ("pg", [])


@pytest.mark.usefixtures("monotonic")
def test_post_of_a_client_that_has_read_a_replica_reads_the_primary(
    pg: PostgreSQL, visit: Visit
) -> None:
    assert visit(read)[0] in REPLICAS
    assert visit(read, method="post") == ("pg", [])


@pytest.mark.usefixtures("monotonic")
def test_monotonic_reads_after_a_locking_read(pg: PostgreSQL) -> None:
    pg.pause()
    in_thread(create)
    with unrelated_scope() as scope, transaction.atomic(using="pg"):
        assert len(Book.objects.using("pg").select_for_update()) == 1
    assert titles(scope.token) == ["new"]


@pytest.mark.parametrize("is_atomic", [False, True])
def test_named_replica_behind_does_not_serve_a_scope_that_has_written_before_the_window(
    pg: PostgreSQL, is_atomic: bool
) -> None:
    pg.pause()
    try:
        with unrelated_scope():
            create()
            advance_window(20)
            if is_atomic:
                with pytest.raises(OperationalError), transaction.atomic(using="pg1"):
                    Book.objects.using("pg1").count()
            else:
                assert Book.objects.using("pg1").count() == 1
    finally:
        reset_window()


def test_reads_without_monotonic_reads_set_no_pin(pg: PostgreSQL, act: Any) -> None:
    act(read)
    assert "pinning" not in act.client.cookies


def test_use_replica_takes_precedence_over_a_pin(pg: PostgreSQL) -> None:
    pg.pause()
    token = write()
    with unrelated_scope(token):
        with use_replica():
            assert server() in REPLICAS
        assert server() == "pg"
    assert pool().primary == "pg"
