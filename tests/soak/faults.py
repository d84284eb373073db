"""What goes wrong, one thing after the other, drawn from a seed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Final

import psycopg

from sample_site.cluster import Cluster, Node
from tests.real import mariadb

from .history import Error, Fault, Recorder
from .rig import Running

__all__ = ["FAULTS", "OF_REPLICAS", "schedule"]

# Seconds between two faults.
PAUSES: Final = (0.5, 2.0)
READS, WRITES, PINS = "reads", "writes", "pins"
TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


class FaultContext:
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


def lag(context: FaultContext) -> None:
    with _paused(context.replica):
        context.wait(0.2, 1.5)


def lag_of_all(context: FaultContext) -> None:
    with _all(_paused, context.cluster.replicas):
        context.wait(0.2, 1.5)


def kill_replica(context: FaultContext) -> None:
    with _killed(context.replica):
        context.wait(1, 3)


def kill_both_replicas(context: FaultContext) -> None:
    with _all(_killed, context.cluster.replicas):
        context.wait(1, 3)


def terminate(context: FaultContext) -> None:
    context.replica.execute(TERMINATE)


def freeze_replica(context: FaultContext) -> None:
    with _frozen(context.replica):
        context.wait(1, 3)


def freeze_primary(context: FaultContext) -> None:
    with _frozen(context.primary):
        context.wait(0.5, 2)


def kill_primary(context: FaultContext) -> None:
    with _killed(context.primary):
        context.wait(0.5, 2)


def replayed_lock(context: FaultContext) -> None:
    """A report holds up the replay of an ALTER TABLE, and all reads of the table queue behind."""
    node = context.replica
    with psycopg.connect(node.conninfo("site")) as report:
        report.execute("SELECT count(*) FROM soak_row")
        try:
            context.primary.execute(
                "ALTER TABLE soak_row ADD COLUMN extra integer", database="site"
            )
        finally:
            context.primary.execute(
                "ALTER TABLE soak_row DROP COLUMN IF EXISTS extra", database="site"
            )
        context.wait(1, 3)


@contextmanager
def _paused(node: Node) -> Iterator[None]:
    try:
        node.pause()
        yield
    finally:
        node.resume()


@contextmanager
def _killed(node: Node) -> Iterator[None]:
    try:
        node.stop("immediate")
        yield
    finally:
        node.start()


@contextmanager
def _frozen(node: Node) -> Iterator[None]:
    try:
        node.freeze()
        yield
    finally:
        node.thaw()


@contextmanager
def _all(
    disturbed: Callable[[Node], AbstractContextManager[None]], nodes: Iterable[Node]
) -> Iterator[None]:
    with ExitStack() as stack:
        for node in nodes:
            stack.enter_context(disturbed(node))
        yield


# The cache


def freeze_cache(context: FaultContext) -> None:
    try:
        os.kill(context.running.cache, signal.SIGSTOP)
        context.wait(0.5, 2)
    finally:
        os.kill(context.running.cache, signal.SIGCONT)


# MariaDB and MySQL


def gtid_lag(context: FaultContext) -> None:
    alias = context.replica
    try:
        context.gtid.pause(alias)
        context.wait(0.2, 1.5)
    finally:
        context.gtid.resume(alias)


def gtid_kill_replica(context: FaultContext) -> None:
    try:
        context.gtid[context.replica].stop()
        context.wait(1, 3)
    finally:
        context.gtid.repair()


def gtid_freeze_replica(context: FaultContext) -> None:
    with context.gtid[context.replica].frozen():
        context.wait(1, 3)


def gtid_terminate(context: FaultContext) -> None:
    server = context.gtid[context.replica]
    own = f"FROM information_schema.processlist WHERE user = '{mariadb.USER}'"
    for (number,) in server.execute(f"SELECT id {own}"):
        # It may have ended meanwhile.
        with suppress(_errors_of(context.gtid)):
            server.execute(f"KILL {number}")


# Each with what it excuses, and how often it is drawn.
FAULTS: Final[Mapping[type, Mapping[Callable[[FaultContext], None], tuple[list[str], int]]]] = {
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


# Of these, the faults by which replicas come and go.
OF_REPLICAS: Final = (lag, terminate, kill_replica, freeze_replica)


def schedule(
    running: Running,
    seed: int,
    recorder: Recorder,
    over: threading.Event,
    only: Collection[Callable[[FaultContext], None]] = (),
) -> None:
    """
    Cause one fault after the other until the run is over, of all or of some. An unexpected error
    ends the run.
    """
    try:
        _cause_faults(running, seed, recorder, over, only)
    except Exception:
        recorder.add(Error("a fault", traceback.format_exc()))
        over.set()


def _cause_faults(
    running: Running,
    seed: int,
    recorder: Recorder,
    over: threading.Event,
    only: Collection[Callable[[FaultContext], None]],
) -> None:
    draw = random.Random(seed)
    context = FaultContext(running, draw, over)
    every = next(each for kind, each in FAULTS.items() if isinstance(running.rig.servers, kind))
    known = {cause: every[cause] for cause in every if not only or cause in only}
    names, weights = list(known), [weight for _, weight in known.values()]
    while not over.is_set():
        cause = draw.choices(names, weights)[0]
        fault = Fault(cause.__name__, time.monotonic(), None, known[cause][0])
        recorder.add(fault)
        failed = True
        try:
            # A server that still starts may refuse to be terminated or paused.
            with suppress(_errors_of(running.rig.servers)):
                cause(context)
                failed = False
        finally:
            recorder.add(fault._replace(ended=time.monotonic(), failed=failed))
        context.wait(*PAUSES)


def _errors_of(servers: Cluster | mariadb.Servers) -> type[Exception]:
    """Return the class of the errors of the servers' driver."""
    if isinstance(servers, Cluster):
        return psycopg.Error
    import MySQLdb

    return MySQLdb.Error
