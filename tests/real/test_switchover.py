"""Addresses that move: connections that stay open to a former primary, or to a standby."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction

from pinning_middleware import tokens, use_primary
from pinning_middleware.backend.call import Call
from pinning_middleware.pins import Pin, PinKey, Position
from pinning_middleware.reasons import Fault
from pinning_middleware.scopes.scope import enter
from pinning_middleware.servers.registry import Server
from pinning_middleware.utils import clock
from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    as_databases,
    endpoint,
    eventually,
    in_thread,
    make_tables,
    pool,
    port,
    port_for,
    probe_replicas,
    titles,
    unrelated_scope,
    write,
)
from .layouts import Address, Forwarder, database
from .mariadb import Servers, running_servers

pytestmark = pytest.mark.real


def token_of(position: dict[str, int] | None) -> str:
    """Return a token as another process makes it for a write at this position."""
    found = None if position is None else Position(position)
    primary = pool().primary
    return tokens.dumps({PinKey(primary): Pin(clock.now() + 15, None, found)})


# A former primary behind the alias of a replica


@contextmanager
def swappable(pg: PostgreSQL, **primary: Any) -> Iterator[tuple[Forwarder, Forwarder]]:
    """Configure aliases whose addresses may move: `site`, `first`; and `second`."""
    with Forwarder(pg["pg"]) as site, Forwarder(pg["pg1"]) as first:
        entries = {
            "site": {**database(site, conn_max_age=None), **primary},
            "first": database(first, conn_max_age=None),
            "second": database(pg["pg2"], conn_max_age=None),
        }
        with as_databases(entries):
            make_tables("site")
            pg.wait_for()
            enter(None)
            yield site, first


def ports_of_unpinned_reads() -> set[int]:
    return {port_for(None) for _ in range(6)}


@pytest.mark.parametrize("is_read_before", [True, False])
def test_former_primary_behind_a_replica_alias_serves_no_read(
    own_pg: PostgreSQL, is_read_before: bool
) -> None:
    """The addresses of two servers are swapped, and the former primary still accepts writes."""
    with swappable(own_pg) as (site, first):
        write("before")
        own_pg.wait_for()
        assert ports_of_unpinned_reads() == {own_pg["pg1"].port, own_pg["pg2"].port}
        own_pg["pg1"].promote()
        site.point_to(own_pg["pg1"])
        first.point_to(own_pg["pg"])
        if is_read_before:
            # No connection has met the new primary by then.
            ports_of_unpinned_reads()
        token = in_thread(lambda: write("new"))
        assert own_pg["pg"].port not in ports_of_unpinned_reads()
        assert "new" in titles(token)
        former = next(s for s in endpoint("first").servers if s.identity.port == own_pg["pg"].port)
        assert former.out_of_rotation == Fault.PROMOTED


def test_former_primary_behind_a_replica_alias_is_noticed_without_a_write(
    own_pg: PostgreSQL,
) -> None:
    """A monitor connects to the primary's alias; this process reads from replicas only."""
    with swappable(own_pg) as (site, first):
        write("before")
        own_pg.wait_for()
        ports_of_unpinned_reads()
        own_pg["pg1"].promote()
        site.point_to(own_pg["pg1"])
        first.point_to(own_pg["pg"])
        assert eventually(lambda: own_pg["pg"].port not in ports_of_unpinned_reads())
        assert own_pg["pg"].port not in ports_of_unpinned_reads()


# The primary's alias after a promotion


def test_connection_to_a_promoted_replica_is_kept_for_pins_of_its_new_timeline(
    own_pg: PostgreSQL,
) -> None:
    """It has reported positions on the timeline of the former primary, too."""
    with swappable(own_pg) as (site, _):
        write("before")
        own_pg.wait_for()
        probe_replicas()
        own_pg["pg"].stop()
        own_pg["pg1"].promote()
        site.point_to(own_pg["pg1"])
        connections["site"].close()
        write("new")
        connection = connections["site"].connection
        for _ in range(3):
            # Another process has made the pin.
            token = write("newer")
            with unrelated_scope(token), use_primary():
                assert port() == own_pg["pg1"].port
        assert connections["site"].connection is connection


