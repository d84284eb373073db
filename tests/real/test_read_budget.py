"""What a read may spend on connecting, probing and retrying before the primary serves it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from django.db import close_old_connections, connections
from django.db.backends.postgresql.base import DatabaseWrapper
from django.test import override_settings

from pinning_middleware import no_failover
from pinning_middleware.reasons import Fault
from pinning_middleware.servers import budget, connect
from pinning_middleware.servers.budget import READ_BUDGET, read_budget
from pinning_middleware.servers.registry import registry
from sample_site.cluster import Node
from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    in_threads,
    pool,
    port,
    port_for,
    unrelated_scope,
)
from .layouts import Address, black_hole, database, frozen, haproxy, pgbouncer

pytestmark = pytest.mark.real

SLOW = "SELECT 1 AS id, inet_server_port() AS port, pg_sleep(%s)::text AS slept"


@contextmanager
def stalled(node: Node) -> Iterator[None]:
    """Stop the process that accepts connections; sessions go on."""
    pid = int((node.folder / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def port_of_request() -> int:
    """Return the port of the server that a request reads from; close connections as Django does."""
    try:
        return port_for(None)
    finally:
        close_old_connections()


def both(pg: PostgreSQL, **more: Any) -> dict[str, dict[str, Any]]:
    return {f"r{number}": database(pg[f"pg{number}"], **more) for number in (1, 2)}


@pytest.mark.parametrize(
    "entry", [{}, {"conn_max_age": None}, {"pool": {"min_size": 0, "max_size": 4}}]
)
def test_both_replicas_unresponsive_leaves_the_read_to_the_primary(
    pg: PostgreSQL, entry: dict[str, Any]
) -> None:
    with as_layout(pg, **both(pg, **entry)):
        if "conn_max_age" in entry:
            assert {port_of_request() for _ in range(4)} == {pg["pg1"].port, pg["pg2"].port}
        with frozen(pg["pg1"], pg["pg2"]):
            assert port_of_request() == pg["pg"].port
            # Less than the usual time was left for the second one, which says nothing of it.
            assert len(pool().replica_set.out_of_rotation) == 1
            assert port_of_request() == pg["pg"].port
            assert pool().replica_set.out_of_rotation == {"r1", "r2"}


def test_primary_that_replicas_may_replace_serves_the_read_when_the_budget_is_spent(
    pg: PostgreSQL,
) -> None:
    with (
        override_settings(PINNING_PRIMARY_DOWN="stale"),
        as_layout(pg, **both(pg, conn_max_age=0)),
        frozen(pg["pg1"], pg["pg2"]),
    ):
        connections["site"].close()
        assert port_of_request() == pg["pg"].port


def test_read_begins_with_a_whole_budget_after_a_request_that_used_it_up(pg: PostgreSQL) -> None:
    with as_layout(pg, **both(pg, conn_max_age=0)):
        # As by probes of a primary that does not answer, at the end of the last request.
        read_budget.spend(READ_BUDGET)
        assert port_of_request() in (pg["pg1"].port, pg["pg2"].port)
        assert read_budget.left == READ_BUDGET


@pytest.mark.parametrize("alias", ["pg", "pg1"])
def test_statement_that_never_fails_over_leaves_a_whole_budget(pg: PostgreSQL, alias: str) -> None:
    """A thread may run nothing else, a health check for example."""
    with no_failover():
        with connections[alias].cursor() as cursor:
            read_budget.spend(READ_BUDGET)
            cursor.execute("SELECT 1")
        connections[alias].close()
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT 1")
    assert read_budget.left == READ_BUDGET


def test_two_black_holes_in_one_alias_are_abandoned_together(pg: PostgreSQL) -> None:
    """libpq applies its timeout to each of them."""
    with (
        black_hole() as one,
        black_hole() as other,
        as_layout(
            pg,
            r1=database(one, other, conn_max_age=0),
            r2=database(pg["pg2"], conn_max_age=0),
        ),
    ):
        while not pool().replica_set.out_of_rotation:
            assert port_of_request() == pg["pg2"].port
        assert pool().replica_set.out_of_rotation == {"r1"}


def test_read_that_connects_moves_on_when_another_finds_the_replica_unresponsive(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT", 60.0)
    monkeypatch.setattr(budget, "READ_BUDGET", 100.0)
    with black_hole() as hole:
        entries = {"r1": database(hole, conn_max_age=0), "r2": database(pg["pg2"], conn_max_age=0)}
        with as_layout(pg, **entries), ThreadPoolExecutor() as executor:
            # One of two goes to the black hole, and waits there.
            reads = [executor.submit(port_of_request) for _ in range(2)]
            assert eventually(lambda: any(read.done() for read in reads))
            assert not all(read.done() for read in reads)
            registry.mark_down(endpoint("r1"), Fault.UNRESPONSIVE, 1000, "by another read")
            assert [read.result(20) for read in reads] == [pg["pg2"].port] * 2


def test_name_server_without_an_answer_does_not_hold_up_the_read(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, over = socket.getaddrinfo, threading.Event()

    def hang(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "replica.example":
            over.wait()
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    named = Address("replica.example", pg["pg1"].port)
    entries = {"r1": database(named, conn_max_age=0), "r2": database(pg["pg2"], conn_max_age=0)}
    try:
        with as_layout(pg, **entries):
            assert in_threads(lambda _: port_of_request(), 4) == [pg["pg2"].port] * 4
            while not pool().replica_set.out_of_rotation:
                assert port_of_request() == pg["pg2"].port
            assert pool().replica_set.out_of_rotation == {"r1"}
    finally:
        over.set()


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record the ports that each attempt to connect names."""
    offered: list[list[str]] = []
    connect = DatabaseWrapper.get_new_connection

    def recording(self: Any, params: Any) -> Any:
        offered.append(str(params["port"]).split(","))
        return connect(self, params)

    monkeypatch.setattr(DatabaseWrapper, "get_new_connection", recording)
    return offered


