"""Aliases that resolve to several servers, to a different one, or to the primary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
from django.db import close_old_connections, connections

from pinning_middleware import tokens
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.policy import decide
from pinning_middleware.scopes.scope import current_scope
from pinning_middleware.servers.catch_up import CatchUp
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.registry import registry
from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    SentSignals,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    in_threads,
    pool,
    pooled,
    port,
    port_for,
    probe_replicas,
    queries,
    server_of,
    titles,
    unrelated_scope,
    write,
)
from .layouts import Forwarder, database, frozen, haproxy, pgbouncer

pytestmark = pytest.mark.real

THREADS, ROUNDS = 8, 30


@contextmanager
def behind(pg: PostgreSQL, way: str, conn_max_age: int | None = None) -> Iterator[None]:
    """Configure one alias, `many`, that resolves to both replicas."""
    nodes = pg["pg1"], pg["pg2"]
    with ExitStack() as stack:
        if way == "haproxy":
            entry = database(stack.enter_context(haproxy(*nodes)), conn_max_age=conn_max_age)
        elif way == "pool":
            entry = pooled(*nodes)
        else:
            entry = database(*nodes, conn_max_age=conn_max_age)
        stack.enter_context(as_layout(pg, many=entry))
        yield


def both_are_known() -> bool:
    with closing(dedicated_connection("many")) as connection:
        pool().health.probe(connection)
    return len(endpoint("many").recent_servers) == 2


WAYS = [("hosts", 0), ("hosts", None), ("haproxy", 0), ("haproxy", None), ("pool", 0)]


@pytest.mark.parametrize(("way", "conn_max_age"), WAYS)
def test_own_writes_are_always_visible(pg: PostgreSQL, way: str, conn_max_age: int | None) -> None:
    """One of the two servers is paused; the other one serves reads."""

    def visit(number: int) -> list[tuple[bool, int]]:
        seen = []
        for turn in range(ROUNDS):
            title = f"{number}-{turn}"
            token = write(title)
            for _ in range(3):
                with unrelated_scope(token):
                    found = Book.objects.filter(title=title).exists()
                    seen.append((found, port()))
                close_old_connections()
        return seen

    pg.pause("pg1")
    with behind(pg, way, conn_max_age):
        assert eventually(both_are_known)
        seen = [one for several in in_threads(visit, THREADS) for one in several]
    assert len(seen) == THREADS * ROUNDS * 3
    assert all(found for found, _ in seen)
    # A connection to the paused server is reopened, or the primary is used.
    assert {pg["pg2"].port} <= {by for _, by in seen} <= {pg["pg"].port, pg["pg2"].port}


def test_server_of_the_current_connection_decides(pg: PostgreSQL) -> None:
    """Two threads use different servers of one alias; one of them has the write."""
    first, second = pg["pg1"], pg["pg2"]
    with (
        Forwarder(first) as address,
        as_layout(pg, many=database(address, conn_max_age=None)),
    ):
        pg.pause("pg1")
        token = write("one")
        pg.wait_for("pg2")
        assert port_for(token) == pg["pg"].port
        address.point_to(second, cut=False)
        assert in_thread(lambda: port_for(token)) == second.port
        # The other thread's server has caught up, this one's has not: a read without a pin
        # stays on it, a pinned read uses the server of another connection.
        assert port_for(None) == first.port
        for _ in range(3):
            assert titles(token) == ["one"]
            assert port_for(token) == second.port
            assert in_thread(lambda: port_for(token)) == second.port


def test_connection_to_a_server_that_is_known_to_be_behind_is_replaced_at_once(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While other reads probe a server that is behind, nothing is known of the one that is not."""
    with (
        Forwarder(pg["pg2"]) as address,
        as_layout(pg, many=database(address, conn_max_age=None)),
    ):
        in_thread(probe_replicas)
        address.point_to(pg["pg1"], cut=False)
        pg.pause("pg1")
        token = write("one")
        pg.wait_for("pg2")
        assert port_for(token) == pg["pg"].port
        assert port_for(None) == pg["pg1"].port
        address.point_to(pg["pg2"], cut=False)
        in_thread(probe_replicas)
        monkeypatch.setattr(CatchUp, "claim_probe", lambda self: False)
        assert port_for(token) == pg["pg2"].port