# A former primary behind the primary's alias


def test_first_write_of_an_old_connection_goes_to_the_primary_that_others_have_met(
    own_pg: PostgreSQL,
) -> None:
    def meet() -> None:
        assert pool().health.probe(connections["site"]) is not None

    with swappable(own_pg) as (site, _):
        in_thread(meet)
        connections["site"].close()
        with unrelated_scope(), use_primary():
            assert port() == own_pg["pg"].port
        own_pg["pg1"].promote()
        site.point_to(own_pg["pg1"], cut=False)
        in_thread(meet)
        with unrelated_scope():
            Book.objects.create(title="new")
        sql = "SELECT count(*) FROM app_book WHERE title = 'new'"
        assert own_pg["pg1"].execute(sql, database="site") == [(1,)]


def test_pooled_connections_to_a_former_primary_are_all_replaced(own_pg: PostgreSQL) -> None:
    pool_options = {"OPTIONS": {"pool": {"min_size": 3, "max_size": 4}}, "CONN_MAX_AGE": 0}
    with swappable(own_pg, **pool_options) as (site, _):
        try:
            connections["site"].ensure_connection()
            connections["site"].pool.wait()
            write("before")
            own_pg["pg1"].promote()
            site.point_to(own_pg["pg1"], cut=False)
            ((log, _),) = pool().endpoint.server.position.items()  # type: ignore[union-attr]
            later = {f"{log.rpartition('-')[0]}-2": 1}
            own_pg["pg1"].execute("INSERT INTO app_book (title) VALUES ('new')", database="site")
            for _ in range(4):
                assert "new" in titles(token_of(later))
                with unrelated_scope(token_of(later)), use_primary():
                    assert port() == own_pg["pg1"].port
                connections["site"].close()
        finally:
            connections["site"].close()
            connections["site"].close_pool()


POOLED = {"OPTIONS": {"pool": {"min_size": 3, "max_size": 4}}, "CONN_MAX_AGE": 0}


@pytest.mark.parametrize("options", [{}, POOLED], ids=["persistent", "pooled"])
def test_transaction_begins_on_no_connection_to_a_former_primary(
    own_pg: PostgreSQL, options: dict[str, Any]
) -> None:
    with swappable(own_pg, **options) as (site, _):
        try:
            connections["site"].ensure_connection()
            if options:
                connections["site"].pool.wait()  # type: ignore[attr-defined]
            write("before")
            own_pg["pg1"].promote()
            site.point_to(own_pg["pg1"], cut=False)
            with unrelated_scope(token_of(on_next_timeline())), transaction.atomic(using="site"):
                Book.objects.create(title="new")
            sql = "SELECT count(*) FROM app_book WHERE title = 'new'"
            assert own_pg["pg1"].execute(sql, database="site") == [(1,)]
        finally:
            connections["site"].close()
            if options:
                connections["site"].close_pool()  # type: ignore[attr-defined]


def test_transaction_is_not_opened_on_a_standby_that_has_not_reached_the_pin(
    pg: PostgreSQL,
) -> None:
    def read() -> None:
        with transaction.atomic(using="site"):
            Book.objects.count()

    with swappable(pg) as (site, _):
        write("before")
        pg.wait_for()
        pg.pause()
        token = write("new")
        site.point_to(pg["pg2"])
        connections["site"].close()
        with unrelated_scope(token), use_primary():
            connections["site"].ensure_connection()
            with pytest.raises(OperationalError, match="still resolves to the former primary"):
                read()


def on_next_timeline() -> dict[str, int]:
    """Return a position that only a successor of the known primary has."""
    known = pool().endpoint.server
    assert known is not None
    ((log, _),) = known.position.items()
    return {f"{log.rpartition('-')[0]}-2": 1}


