"""The cluster of the sample site, the tests and the benchmarks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from sample_site.cluster import Cluster, ClusterError, Node
from sample_site.node import _processes
from sample_site.programs import installed_package
from sample_site.wal import INSERTED, LOG_PAGE, end_of_log
from tests.real.sample import ROOT, eventually, open_folder, servers_of

pytestmark = pytest.mark.real

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as another user")


def count(node: Node) -> int:
    return int(node.execute("SELECT count(*) FROM rows")[0][0])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that tests may pause and must restore."""
    with Cluster(tmp_path_factory.mktemp("cluster"), keep=False) as cluster:
        cluster.primary.execute("CREATE TABLE rows (number int)")
        cluster.wait_caught_up()
        yield cluster


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that the test may change permanently."""
    with Cluster(tmp_path / "cluster", keep=False) as cluster:
        cluster.primary.execute("CREATE TABLE rows (number int)")
        cluster.wait_caught_up()
        yield cluster


@pytest.fixture
def reachable() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


def test_replicas_replay_writes_of_the_primary(cluster: Cluster) -> None:
    before = count(cluster.primary)
    cluster.primary.execute("INSERT INTO rows VALUES (%s)", (1,))
    cluster.wait_caught_up()
    assert [count(node) for node in cluster.nodes.values()] == [before + 1] * 3
    assert [node.in_recovery for node in cluster.nodes.values()] == [False, True, True]


def test_paused_replica_does_not_change(cluster: Cluster) -> None:
    replica = cluster.nodes["replica1"]
    before = count(replica)
    replica.pause()
    try:
        cluster.primary.execute("INSERT INTO rows VALUES (2)")
        with pytest.raises(TimeoutError, match="replica1 has not caught up"):
            cluster.wait_caught_up(timeout=0.2)
        assert count(replica) == before
        assert eventually(lambda: count(cluster.nodes["replica2"]) == before + 1)
    finally:
        replica.resume()
    cluster.wait_caught_up()
    assert count(replica) == before + 1


def test_delayed_replica_lags(cluster: Cluster) -> None:
    replica = cluster.nodes["replica2"]
    replica.set_delay(0.5)
    try:
        started = time.monotonic()
        cluster.primary.execute("INSERT INTO rows VALUES (3)")
        cluster.wait_caught_up()
        assert time.monotonic() - started > 0.4
    finally:
        replica.set_delay(0)


def test_crashed_server_restarts_on_its_port(cluster: Cluster) -> None:
    for node in cluster.nodes.values():
        port = node.port
        node.stop("immediate")
        assert not node.running
        with pytest.raises(psycopg.OperationalError):
            node.execute("SELECT 1")
        node.start()
        assert (node.running, node.port) == (True, port)
    cluster.primary.execute("INSERT INTO rows VALUES (4)")
    cluster.wait_caught_up()


def fill_page(node: Node) -> bool:
    """Write a record that ends a page; return whether no other record interfered."""
    emit = "SELECT pg_logical_emit_message(false, '', repeat('x', %s), true)"
    while (start := node.execute(INSERTED)[0][0]) % LOG_PAGE > LOG_PAGE - 2000:
        node.execute(emit, (1000,))
    node.execute(emit, (500,))
    middle = node.execute(INSERTED)[0][0]
    overhead = middle - start - 500
    node.execute(emit, (LOG_PAGE - middle % LOG_PAGE - overhead,))
    return bool(node.execute(INSERTED)[0][0] % LOG_PAGE in {24, 40})


def test_crashed_replica_restarts_after_its_table_was_truncated(own_cluster: Cluster) -> None:
    """Recovery replays records of pages that were truncated later."""
    primary, replica = own_cluster.primary, own_cluster.replicas[0]
    primary.execute("INSERT INTO rows SELECT generate_series(1, 1000)")
    primary.execute("VACUUM rows")
    primary.execute("CHECKPOINT")
    own_cluster.wait_caught_up()
    replica.execute("CHECKPOINT")
    for _ in range(2):
        primary.execute("DELETE FROM rows")
        primary.execute("VACUUM rows")
        primary.execute("INSERT INTO rows VALUES (1)")
        primary.execute("VACUUM rows")
    own_cluster.wait_caught_up()
    replica.stop("immediate")
    replica.start()
    assert count(replica) == 1


def test_processes_may_end_while_they_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    present = os.listdir("/proc")
    monkeypatch.setattr(os, "listdir", lambda path: [*present, "999999999"])
    found = _processes()
    assert found[os.getpid()][0] == os.getppid()
    assert 999999999 not in found


def test_caught_up_at_a_page_boundary(cluster: Cluster) -> None:
    """A replica does not pass a page header before the next record."""
    assert eventually(lambda: fill_page(cluster.primary))
    cluster.wait_caught_up(timeout=1)


@pytest.mark.parametrize(
    ("inserted", "end"),
    [
        (8192 + 24, 8192),
        (8192 + 40, 8192 + 40),
        (3 * 16 * 1024 * 1024 + 40, 3 * 16 * 1024 * 1024),
        (8192 + 25, 8192 + 25),
    ],
)
def test_end_of_log_excludes_a_page_header(inserted: int, end: int) -> None:
    assert end_of_log(inserted) == end


def test_django_database_entries(cluster: Cluster) -> None:
    assert cluster.create_database("board")
    assert not cluster.create_database("board")
    entry = cluster.database("primary", "board")
    assert entry["PORT"] == str(cluster.primary.port)
    assert cluster.primary.execute("SELECT current_database()", database="board") == [("board",)]
    with psycopg.connect(cluster.url("primary", "board")) as connection:
        assert connection.info.dbname == "board"


def test_other_replicas_follow_a_promoted_one(own_cluster: Cluster) -> None:
    primary, first, second = own_cluster.nodes.values()
    primary.stop("immediate")
    first.promote()
    second.follow(first)
    first.execute("INSERT INTO rows VALUES (1)")
    assert not first.in_recovery
    assert second.in_recovery
    assert eventually(lambda: count(second) == 1)


def test_replica_can_follow_a_replica(own_cluster: Cluster) -> None:
    primary, first, second = own_cluster.nodes.values()
    second.follow(first)
    primary.execute("INSERT INTO rows VALUES (1)")
    assert eventually(lambda: count(second) == 1)
    assert [row[0] for row in first.execute("SELECT application_name FROM pg_stat_replication")]


def test_restart_keeps_data_and_resets_settings(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster") as cluster:
        cluster.primary.execute("CREATE TABLE rows (number int)")
        cluster.nodes["replica1"].set_delay(5)
        cluster.nodes["replica2"].promote()
        cluster.nodes["replica2"].execute("CREATE TABLE lost (number int)")
    told: list[str] = []
    with Cluster(tmp_path / "cluster", progress=told.append) as cluster:
        cluster.wait_caught_up(timeout=3)
        assert [count(node) for node in cluster.nodes.values()] == [0, 0, 0]
        assert cluster.nodes["replica2"].in_recovery
        cluster.keep = False
    assert [line for line in told if "Copying" in line] == ["Copying it to replica2 …"]
    assert not cluster.folder.exists()


def test_stop_ends_all_processes(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", keep=False) as cluster:
        assert len(servers_of(cluster.folder)) == 3
    assert servers_of(cluster.folder) == []
    cluster.stop()  # once more does no harm


def test_failed_start_ends_all_processes(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster", settings={"shared_buffers": "nonsense"}, keep=False)
    with pytest.raises(ClusterError, match=r"primary did not start(.|\n)*nonsense"):
        cluster.start()
    assert servers_of(cluster.folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ClusterError])
def test_partly_failed_start_ends_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    start = Node.start

    def start_but_one(self: Node, timeout: float = 30) -> None:
        if self.name == "replica2":
            raise error
        start(self, timeout)

    monkeypatch.setattr(Node, "start", start_but_one)
    cluster = Cluster(tmp_path / "cluster", keep=False)
    with pytest.raises(error):
        cluster.start()
    assert servers_of(cluster.folder) == []


RUN = """
import os, signal, sys
from pathlib import Path
from sample_site.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.start()
print(cluster.folder, flush=True)
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"
DIE_WITHOUT_A_WATCHER = "cluster._watcher.kill(); cluster._watcher.wait(); " + DIE


