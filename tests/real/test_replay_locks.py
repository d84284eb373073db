"""Reads on a standby that wait for a lock that WAL replay holds, as during a migration."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connections, transaction

from pinning_middleware import no_failover
from pinning_middleware.reasons import Fault
from pinning_middleware.servers import monitor
from pinning_middleware.servers.liveness import ReplayWaits
from pinning_middleware.servers.probe import state_of
from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    SentSignals,
    as_layout,
    eventually,
    in_thread,
    make_retry_due,
    pool,
    port_for,
    unrelated_scope,
)
from .layouts import Forwarder, database, make_role, pgbouncer

pytestmark = pytest.mark.real

WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'"
REPLAY_WAITS = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
READ = (
    "SELECT 1 AS id, inet_server_port() AS port FROM (SELECT count(*) FROM app_book) AS all_books"
)


@pytest.fixture
def pg(own_pg: PostgreSQL) -> PostgreSQL:
    """A cluster whose standbys let queries delay replay for longer than any test takes."""
    for node in own_pg.cluster.nodes.values():
        node.execute("ALTER SYSTEM SET max_standby_streaming_delay = '10min'")
        node.execute("SELECT pg_reload_conf()")
    return own_pg


@contextmanager
def migration_behind_a_report(pg: PostgreSQL, *aliases: str) -> Iterator[None]:
    """Make replay on these replicas wait for a report, and all later reads of the table for it."""
    reports = [psycopg.connect(pg[alias].conninfo("site")) for alias in aliases]
    try:
        for report in reports:
            report.execute("SELECT count(*) FROM app_book")
        pg["pg"].execute("LOCK app_book IN ACCESS EXCLUSIVE MODE; SELECT 1", database="site")
        for alias in aliases:
            assert eventually(lambda a=alias: pg[a].execute(REPLAY_WAITS) == [(1,)])
        yield
    finally:
        for report in reports:
            report.close()


def layout(pg: PostgreSQL, **more: Any) -> dict[str, dict[str, Any]]:
    return {f"r{n}": database(pg[f"pg{n}"], conn_max_age=None, **more) for n in (1, 2)}


@contextmanager
def bounced_layout(pg: PostgreSQL, mode: str) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield the layout with PgBouncer before each replica, for a role with few privileges."""
    user = make_role(pg.cluster)
    with ExitStack() as stack:
        bouncers = {
            f"r{n}": stack.enter_context(pgbouncer(pg[f"pg{n}"], pool_mode=mode)) for n in (1, 2)
        }
        yield {
            alias: database(bouncer, conn_max_age=None, user=user)
            for alias, bouncer in bouncers.items()
        }


def elsewhere(pg: PostgreSQL) -> set[int]:
    """Return the servers that may take over; on a busy machine little of the budget is left."""
    return {pg["pg2"].port, pg["pg"].port}


def read(alias: str) -> int:
    with unrelated_scope():
        (book,) = Book.objects.using(alias).raw(READ)
    return int(book.port)


@pytest.mark.parametrize("role", ["superuser", "plain"])
def test_read_behind_a_replayed_lock_is_served_elsewhere(
    pg: PostgreSQL, sent_signals: SentSignals, role: str
) -> None:
    more = {"user": make_role(pg.cluster)} if role == "plain" else {}
    with as_layout(pg, **layout(pg, **more)), migration_behind_a_report(pg, "pg1"):
        with ThreadPoolExecutor(4) as threads:
            reads = [threads.submit(in_thread, lambda: read("r1")) for _ in range(4)]
            assert {each.result(30) for each in reads} <= elsewhere(pg)
        # What was given up does not run on.
        assert eventually(lambda: pg["pg1"].execute(WAITING) == [(0,)])
        assert eventually(lambda: pool().replica_set.out_of_rotation == {"r1"})
        assert {port_for(None) for _ in range(4)} == {pg["pg2"].port}
        (removed,) = sent_signals.of("replica_removed")
        assert (removed["replica"], removed["reason"]) == ("r1", "replay_waits")


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_read_behind_a_pooler_and_a_replayed_lock_is_served_elsewhere(
    pg: PostgreSQL, mode: str
) -> None:
    with bounced_layout(pg, mode) as aliases, as_layout(pg, **aliases):
        read("r1")
        with migration_behind_a_report(pg, "pg1"):
            with ThreadPoolExecutor(4) as threads:
                reads = [threads.submit(in_thread, lambda: read("r1")) for _ in range(4)]
                assert {each.result(30) for each in reads} <= elsewhere(pg)
            assert eventually(lambda: pg["pg1"].execute(WAITING) == [(0,)])
            assert eventually(lambda: pool().replica_set.out_of_rotation == {"r1"})


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_slow_read_behind_a_pooler_goes_on_beside_one_that_waits_for_a_lock(
    pg: PostgreSQL, mode: str
) -> None:
    """Both have been running for as long, and a pooler does not tell which session is whose."""
    slow = "SELECT 1 AS id, inet_server_port() AS port FROM pg_sleep(2)"

    def report() -> int:
        with unrelated_scope():
            (book,) = Book.objects.using("r1").raw(slow)
        return int(book.port)

    with bounced_layout(pg, mode) as aliases, as_layout(pg, **aliases):
        read("r1")
        conninfo = pg["pg1"].conninfo("site", user=aliases["r1"]["USER"])
        with (
            psycopg.connect(conninfo) as waiting,
            ThreadPoolExecutor(2) as threads,
            migration_behind_a_report(pg, "pg1"),
        ):
            threads.submit(waiting.execute, "SELECT count(*) FROM app_book")
            assert threads.submit(in_thread, report).result(30) == pg["pg1"].port
        assert pool().replica_set.out_of_rotation == set()