def test_standby_behind_the_alias_of_the_primary_serves_no_pin_that_it_has_not_reached(
    pg: PostgreSQL,
) -> None:
    """As for a list of hosts without `target_session_attrs`."""
    with swappable(pg) as (site, _):
        reached = write("before")
        pg.wait_for()
        pg.pause()
        token = write("new")
        site.point_to(pg["pg2"])
        connections["site"].close()
        for each in (None, reached):
            with unrelated_scope(each), use_primary():
                assert port() == pg["pg2"].port
        for each in (token, token_of(None)):
            with (
                unrelated_scope(each),
                pytest.raises(OperationalError, match=Fault.DEMOTED.description),
            ):
                port()
        site.point_to(pg["pg"], cut=False)
        with unrelated_scope(token):
            assert port() == pg["pg"].port


def test_primary_is_not_replaced_by_a_standby_behind_its_alias(pg: PostgreSQL) -> None:
    with swappable(pg) as (site, _):
        token = write("before")
        connection = connections["site"].connection
        site.point_to(pg["pg2"], cut=False)
        in_thread(lambda: pool().health.probe(connections["site"]))
        assert len(pool().endpoint.servers) == 2
        with unrelated_scope(token), use_primary():
            assert port() == pg["pg"].port
        assert connections["site"].connection is connection


# A switchover of MariaDB, where a demoted server keeps its connections


def place_of(server: Any) -> Address:
    return Address("127.0.0.1", server.port)


@pytest.fixture
def my(django_db_setup: None, django_db_blocker: Any) -> Iterator[tuple[Servers, Forwarder]]:
    """The address of the primary's alias may move."""
    with (
        django_db_blocker.unblock(),
        running_servers() as servers,
        Forwarder(place_of(servers["my"])) as address,
    ):
        entries = {"site": servers.entries()["my"], "reader": servers.entries()["my2"]}
        entries["site"]["PORT"] = str(address.port)
        with as_databases(entries):
            make_tables("site")
            servers.wait_for()
            enter(None)
            yield servers, address


def switch_over(servers: Servers, old: str, new: str) -> None:
    """Make another server the primary. The old one follows it, and lags."""
    servers[old].execute("SET GLOBAL read_only = 1")
    position = servers[old].position
    servers[new].execute(f"SELECT MASTER_GTID_WAIT('{position}', 30)")
    servers[new].promote()
    servers[old].execute(f"SET GLOBAL gtid_slave_pos = '{position}'")
    for alias in servers.nodes:
        if alias != new:
            servers[alias].follow(servers[new])
    title = f"by {new}"
    servers[new].execute(f"INSERT INTO app_book (title) VALUES ('{title}')", "site")
    position = servers[new].position
    for alias in servers.nodes:
        if alias != new:
            servers[alias].execute(f"SELECT MASTER_GTID_WAIT('{position}', 30)")
            servers[alias].execute("STOP SLAVE SQL_THREAD")


def write_directly(server: Any, title: str) -> str:
    """Write without this process; return the token of the write."""
    server.execute(f"INSERT INTO app_book (title) VALUES ('{title}')", "site")
    log, _, sequence = server.position.rpartition("-")
    return token_of({log: int(sequence)})


def server_number() -> int:
    with use_primary(), connections[Book.objects.db].cursor() as cursor:
        cursor.execute("SELECT @@server_id")
        return int(cursor.fetchone()[0])


def number_of(servers: Servers, alias: str) -> int:
    return servers[alias].number


def test_only_connection_to_a_demoted_server_is_replaced_for_a_pin_of_its_successor(
    my: tuple[Servers, Forwarder],
) -> None:
    servers, address = my
    write("before")
    switch_over(servers, "my", "my1")
    address.point_to(place_of(servers["my1"]), cut=False)
    token = write_directly(servers["my1"], "new")
    assert "new" in titles(token)
    with unrelated_scope(token):
        assert server_number() == number_of(servers, "my1")