def run_and(end: str, folder: Path) -> Path:
    """Start a cluster in a process that ends this way; return its folder."""
    command = [sys.executable, "-c", RUN + end, str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    return Path(done.stdout.strip())


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "if not os.fork(): sys.exit()", DIE])
def test_servers_end_with_the_process(tmp_path: Path, end: str) -> None:
    folder = run_and(end, tmp_path / "cluster")
    assert eventually(lambda: servers_of(folder) == [])
    with Cluster(tmp_path / "cluster", keep=False) as cluster:
        assert len(servers_of(cluster.folder)) == 3


def test_servers_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    folder = run_and(DIE_WITHOUT_A_WATCHER, tmp_path / "cluster")
    try:
        assert len(servers_of(folder)) == 3
    finally:
        with Cluster(tmp_path / "cluster", keep=False) as cluster:
            assert len(servers_of(folder)) == 3
            cluster.wait_caught_up()
    assert servers_of(folder) == []


def test_lock_file_of_another_process_is_ignored(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", replicas=0) as cluster:
        lock = cluster.primary.folder / "postmaster.pid"
    lock.write_text(f"{os.getpid()}\n")
    with Cluster(tmp_path / "cluster", replicas=0, keep=False) as cluster:
        assert cluster.primary.running


def test_forked_child_does_not_stop_the_servers(cluster: Cluster) -> None:
    child = os.fork()
    if not child:
        cluster.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert cluster.primary.execute("SELECT 1") == [(1,)]


def test_second_run_in_the_same_folder_raises(cluster: Cluster) -> None:
    second = Cluster(cluster.folder)
    with pytest.raises(ClusterError, match="another run is using"):
        second.start()
    assert cluster.primary.execute("SELECT 1") == [(1,)]


def test_port_in_use_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    ports = iter([cluster.primary.port, cluster.nodes["replica1"].port])
    free_port = importlib.import_module("sample_site.node")._free_port
    monkeypatch.setattr("sample_site.node._free_port", lambda: next(ports, None) or free_port())
    with Cluster(tmp_path / "cluster", replicas=0, keep=False) as other:
        assert other.primary.port not in {node.port for node in cluster.nodes.values()}


def test_suspended_process_is_stopped(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", replicas=1, keep=False) as cluster:
        pid = cluster.nodes["replica1"].pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
    assert servers_of(cluster.folder) == []


@as_root
def test_inaccessible_folder_is_replaced_by_a_temporary_one(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with Cluster(closed / "cluster", replicas=0, keep=False) as cluster:
        assert closed not in cluster.folder.parents
        owner = (cluster.primary.folder).stat().st_uid
        assert owner != 0
    assert not cluster.folder.exists()


@as_root
def test_wheel_in_an_inaccessible_folder_is_copied(
    tmp_path: Path, reachable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed_package()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for name in (package.name, f"{package.name}.libs"):
        if (package.parent / name).exists():
            (closed / name).symlink_to(package.parent / name)
    monkeypatch.setattr("sample_site.programs.installed_package", lambda: closed / package.name)
    monkeypatch.setattr("tempfile.tempdir", str(reachable))
    with Cluster(closed / "cluster", replicas=1, keep=False) as cluster:
        cluster.wait_caught_up()
        assert [path.name[:17] for path in reachable.iterdir()].count("pinning-programs-") == 1


def test_missing_wheel_reports_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"pip install --group demo"):
        Cluster(tmp_path / "cluster").start()
