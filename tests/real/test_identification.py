"""State belongs to a server process, not to an alias or address."""

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

from pinning_middleware.routing.health import Health
from pinning_middleware.servers.probe import ProbeResult
from pinning_middleware.servers.registry import Server
from sample_site.cluster import Cluster

from .conftest import (
    Asked,
    PostgreSQL,
    SentSignals,
    as_layout,
    endpoint,
    eventually,
    in_thread,
    make_retry_due,
    pool,
    port_for,
    position_in,
    probe_replicas,
    queries,
    server_for,
    titles,
    write,
)
from .layouts import (
    copy_data,
    database,
    frozen,
    make_role,
    promote,
    rejoin,
    restart_behind,
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
    """Let Django connect as this role to all servers: `site`, `r1` and `r2`."""
    more = user_of(pg.cluster, role)
    entries = {f"r{n}": database(pg[f"pg{n}"], conn_max_age=None, **more) for n in (1, 2)}
    with as_layout(pg, **entries):
        connections["site"].close()
        connections.settings["site"].update(database(pg["pg"], conn_max_age=None, **more))
        yield


@pytest.mark.usefixtures("untracked")
def test_connection_is_identified_once(pg: PostgreSQL) -> None:
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


def test_time_zone_of_the_session_does_not_change_the_identity(pg: PostgreSQL) -> None:
    """The server is identified after the site has configured the session."""

    def look_from(zone: str) -> Server:
        with connections["pg1"].cursor() as cursor:
            cursor.execute("SET TIME ZONE %s", [zone])
        seen = pool().health.probe(connections["pg1"])
        assert seen is not None
        return seen.server

    first = in_thread(lambda: look_from("Asia/Tokyo"))
    assert in_thread(lambda: look_from("Europe/Berlin")) is first
    assert endpoint("pg1").server is first


# Servers that have lost part of their log


def test_replica_restarted_behind_is_out_of_rotation_until_it_catches_up(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """It is out of rotation until it reaches its earlier position again."""
    copy = copy_data(pg["pg1"])
    try:
        write("one")
        pg.wait_for()
        probe_replicas()
        pg.pause("pg2")
        token = write("two")
        pg.wait_for("pg1")
        assert server_for(token) == "pg1"
        restart_behind(pg["pg1"], copy)
        assert pg["pg1"].execute("SELECT count(*) FROM app_book", database="site") == [(0,)]
        assert [titles(token) for _ in range(4)] == [["one", "two"]] * 4
        for _ in range(4):
            titles()
        assert pool().replica_set.out_of_rotation == {"pg1"}
        # Its monitor may have met it while it was down, and retries it later.
        make_retry_due("pg1")
        assert eventually(lambda: endpoint("pg1").out_of_rotation == "stale_restart")
        assert sent_signals.of("replica_removed")[-1]["reason"] == "stale_restart"
        assert {server_for(None) for _ in range(4)} == {"pg2"}
    finally:
        rejoin(pg["pg1"])
    wait_replayed(pg["pg"], pg["pg1"])
    assert eventually(
        lambda: make_retry_due("pg1") or pool().replica_set.out_of_rotation == frozenset()
    )
    assert eventually(lambda: server_for(token) == "pg1")
    assert titles(token) == ["one", "two"]


@pytest.mark.parametrize("role", ROLES)
def test_replica_ahead_of_the_promoted_one_has_not_caught_up(own_pg: PostgreSQL, role: str) -> None:
    """Its position on the lost timeline is at first greater than those of new writes."""
    first, second = own_pg["pg1"], own_pg["pg2"]
    with as_role(own_pg, role):
        write("kept")
        own_pg.wait_for()
        probe_replicas()
        first.stop()
        lost = write("lost")
        own_pg["pg"].execute("SELECT pg_logical_emit_message(true, '', repeat('x', 60000))")
        own_pg.wait_for("pg2")
        look_around_one("r2")
        own_pg["pg"].stop("immediate")
        first.start()
        promote(first)
        # The site's primary is switched; the other replica is repointed and cannot follow.
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
    assert pool().health.probe(connections[alias]) is not None


@pytest.mark.usefixtures("untracked")
def test_timeline_without_a_receiver_is_unknown(pg: PostgreSQL) -> None:
    """The position may be from another timeline than that of the primary."""
    pg.pause("pg1")
    probe_replicas()
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


# Database roles


def test_pins_of_an_unprivileged_role_are_reached(pg: PostgreSQL) -> None:
    """The monitor resolves the timeline that the replica hides; never too early."""
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


def test_first_read_of_an_unprivileged_role_uses_a_replica(pg: PostgreSQL) -> None:
    """
    The replica reports its position, and the primary the name of the timeline, which the
    replica's last checkpoint was on.
    """
    with as_role(pg, "plain"):
        ports = []
        for number in range(8):
            token = write(f"again {number}")
            pg.wait_for()
            ports.append(port_for(token))
        # Most of them: on a busy machine some reads use the primary.
        assert ports.count(pg["pg"].port) <= 3


@pytest.mark.usefixtures("untracked")
def test_replica_with_unresolved_timeline_is_probed_once_more(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had the write but not later ones, so its point cannot be resolved."""
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
        probe, looks = Health.probe, list[str]()

        def moving_on(health: Health, connection: BaseDatabaseWrapper) -> ProbeResult | None:
            if connection.alias == "site" and "site" not in looks:
                pg.resume("pg1")
                pg.wait_for("pg1")
            looks.append(connection.alias)
            return probe(health, connection)

        monkeypatch.setattr(Health, "probe", moving_on)
        assert port_for(token) == pg["pg1"].port
        assert looks[-3:] == ["site", "r1", "site"]


# Transaction ids


@pytest.mark.parametrize("role", ROLES)
@override_settings(PINNING_POSITIONS="xid")
def test_transaction_ids_are_used_as_positions(pg: PostgreSQL, role: str) -> None:
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
    """Write and read; an unprivileged role needs a second write."""
    token = write("again")
    pg.wait_for("pg2")
    eventually(lambda: port_for(token) != pg["pg"].port, 0.5)
    by = port_for(token)
    if by != pg["pg"].port:
        served.add(by)
    return bool(served)


@override_settings(PINNING_POSITIONS="xid")
def test_open_write_delays_transaction_ids(pg: PostgreSQL, clock: FrozenDateTimeFactory) -> None:
    """At most until a day after the write."""
    with psycopg.connect(pg["pg"].conninfo("site")) as other:
        other.execute("INSERT INTO app_tag (name) VALUES ('open')")
        token = write("one")
        pg.wait_for()
        assert server_for(token) == "pg"
        clock.tick(86_401)
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


def test_transaction_ids_are_used_without_permission_for_lsns(pg: PostgreSQL) -> None:
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


def test_pin_lasts_for_the_window_without_any_permission(
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
        assert pool().replica_set.out_of_rotation == frozenset()
    said = [
        one for one in caplog.records if "cannot report a replication position" in one.getMessage()
    ]
    assert len(said) == 1
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


# Logical replicas


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The primary of another cluster, like a logical replica."""
    folder = tmp_path_factory.mktemp("foreign")
    with Cluster(folder, replicas=0, keep=False) as cluster:
        cluster.create_database("site")
        yield cluster


def test_logical_replica_stays_in_rotation_and_never_reaches_a_position(
    pg: PostgreSQL, foreign: Cluster, clock: FrozenDateTimeFactory
) -> None:
    with as_layout(pg, copy=database(foreign.primary, conn_max_age=None)):
        for _ in range(3):
            token = write("one")
            assert port_for(token) == pg["pg"].port
            assert port_for(None) == foreign.primary.port
        assert pool().replica_set.out_of_rotation == frozenset()
        clock.tick(86_401)
        assert port_for(token) == foreign.primary.port


# Promotion


@pytest.mark.parametrize("primary", ["frozen", "unknown"])
def test_promotion_is_detected_on_an_open_connection(
    own_pg: PostgreSQL, asked: Asked, sent_signals: SentSignals, primary: str
) -> None:
    """The server reports it itself; no request probes the primary."""
    if primary != "unknown":
        write("one")
        own_pg.wait_for()
        probe_replicas()
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
    assert [one["reason"] for one in sent_signals.of("replica_removed")] == ["promoted"]


# Lag


@pytest.mark.parametrize("role", ROLES)
def test_idle_primary_causes_no_lag(pg: PostgreSQL, asked: Asked, role: str) -> None:
    # The limit must exceed the interval between two samples (one second).
    with as_role(pg, role), override_settings(PINNING_MAX_LAG=2.5):
        looked = lambda: asked.by_monitors.count("r1") > 4  # noqa: E731
        assert eventually(
            lambda: port_for(None) and (looked() or pool().replica_set.out_of_rotation)
        )
        assert pool().replica_set.out_of_rotation == frozenset()


@override_settings(PINNING_MAX_LAG=3)
def test_bulk_insert_without_a_commit_causes_no_lag(pg: PostgreSQL, asked: Asked) -> None:
    """The age of the last replayed commit is not lag."""
    write("one")
    with psycopg.connect(pg["pg"].conninfo("site")) as other:
        while asked.by_monitors.count("pg1") < 5:
            other.execute("INSERT INTO app_tag (name) SELECT 'bulk' FROM generate_series(1, 500)")
            server_for(None)
            assert pool().replica_set.out_of_rotation == frozenset()
        other.rollback()


@pytest.mark.parametrize("role", ROLES)
def test_replica_that_stops_replaying_under_writes_lags(
    pg: PostgreSQL, sent_signals: SentSignals, role: str
) -> None:
    with as_role(pg, role), override_settings(PINNING_MAX_LAG=1.5):
        pg.pause("pg1")
        assert eventually(
            lambda: (
                write("more") and port_for(None) and pool().replica_set.out_of_rotation == {"r1"}
            )
        )
        # Another thread has taken it out of rotation, and has not logged it yet.
        assert eventually(lambda: sent_signals.of("replica_removed"))
        assert sent_signals.of("replica_removed")[-1]["reason"] == "lag"
        assert {port_for(None) for _ in range(4)} == {pg["pg2"].port}
        pg.resume("pg1")
        assert eventually(
            lambda: port_for(None) and pool().replica_set.out_of_rotation == frozenset()
        )