@pytest.mark.parametrize("order", ["disable", "random"])
def test_unresponsive_host_of_a_list_is_not_offered_until_it_answers(
    pg: PostgreSQL, offered: list[list[str]], order: str
) -> None:
    options = {"load_balance_hosts": order}
    entry = database(pg["pg1"], pg["pg2"], conn_max_age=0, options=options)
    stopped, healthy = str(pg["pg1"].port), str(pg["pg2"].port)
    with as_layout(pg, many=entry):
        with frozen(pg["pg1"]):
            while not endpoint("many").unresponsive_hosts:
                assert port_of_request() == pg["pg2"].port
            offered.clear()
            assert {port_of_request() for _ in range(10)} == {pg["pg2"].port}
            # Its monitor offers it alone.
            assert {tuple(each) for each in offered} <= {(healthy,), (stopped,)}
            assert offered.count([healthy]) >= 10
            assert pool().replica_set.out_of_rotation == frozenset()
        assert eventually(lambda: not endpoint("many").unresponsive_hosts)
        assert port_of_request() in (pg["pg1"].port, pg["pg2"].port)
        assert sorted(offered[-1]) == sorted([stopped, healthy])


def test_attempt_beside_an_unanswered_one_reaches_another_host_of_a_balancer(
    pg: PostgreSQL, offered: list[list[str]]
) -> None:
    """After the first one, no read waits for the host that does not answer."""
    with (
        haproxy(pg["pg1"], pg["pg2"]) as proxy,
        as_layout(pg, many=database(proxy, conn_max_age=0)),
    ):
        while len(endpoint("many").servers) < 2:
            connections["many"].close()
            pool().health.probe(connections["many"])
        with frozen(pg["pg1"]):
            assert [port_of_request() for _ in range(12)] == [pg["pg2"].port] * 12
            assert endpoint("many").hung_at > 0
            assert pool().replica_set.out_of_rotation == frozenset()


def test_only_server_of_an_alias_is_not_connected_to_by_many_attempts(
    pg: PostgreSQL, offered: list[list[str]]
) -> None:
    """Another attempt that is answered earlier says nothing of a busy server."""
    with black_hole() as hole, as_layout(pg, r1=database(hole, conn_max_age=0)):
        endpoint("r1").hung_at = time.monotonic()
        assert port_of_request() == pg["pg"].port
        by_the_read = offered[: offered.index([str(pg["pg"].port)])]
        assert len(by_the_read) <= 2


def test_slow_query_completes_while_another_server_of_the_balancer_is_unresponsive(
    pg: PostgreSQL,
) -> None:
    with (
        haproxy(pg["pg1"], pg["pg2"]) as proxy,
        as_layout(pg, many=database(proxy, conn_max_age=None)),
        unrelated_scope(),
    ):
        mine = port()
        (other,) = (node for node in (pg["pg1"], pg["pg2"]) if node.port != mine)
        with frozen(other):
            for _ in range(4):
                # The balancer connects each check to the next server.
                (book,) = Book.objects.using("many").raw(SLOW, [0.7])
                assert (book.port, book.slept) == (mine, "")


def test_slow_query_completes_while_its_server_accepts_no_connections(pg: PostgreSQL) -> None:
    """The monitor's connection finds the session."""
    with as_layout(pg, r1=database(pg["pg1"], conn_max_age=None)), unrelated_scope():
        (book,) = Book.objects.using("r1").raw(SLOW, [1])
        assert book.port == pg["pg1"].port
        with stalled(pg["pg1"]):
            (book,) = Book.objects.using("r1").raw(SLOW, [2])
        assert (book.port, book.slept) == (pg["pg1"].port, "")
        assert pool().replica_set.out_of_rotation == frozenset()


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_read_that_a_pooler_holds_back_for_a_crashed_server_fails_over(
    own_pg: PostgreSQL, mode: str
) -> None:
    """PgBouncer retries a login every ``server_login_retry`` (15 s), and answers in its place."""
    pg = own_pg
    with ExitStack() as stack:
        bouncer = stack.enter_context(pgbouncer(pg["pg1"], pool_mode=mode, server_login_retry="15"))
        stack.enter_context(
            as_layout(
                pg,
                r1=database(bouncer, conn_max_age=None),
                r2=database(pg["pg2"], conn_max_age=None),
            )
        )
        assert {port_of_request() for _ in range(4)} == {pg["pg1"].port, pg["pg2"].port}
        pg["pg1"].stop("immediate")
        served = {in_thread(lambda: port_of_request()) for _ in range(4)}
        served |= {port_of_request() for _ in range(4)}
        assert served == {pg["pg2"].port}
        assert pool().replica_set.out_of_rotation == {"r1"}
