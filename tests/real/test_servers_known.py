"""What is known is known of a server: of the process that answered, not of a name for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.test import override_settings
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.routing.replica_set import Nodes
from pinning_middleware.servers.probe import ProbeResult
from pinning_middleware.servers.registry import Server
from sample_site.cluster import Cluster

from .conftest import (
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
    port_for,
    position_in,
    queries,
    server_for,
    titles,
    write,
)
from .layouts import (
    come_back_behind,
    database,
    frozen,
    keep_copy,
    make_role,
    promote,
    rejoin,
    wait_replayed,
)

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
ROLES = ["superuser", "monitor", "plain"]
RECEIVERS = "SELECT count(*) FROM pg_stat_wal_receiver"


def user_of(cluster: Cluster, role: str) -> dict[str, str]:
    return {} if role == "superuser" else {"user": make_role(cluster, monitor=role == "monitor")}


@contextmanager
def as_role(pg: PostgreSQL, role: str) -> Iterator[None]:
    """Let Django be this role on all nodes: `site`, `r1` and `r2`."""
    more = user_of(pg.cluster, role)
    entries = {f"r{n}": database(pg[f"pg{n}"], conn_max_age=None, **more) for n in (1, 2)}
    with as_layout(pg, **entries):
        connections["site"].close()
        connections.settings["site"].update(database(pg["pg"], conn_max_age=None, **more))
        yield


def test_a_connection_is_asked_once_who_it_leads_to(pg: PostgreSQL) -> None:
    pg.pause("pg2")
    who = []
    for number in range(4):
        token = write(f"{number}")
        pg.wait_for("pg1")
        with queries() as asked:
            assert server_for(token) == "pg1"
        asked_there = asked.questions["pg1"]
        who.append(sum("pg_postmaster_start_time" in sql for sql in asked_there))
    assert who == [1, 0, 0, 0]


def test_a_session_s_time_zone_makes_no_other_server(pg: PostgreSQL) -> None:
    """Which one a connection leads to is asked after the site has had it."""

    def look_from(zone: str) -> Server:
        with connections["pg1"].cursor() as cursor:
            cursor.execute("SET TIME ZONE %s", [zone])
        seen = pool().look_at(connections["pg1"])
        assert seen is not None
        return seen.server

    first = in_thread(lambda: look_from("Asia/Tokyo"))
    assert in_thread(lambda: look_from("Europe/Berlin")) is first
    assert endpoint("pg1").server is first


# Servers that are not where they were


def test_a_replica_that_comes_back_behind_serves_nobody(pg: PostgreSQL, heard: Heard) -> None:
    """Until it is there again, and whoever asks: it was at a point that it has lost."""
    copy = keep_copy(pg["pg1"])
    try:
        write("one")
        pg.wait_for()
        look_around()
        pg.pause("pg2")
        token = write("two")
        pg.wait_for("pg1")
        assert server_for(token) == "pg1"
        come_back_behind(pg["pg1"], copy)
        assert pg["pg1"].execute("SELECT count(*) FROM app_book", database="site") == [(0,)]
        assert [titles(token) for _ in range(4)] == [["one", "two"]] * 4
        for _ in range(4):
            titles()
        assert pool().out == {"pg1"}
        assert heard.of("replica_removed")[-1]["reason"] == "stale_restart"
        assert {server_for(None) for _ in range(4)} == {"pg2"}
    finally:
        rejoin(pg["pg1"])
    wait_replayed(pg["pg"], pg["pg1"])
    assert eventually(lambda: look_again("pg1") or pool().out == frozenset())
    assert eventually(lambda: server_for(token) == "pg1")
    assert titles(token) == ["one", "two"]


@pytest.mark.parametrize("role", ROLES)
def test_a_replica_ahead_of_the_promoted_one_has_nothing_of_it(
    own_pg: PostgreSQL, role: str
) -> None:
    """Its position, of the lost timeline, is at first greater than those of new writes."""
    first, second = own_pg["pg1"], own_pg["pg2"]
    with as_role(own_pg, role):
        write("kept")
        own_pg.wait_for()
        look_around()
        first.stop()
        lost = write("lost")
        own_pg["pg"].execute("SELECT pg_logical_emit_message(true, '', repeat('x', 60000))")
        own_pg.wait_for("pg2")
        look_around_one("r2")
        own_pg["pg"].stop("immediate")
        first.start()
        promote(first)
        # The site is told; the other replica is told too, and can't follow.
        connections["site"].close()
        connections.settings["site"]["PORT"] = str(first.port)
        second.repoint(first)
        with override_settings(PINNING_REPLICAS={"site": ["r2"]}):
            for number in range(40):
                token = write(f"{number}")
                assert f"{number}" in titles(token)
                assert port_for(token) == first.port
                if number % 8 == 0:
                    first.execute("SELECT pg_logical_emit_message(true, '', repeat('x', 20000))")
            past = "SELECT pg_current_wal_insert_lsn() - '0/0'"
            assert first.execute(past)[0][0] > max(position_in(lost).values())


def look_around_one(alias: str) -> None:
    assert pool().look_at(connections[alias]) is not None


def test_without_a_receiver_no_timeline_is_known(pg: PostgreSQL) -> None:
    """It may have had the position from another one than the primary's."""
    pg.pause("pg1")
    look_around()
    token = write("one")
    pg.wait_for("pg2")
    pg["pg2"].execute("ALTER SYSTEM SET primary_conninfo = ''")
    pg["pg2"].execute("SELECT pg_reload_conf()")
    try:
        assert eventually(lambda: pg["pg2"].execute(RECEIVERS) == [(0,)])
        assert [server_for(token) for _ in range(3)] == ["pg"] * 3
        assert {server_for(None) for _ in range(4)} == REPLICAS
    finally:
        rejoin(pg["pg2"])
    assert eventually(lambda: pg["pg2"].execute(RECEIVERS) == [(1,)])
    assert eventually(lambda: server_for(write("more")) == "pg2" or server_for(token) == "pg2")


