"""What goes wrong, one thing after the other, drawn from a seed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import psycopg

from sample_site.cluster import Cluster, Node
from tests.real import mariadb

from .history import Fault, Recorder
from .rig import Running

__all__ = ["FAULTS", "schedule"]

# Seconds between two faults.
PAUSES: Final = (0.5, 2.0)
READS, WRITES, PINS = "reads", "writes", "pins"
TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


class Act:
    """Acts on the servers of a run; ``wait`` returns early when the run is over."""

    def __init__(self, running: Running, draw: random.Random, over: threading.Event) -> None:
        self.running, self.draw, self.over = running, draw, over

    def wait(self, least: float, most: float) -> None:
        self.over.wait(self.draw.uniform(least, most))

    @property
    def replica(self) -> Any:
        """A replica: a node of PostgreSQL's cluster, or the alias of a server with GTIDs."""
        servers = self.running.rig.servers
        chosen = servers.replicas if isinstance(servers, Cluster) else ["my1", "my2"]
        return self.draw.choice(chosen)

    @property
    def primary(self) -> Node:
        return self.cluster.primary

    @property
    def cluster(self) -> Cluster:
        assert isinstance(self.running.rig.servers, Cluster)
        return self.running.rig.servers

    @property
    def gtid(self) -> mariadb.Servers:
        assert isinstance(self.running.rig.servers, mariadb.Servers)
        return self.running.rig.servers


# PostgreSQL


def lag(act: Act) -> None:
    node = act.replica
    node.pause()
    act.wait(0.2, 1.5)
    node.resume()


def lag_of_all(act: Act) -> None:
    for node in act.cluster.replicas:
        node.pause()
    act.wait(0.2, 1.5)
    for node in act.cluster.replicas:
        node.resume()


def kill_replica(act: Act) -> None:
    node = act.replica
    node.stop("immediate")
    act.wait(1, 3)
    node.start()


def kill_both_replicas(act: Act) -> None:
    for node in act.cluster.replicas:
        node.stop("immediate")
    act.wait(1, 3)
    for node in act.cluster.replicas:
        node.start()


def terminate(act: Act) -> None:
    act.replica.execute(TERMINATE)


def freeze_replica(act: Act) -> None:
    with _frozen(act.replica):
        act.wait(1, 3)


def freeze_primary(act: Act) -> None:
    with _frozen(act.primary):
        act.wait(0.5, 2)


def kill_primary(act: Act) -> None:
    act.primary.stop("immediate")
    act.wait(0.5, 2)
    act.primary.start()


def replayed_lock(act: Act) -> None:
    """A report holds up the replay of an ALTER TABLE, and all reads of the table queue behind."""
    node = act.replica
    with psycopg.connect(node.conninfo("site")) as report:
        report.execute("SELECT count(*) FROM soak_row")
        act.primary.execute("ALTER TABLE soak_row ADD COLUMN extra integer", database="site")
        act.primary.execute("ALTER TABLE soak_row DROP COLUMN extra", database="site")
        act.wait(1, 3)


@contextmanager
def _frozen(node: Node) -> Iterator[None]:
    node.freeze()
    try:
        yield
    finally:
        node.thaw()


# The cache


def freeze_cache(act: Act) -> None:
    os.kill(act.running.cache, signal.SIGSTOP)
    try:
        act.wait(0.5, 2)
    finally:
        os.kill(act.running.cache, signal.SIGCONT)


# MariaDB and MySQL


def gtid_lag(act: Act) -> None:
    alias = act.replica
    act.gtid.pause(alias)
    act.wait(0.2, 1.5)
    act.gtid.resume(alias)


def gtid_kill_replica(act: Act) -> None:
    alias = act.replica
    act.gtid[alias].stop()
    act.wait(1, 3)
    act.gtid.repair()


def gtid_freeze_replica(act: Act) -> None:
    with act.gtid[act.replica].frozen():
        act.wait(1, 3)


def gtid_terminate(act: Act) -> None:
    server = act.gtid[act.replica]
    own = f"FROM information_schema.processlist WHERE user = '{mariadb.USER}'"
    for (number,) in server.execute(f"SELECT id {own}"):
        with suppress(Exception):
            # It may have ended meanwhile.
            server.execute(f"KILL {number}")


# Each with what it excuses, and how often it is drawn.
FAULTS: Final[Mapping[type, Mapping[Callable[[Act], None], tuple[list[str], int]]]] = {
    Cluster: {
        lag: ([], 8),
        lag_of_all: ([], 4),
        terminate: ([], 2),
        kill_replica: ([], 2),
        kill_both_replicas: ([], 1),
        freeze_replica: ([], 2),
        replayed_lock: ([], 1),
        freeze_primary: ([READS, WRITES], 1),
        kill_primary: ([READS, WRITES], 1),
        freeze_cache: ([PINS], 1),
    },
    mariadb.Servers: {
        gtid_lag: ([], 8),
        gtid_terminate: ([], 2),
        gtid_kill_replica: ([], 2),
        gtid_freeze_replica: ([], 2),
        freeze_cache: ([PINS], 1),
    },
}


def schedule(running: Running, seed: int, recorder: Recorder, over: threading.Event) -> None:
    """Cause one fault after the other until the run is over."""
    draw = random.Random(seed)
    act = Act(running, draw, over)
    known = next(each for kind, each in FAULTS.items() if isinstance(running.rig.servers, kind))
    names, weights = list(known), [weight for _, weight in known.values()]
    while not over.is_set():
        fault = draw.choices(names, weights)[0]
        began = time.monotonic()
        # A replica that still starts may refuse to be terminated or paused.
        with suppress(psycopg.Error):
            fault(act)
        excuses, _ = known[fault]
        recorder.add(Fault(fault.__name__, began, time.monotonic(), excuses))
        act.wait(*PAUSES)