def test_pooled_connections_to_a_lagging_server_are_replaced(
    pg: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    """All connections of Django's pool are to one server, until a pinned read needs the other."""
    caplog.set_level("WARNING", "psycopg.pool")
    entry = {"pool": {"min_size": 0, "max_size": 1}}
    with Forwarder(pg["pg2"]) as address, as_layout(pg, many=database(address, **entry)):
        probe_replicas()
        known = endpoint("many").server
        address.point_to(pg["pg1"], cut=True)
        close_old_connections()
        probe_replicas()
        assert known in endpoint("many").recent_servers
        pg.pause("pg1")
        token = write("one")
        pg.wait_for("pg2")
        assert port_for(token) == pg["pg"].port
        caplog.clear()
        address.point_to(pg["pg2"], cut=False)
        assert eventually(lambda: close_old_connections() or port_for(token) == pg["pg2"].port)
        assert caplog.messages == []


@pytest.mark.parametrize("is_mute", [False, True])
def test_unresponsive_server_behind_a_shared_alias_is_probed_again(
    pg: PostgreSQL, is_mute: bool
) -> None:
    """Its alias stays in rotation, so no monitor retries it; a read does when it is due."""
    first, second = pg["pg1"], pg["pg2"]
    with Forwarder(first) as address, as_layout(pg, many=database(address, conn_max_age=None)):
        probe_replicas()
        assert port_for(None) == first.port
        silent = server_of("many")
        address.point_to(second, cut=False)
        in_thread(probe_replicas)
        registry.set_status(silent, Fault.UNRESPONSIVE, 1000, "by the test")
        assert port_for(None) == pg["pg"].port
        silent.retry_at = 0.0
        if is_mute:
            with frozen(first):
                assert port_for(None) == pg["pg"].port
            assert silent.out_of_rotation == "unresponsive"
        else:
            assert {port_for(None) for _ in range(3)} == {first.port}
        assert pool().replica_set.out_of_rotation == frozenset()


@pytest.mark.parametrize("conn_max_age", [0, None])
@pytest.mark.parametrize("cut", [True, False])
def test_address_that_moves_to_a_lagging_server(
    pg: PostgreSQL, cut: bool, conn_max_age: int | None
) -> None:
    pg.pause("pg1")
    with (
        Forwarder(pg["pg2"]) as address,
        as_layout(pg, moving=database(address, conn_max_age=conn_max_age)),
    ):
        token = write("one")
        pg.wait_for("pg2")
        assert port_for(token) == pg["pg2"].port
        address.point_to(pg["pg1"], cut=cut)
        served = []
        for _ in range(6):
            close_old_connections()
            assert titles(token) == ["one"]
            served.append(port_for(token))
            assert in_thread(lambda: titles(token)) == ["one"]
        stays = not cut and conn_max_age is None
        assert set(served) == {pg["pg2" if stays else "pg"].port}
        pg.resume("pg1")
        assert eventually(lambda: close_old_connections() or port_for(token) != pg["pg"].port)


def test_address_that_moves_to_a_restarted_server(pg: PostgreSQL) -> None:
    """The restarted process is a different server than the one registered before."""
    with (
        Forwarder(pg["pg1"]) as address,
        as_layout(pg, moving=database(address, conn_max_age=0)),
    ):
        token = write("one")
        pg.wait_for("pg1")
        assert port_for(token) == pg["pg1"].port
        close_old_connections()
        before = endpoint("moving").server
        pg["pg1"].restart()
        # It replays its log again, from before the position of the token.
        pg.wait_for("pg1")
        assert port_for(token) == pg["pg1"].port
        assert endpoint("moving").server not in (None, before)


# PgBouncer


def test_pooler_of_several_servers_is_detected(
    pg: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    """Each transaction may use another server, so no probe is valid for the next one."""
    with (
        pgbouncer(pg["pg1"], pg["pg2"], server_round_robin="1") as bouncer,
        as_layout(pg, many=database(bouncer, conn_max_age=None)),
        all_connections_open(bouncer),
    ):
        for number in range(20):
            token = write(f"{number}")
            pg.wait_for()
            assert f"{number}" in titles(token)
        assert endpoint("many").pooler_mixes_servers
        pg.pause("pg1")
        for number in range(20):
            token = write(f"more {number}")
            assert f"more {number}" in titles(token)
            assert port_for(token) == pg["pg"].port
            assert f"more {number}" in in_thread(lambda token=token: titles(token))
        assert endpoint("many").out_of_rotation is None
        assert {port_for(None) for _ in range(8)} <= {pg["pg1"].port, pg["pg2"].port}
    said = [one.getMessage() for one in caplog.records if "connection pooler" in one.getMessage()]
    assert said == [
        "many resolves to several servers behind a connection pooler; positions are ignored, "
        "and it serves no pinned reads. Give each server an alias of its own."
    ]


@contextmanager
def all_connections_open(bouncer: Any) -> Iterator[None]:
    """Make the pooler connect to each of its servers."""
    import psycopg

    with ExitStack() as stack:
        held = [
            stack.enter_context(
                psycopg.connect(
                    host=bouncer.host, port=bouncer.port, user="postgres", dbname="site"
                )
            )
            for _ in range(2)
        ]
        for one in held:
            one.execute("SELECT 1")
        for one in held:
            one.rollback()
        yield


def test_pooler_of_one_server_reports_positions(
    pg: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pgbouncer(pg["pg1"]) as bouncer,
        as_layout(pg, one=database(bouncer, conn_max_age=None)),
    ):
        for number in range(5):
            token = write(f"{number}")
            pg.wait_for("pg1")
            assert port_for(token) == pg["pg1"].port
        pg.pause("pg1")
        token = write("last")
        assert [port_for(token) for _ in range(3)] == [pg["pg"].port] * 3
        assert "last" in titles(token)
        assert not endpoint("one").pooler_mixes_servers
    assert "behind a pooler" not in caplog.text


# Aliases that resolve to the primary


@pytest.mark.parametrize("known", [True, False])
def test_reader_endpoint_without_readers_resolves_to_the_primary(
    pg: PostgreSQL, sent_signals: SentSignals, known: bool
) -> None:
    """It then resolves to the primary, which stays in rotation and has every write."""
    with (
        Forwarder(pg["pg"] if not known else pg["pg1"]) as address,
        as_layout(pg, readers=database(address, conn_max_age=None)),
    ):
        if known:
            assert port_for(None) == pg["pg1"].port
            address.point_to(pg["pg"])
        pg.pause()
        assert {port_for(None) for _ in range(4)} == {pg["pg"].port}
        for number in range(3):
            token = write(f"{number}")
            with unrelated_scope(token):
                assert decide(pool(), current_scope()).alias == "readers"
                assert f"{number}" in list(Book.objects.values_list("title", flat=True))
        assert endpoint("readers").out_of_rotation is None
        assert pool().replica_set.out_of_rotation == frozenset()
    assert sent_signals.of("replica_removed") == []


# Probes of new connections


COSTS: list[tuple[str, Callable[[PostgreSQL], dict[str, Any]]]] = [
    ("CONN_MAX_AGE = 0", lambda pg: database(pg["pg1"], conn_max_age=0)),
    ("pool", lambda pg: pooled(pg["pg1"])),
]


@pytest.mark.parametrize("entry", [entry for _, entry in COSTS], ids=[name for name, _ in COSTS])
def test_new_connection_to_a_known_server_keeps_its_state(
    pg: PostgreSQL, entry: Callable[[PostgreSQL], dict[str, Any]]
) -> None:
    with as_layout(pg, replica=entry(pg)):
        token = write("one")
        pg.wait_for("pg1")
        assert port_for(token) == pg["pg1"].port
        for _ in range(4):
            close_old_connections()
            with queries() as asked:
                assert port_for(token) == pg["pg1"].port
                assert titles(token) == ["one"]
            assert len(asked.questions.get("replica", ())) <= 1
            assert "site" not in asked.questions
            assert asked["site"] == []


@pytest.mark.usefixtures("untracked")
def test_pooled_connection_is_identified_once(pg: PostgreSQL) -> None:
    with as_layout(pg, replica=pooled(pg["pg1"])):
        asked_by_turns = []
        for number in range(4):
            token = write(f"{number}")
            pg.wait_for("pg1")
            with queries() as asked:
                assert port_for(token) == pg["pg1"].port
            asked_by_turns.append(
                sum("pg_postmaster_start_time" in sql for sql in asked.questions["replica"])
            )
            close_old_connections()
        assert asked_by_turns == [1, 0, 0, 0]


def test_unpinned_read_does_not_probe(pg: PostgreSQL) -> None:
    with as_layout(pg, replica=database(pg["pg1"], conn_max_age=0)):
        port_for(None)
        for _ in range(3):
            close_old_connections()
            with queries() as asked:
                assert port_for(None) == pg["pg1"].port
            assert asked.questions == {}
            assert asked["site"] == []


def test_iterator_of_a_server_that_is_behind_keeps_its_connection(pg: PostgreSQL) -> None:
    """Another server behind the alias has the write that a read inside the loop requires."""
    for number in range(10):
        write(f"{number}")
    pg.wait_for()
    with behind(pg, "hosts"), unrelated_scope():
        assert eventually(both_are_known)
        rows = Book.objects.using("many").iterator(chunk_size=2)
        titles_seen = [next(rows).title]
        probed = pool().health.probe(connections["many"])
        assert probed is not None
        server = probed.server
        lagging = "pg1" if server.identity.port == pg["pg1"].port else "pg2"
        pg.pause(lagging)
        current_scope().inherit(tokens.loads(write("new")))
        assert Book.objects.filter(title="new").exists()
        titles_seen += [book.title for book in rows]
    assert set(titles_seen) >= {f"{number}" for number in range(10)}