# Roles


def test_a_plain_role_s_pins_are_reached(pg: PostgreSQL) -> None:
    """By its watcher, since the replica's own answer names no timeline; and never too early."""
    with as_role(pg, "plain"):
        served = set[int]()
        for number in range(6):
            token = write(f"{number}")
            assert f"{number}" in titles(token)
            pg.wait_for()
            if eventually(lambda token=token: port_for(token) != pg["pg"].port, 0.5):
                served.add(port_for(token))
        assert served & {pg["pg1"].port, pg["pg2"].port}
        pg.pause()
        token = write("last")
        for _ in range(5):
            assert "last" in titles(token)
            assert port_for(token) == pg["pg"].port


def test_a_plain_role_s_first_read_is_a_replica_s(pg: PostgreSQL) -> None:
    """
    It asks the replica how far it is and the primary for the name of the timeline, which the
    replica's last checkpoint was on.
    """
    with as_role(pg, "plain"):
        ports = []
        for number in range(8):
            token = write(f"again {number}")
            pg.wait_for()
            ports.append(port_for(token))
        # Most of them: on a busy machine some go to the primary all the same.
        assert ports.count(pg["pg"].port) <= 3


def test_a_plain_role_s_replica_that_had_not_all_is_asked_once_more(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the write, but not what others wrote since: nothing dates that point."""
    with as_role(pg, "plain"):
        for number in range(8):
            token = write(f"{number}")
            pg.wait_for()
            port_for(token)
        pg.pause("pg2")
        token = write("mine")
        pg.wait_for("pg1")
        pg.pause("pg1")
        write("another's")
        look_at, looks = Nodes.look_at, list[str]()

        def moving_on(nodes: Nodes, connection: BaseDatabaseWrapper) -> ProbeResult | None:
            if connection.alias == "site" and "site" not in looks:
                pg.resume("pg1")
                pg.wait_for("pg1")
            looks.append(connection.alias)
            return look_at(nodes, connection)

        monkeypatch.setattr(Nodes, "look_at", moving_on)
        assert port_for(token) == pg["pg1"].port
        assert looks[-3:] == ["site", "r1", "site"]


# Transaction ids


@pytest.mark.parametrize("role", ROLES)
@override_settings(PINNING_POSITIONS="xid")
def test_transaction_ids_as_positions(pg: PostgreSQL, role: str) -> None:
    with as_role(pg, role):
        pg.pause()
        token = write("one")
        assert all("x-" in log for log in position_in(token))
        assert [port_for(token) for _ in range(3)] == [pg["pg"].port] * 3
        pg.resume("pg2")
        served = set[int]()
        assert eventually(lambda: until_replica(pg, served))
        assert served == {pg["pg2"].port}
        for number in range(60):
            token = write(f"{number}")
            assert f"{number}" in titles(token)


def until_replica(pg: PostgreSQL, served: set[int]) -> bool:
    """Write and read; a role without rights is told at the second write."""
    token = write("again")
    pg.wait_for("pg2")
    eventually(lambda: port_for(token) != pg["pg"].port, 0.5)
    by = port_for(token)
    if by != pg["pg"].port:
        served.add(by)
    return bool(served)


@override_settings(PINNING_POSITIONS="xid")
def test_an_open_write_holds_transaction_ids_back(
    pg: PostgreSQL, clock: FrozenDateTimeFactory
) -> None:
    """The window serves then."""
    with psycopg.connect(pg["pg"].conninfo("site")) as other:
        other.execute("INSERT INTO app_tag (name) VALUES ('open')")
        token = write("one")
        pg.wait_for()
        assert server_for(token) == "pg"
        clock.tick(16)
        assert server_for(token) in REPLICAS
        other.rollback()


LSNS = ("pg_current_wal_insert_lsn()", "pg_last_wal_replay_lsn()")
XIDS = ("pg_current_snapshot()",)


@contextmanager
def refused(pg: PostgreSQL, *functions: str) -> Iterator[None]:
    for function in functions:
        pg["pg"].execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC", database="site")
    pg.wait_for()
    try:
        yield
    finally:
        pg.resume()
        for function in functions:
            pg["pg"].execute(f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC", database="site")
        pg.wait_for()


def test_where_lsns_are_refused_transaction_ids_serve(pg: PostgreSQL) -> None:
    with refused(pg, *LSNS), as_role(pg, "plain"):
        pg.pause()
        token = write("one")
        assert all("x" in log for log in position_in(token))
        assert [port_for(token) for _ in range(3)] == [pg["pg"].port] * 3
        pg.resume("pg2")
        served = set[int]()
        assert eventually(lambda: until_replica(pg, served))
        for number in range(30):
            token = write(f"{number}")
            assert f"{number}" in titles(token)


def test_where_both_are_refused_the_window_serves(
    pg: PostgreSQL, clock: FrozenDateTimeFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "pinning_middleware"),
        refused(pg, *LSNS, *XIDS),
        as_role(pg, "plain"),
    ):
        for _ in range(3):
            token = write("one")
            assert position_in(token) is None
            pg.wait_for()
            assert port_for(token) == pg["pg"].port
        assert {port_for(None) for _ in range(4)} == {pg["pg1"].port, pg["pg2"].port}
        clock.tick(16)
        assert port_for(token) != pg["pg"].port
        assert pool().out == frozenset()
    said = [one for one in caplog.records if "does not tell" in one.getMessage()]
    assert len(said) == 1
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


# Servers of another kind


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Another cluster's primary, as a logical replica is one."""
    folder = tmp_path_factory.mktemp("foreign")
    with Cluster(folder, replicas=0, keep=False) as cluster:
        cluster.create_database("site")
        yield cluster


def test_a_logical_replica_stays_in_and_the_window_serves(
    pg: PostgreSQL, foreign: Cluster, clock: FrozenDateTimeFactory
) -> None:
    with as_layout(pg, copy=database(foreign.primary, conn_max_age=None)):
        for _ in range(3):
            token = write("one")
            assert port_for(token) == pg["pg"].port
            assert port_for(None) == foreign.primary.port
        assert pool().out == frozenset()
        clock.tick(16)
        assert port_for(token) == foreign.primary.port


# Promotion


@pytest.mark.parametrize("primary", ["frozen", "unknown"])
def test_a_promoted_replica_is_noticed_on_an_open_connection(
    own_pg: PostgreSQL, asked: Asked, heard: Heard, primary: str
) -> None:
    """By what the server reports itself; no request asks the primary."""
    if primary != "unknown":
        write("one")
        own_pg.wait_for()
        look_around()
    assert {server_for(None) for _ in range(4)} == REPLICAS
    asked.all.clear()

    def is_noticed() -> bool:
        return {server_for(None) for _ in range(4)} == {"pg2"}

    if primary == "frozen":
        with frozen(own_pg["pg"]):
            promote(own_pg["pg1"])
            assert eventually(is_noticed, 10)
    else:
        promote(own_pg["pg1"])
        assert eventually(is_noticed, 10)
    assert "pg" not in asked.by_requests
    assert [one["reason"] for one in heard.of("replica_removed")] == ["promoted"]


# Lag


@pytest.mark.parametrize("role", ROLES)
def test_an_idle_primary_is_no_lag(pg: PostgreSQL, asked: Asked, role: str) -> None:
    # A limit shorter than the second between two samples would be one of their making.
    with as_role(pg, role), override_settings(PINNING_MAX_LAG=2.5):
        looked = lambda: asked.by_watchers.count("r1") > 4  # noqa: E731
        assert eventually(lambda: port_for(None) and (looked() or pool().out))
        assert pool().out == frozenset()


@override_settings(PINNING_MAX_LAG=3)
def test_a_bulk_insert_without_a_commit_is_no_lag(pg: PostgreSQL, asked: Asked) -> None:
    """The age of the last commit that a replica has is no lag."""
    write("one")
    with psycopg.connect(pg["pg"].conninfo("site")) as other:
        while asked.by_watchers.count("pg1") < 5:
            other.execute("INSERT INTO app_tag (name) SELECT 'bulk' FROM generate_series(1, 500)")
            server_for(None)
            assert pool().out == frozenset()
        other.rollback()


@pytest.mark.parametrize("role", ROLES)
def test_a_replica_that_stands_still_under_writes_lags(
    pg: PostgreSQL, heard: Heard, role: str
) -> None:
    with as_role(pg, role), override_settings(PINNING_MAX_LAG=1.5):
        pg.pause("pg1")
        assert eventually(lambda: write("more") and port_for(None) and pool().out == {"r1"})
        # Another thread has taken it out, and is about to say so.
        assert eventually(lambda: heard.of("replica_removed"))
        assert heard.of("replica_removed")[-1]["reason"] == "lag"
        assert {port_for(None) for _ in range(4)} == {pg["pg2"].port}
        pg.resume("pg1")
        assert eventually(lambda: port_for(None) and pool().out == frozenset())