def test_replica_returns_when_its_replay_goes_on(pg: PostgreSQL) -> None:
    with as_layout(pg, **layout(pg)):
        with migration_behind_a_report(pg, "pg1"):
            assert read("r1") in elsewhere(pg)
            assert eventually(lambda: pool().replica_set.out_of_rotation == {"r1"})
            make_retry_due("r1")
            assert not eventually(lambda: not pool().replica_set.out_of_rotation, 0.5)
        assert eventually(lambda: not pool().replica_set.out_of_rotation)
        assert {port_for(None) for _ in range(4)} == {pg["pg1"].port, pg["pg2"].port}


def test_blocked_server_behind_a_balancer_is_taken_out_by_the_read_that_waited(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch, sent_signals: SentSignals
) -> None:
    """The monitor may be connected to another server, and new connections are identified first."""
    monkeypatch.setattr(monitor.Monitors, "wake", lambda *args: None)

    def identify() -> None:
        assert pool().health.probe(connections["many"])

    with Forwarder(pg["pg2"]) as address, as_layout(pg, many=database(address, conn_max_age=None)):
        in_thread(identify)
        address.point_to(pg["pg1"], cut=False)
        identify()
        server = state_of(connections["many"]).server
        assert server is not None
        with migration_behind_a_report(pg, "pg1"):
            assert read("many") == pg["pg"].port
            assert server.out_of_rotation is Fault.REPLAY_WAITS
            assert {in_thread(lambda: read("many")) for _ in range(3)} == {pg["pg"].port}
            errors = [each["error"] for each in sent_signals.of("read_retried")]
            assert len([error for error in errors if isinstance(error, ReplayWaits)]) == 1
            server.retry_at = 0.0
            assert in_thread(lambda: read("many")) == pg["pg"].port
        server.retry_at = 0.0
        assert in_thread(lambda: read("many")) == pg["pg1"].port
        assert server.out_of_rotation is None


def test_read_behind_replayed_locks_on_both_replicas_is_served_by_the_primary(
    pg: PostgreSQL,
) -> None:
    with as_layout(pg, **layout(pg)), migration_behind_a_report(pg, "pg1", "pg2"):
        assert read("r1") == pg["pg"].port
        assert eventually(lambda: pool().replica_set.out_of_rotation >= {"r1"})


@pytest.mark.parametrize("how", ["transaction", "no_failover"])
def test_read_that_cannot_move_waits_for_the_lock(pg: PostgreSQL, how: str) -> None:
    def wait() -> int:
        cannot_move = transaction.atomic(using="r1") if how == "transaction" else no_failover()
        with unrelated_scope(), cannot_move:
            (book,) = Book.objects.using("r1").raw(READ)
        return int(book.port)

    with as_layout(pg, **layout(pg)), ThreadPoolExecutor(1) as threads:
        with migration_behind_a_report(pg, "pg1"):
            waiting = threads.submit(in_thread, wait)
            assert eventually(lambda: pg["pg1"].execute(WAITING) == [(1,)])
            # Long enough for a read that could move to be given up.
            assert not eventually(lambda: pg["pg1"].execute(WAITING) == [(0,)], 2.5)
        assert waiting.result(30) == pg["pg1"].port


@pytest.mark.parametrize("parameter", ["lock_timeout", "statement_timeout"])
def test_timeout_of_a_role_behind_a_replayed_lock_fails_over(
    pg: PostgreSQL, parameter: str
) -> None:
    options = {"options": f"-c {parameter}=600"}
    with as_layout(pg, **layout(pg, options=options)), migration_behind_a_report(pg, "pg1"):
        assert read("r1") in elsewhere(pg)
        assert eventually(lambda: pool().replica_set.out_of_rotation == {"r1"})


def test_statement_timeout_of_a_slow_query_is_raised(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    options = {"options": "-c statement_timeout=600"}
    with as_layout(pg, **layout(pg, options=options)), unrelated_scope():
        with pytest.raises(OperationalError) as raised:
            list(Book.objects.using("r1").raw("SELECT 1 AS id FROM pg_sleep(5)"))
        assert raised.value.__cause__.sqlstate == "57014"  # type: ignore[union-attr]
        assert connections["r1"].connection is not None
    assert sent_signals == []


def test_lock_timeout_of_a_primary_behind_the_alias_of_a_replica_is_raised(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """As behind the reader endpoint of a cluster without readers."""
    options = {"options": "-c lock_timeout=300"}
    with (
        Forwarder(pg["pg"]) as address,
        as_layout(pg, r1=database(address, conn_max_age=None, options=options)),
        psycopg.connect(pg["pg"].conninfo("site")) as migration,
    ):
        migration.execute("LOCK app_book IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(OperationalError) as raised:
            read("r1")
        assert raised.value.__cause__.sqlstate == "55P03"  # type: ignore[union-attr]
        assert sent_signals == []