def test_unidentified_connection_to_a_demoted_server_is_replaced_for_a_pin_of_its_successor(
    my: tuple[Servers, Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, address = my
    with unrelated_scope():
        assert server_number() == number_of(servers, "my")
    monkeypatch.setattr("pinning_middleware.routing.primary_connections.FRESH_FOR", 0.0)
    switch_over(servers, "my", "my1")
    address.point_to(place_of(servers["my1"]), cut=False)
    assert "new" in titles(write_directly(servers["my1"], "new"))


@pytest.mark.parametrize("is_atomic", [False, True])
def test_connection_to_a_demoted_server_is_replaced_after_it_has_rejected_a_write(
    my: tuple[Servers, Forwarder], is_atomic: bool
) -> None:
    servers, address = my
    write("before")
    switch_over(servers, "my", "my1")
    address.point_to(place_of(servers["my1"]), cut=False)
    with (
        pytest.raises(OperationalError, match="read-only"),
        transaction.atomic(using="site") if is_atomic else nullcontext(),
    ):
        Book.objects.create(title="new")
    Book.objects.create(title="new")
    assert server_number() == number_of(servers, "my1")


def test_connection_to_a_demoted_server_is_replaced_after_it_was_replaced_and_came_back(
    my: tuple[Servers, Forwarder],
) -> None:
    """`my` is the primary, then `my1`, then `my` again, and no server was restarted."""
    servers, address = my
    write("before")
    switch_over(servers, "my", "my1")
    address.point_to(place_of(servers["my1"]), cut=False)
    connections["site"].close()
    write("at my1")
    assert seen_servers() == [number_of(servers, "my"), number_of(servers, "my1")]
    servers["my"].execute("START SLAVE SQL_THREAD")
    switch_over(servers, "my1", "my")
    address.point_to(place_of(servers["my"]), cut=False)
    # Another thread connects to the primary; this one's connection is to `my1`.
    in_thread(lambda: write("back"))
    with unrelated_scope():
        assert server_number() == number_of(servers, "my")


def test_lag_after_a_switchover_is_measured_by_the_positions_of_the_new_primary(
    my: tuple[Servers, Forwarder],
) -> None:
    """The process writes nothing, and the demoted server keeps its connections."""
    servers, address = my

    def is_lag(expected: Callable[[float | None], bool]) -> bool:
        pool().health.sample_lag()
        return expected(pool().replica_set.lag("reader"))

    write("before")
    servers.wait_for()
    assert eventually(lambda: is_lag(lambda lag: lag == 0.0))
    switch_over(servers, "my", "my1")
    address.point_to(place_of(servers["my1"]), cut=False)
    write_directly(servers["my1"], "new")
    assert eventually(lambda: is_lag(bool))


def seen_servers() -> list[int]:
    """Return the numbers of the servers behind the primary's alias, in the order of their use."""

    def number(server: Server) -> int:
        return int(server.identity.started.split()[1])

    return [number(server) for server in pool().endpoint.servers]


def test_lost_transaction_of_a_pin_reopens_the_connection_once(
    my: tuple[Servers, Forwarder],
) -> None:
    write("before")
    lost = token_of({"0-9": 1})
    raw = connections["site"].connection
    titles(lost)
    reopened = connections["site"].connection
    assert reopened is not raw
    for _ in range(2):
        titles(lost)
    assert connections["site"].connection is reopened


def test_lost_transactions_of_two_pins_reopen_the_connections_of_two_threads(
    my: tuple[Servers, Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other thread notices its own while this one has just connected anew."""
    write("before")
    move_to = Call.move_to

    def move_and_let_the_other_notice(call: Call, connection: Any) -> None:
        move_to(call, connection)
        monkeypatch.undo()
        assert in_thread(lambda: titles(token_of({"0-9": 2}))) == ["before"]

    monkeypatch.setattr(Call, "move_to", move_and_let_the_other_notice)
    assert titles(token_of({"0-9": 1})) == ["before"]
    assert Call.move_to is move_to


def test_connections_to_several_primaries_behind_one_alias_are_kept(
    my: tuple[Servers, Forwarder],
) -> None:
    """As of a Galera cluster behind a load balancer: each is seen again and again."""
    servers, address = my
    servers["my1"].promote()
    write("at my")
    raw = connections["site"].connection
    for alias in ("my1", "my"):
        address.point_to(place_of(servers[alias]), cut=False)
        token = in_thread(lambda alias=alias: write(f"at {alias}"))
    address.point_to(place_of(servers["my1"]), cut=False)
    token = in_thread(lambda: write("at my1, again"))
    for _ in range(2):
        with unrelated_scope(token):
            assert server_number() == number_of(servers, "my")
    assert connections["site"].connection is raw
