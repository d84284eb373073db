"""The faults of a run, one at a time, chosen by a seeded random generator."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import cycle
from typing import Final

import psycopg
from redis import Redis

from sample_site.cluster import Cluster, Node
from tests.real import mariadb
from tests.real.layouts import copy_data, rejoin, restart_behind

from .address_faults import ADDRESS_FAULTS
from .context import GTID_PRIMARY, PINS, READS, STORED_PINS, WRITES, FaultContext
from .history import Error, Fault, Recorder
from .promotions import GTID_PROMOTIONS, PROMOTIONS
from .rig import Rig, Running

__all__ = ["FAULTS", "NAMES", "REPLICA_FAULTS", "schedule"]

# Seconds between two faults.
PAUSES: Final = (0.5, 2.0)
TERMINATE: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


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


def restart_replica_behind(context: FaultContext) -> None:
    """A replica crashes, restarts with older data, and does not receive the rest for a while."""
    node = context.replica
    copy = copy_data(node)
    context.wait(0.2, 1)
    try:
        restart_behind(node, copy)
        context.wait(1, 2)
    finally:
        rejoin(node)


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
    process = Redis.from_url(context.running.cache.connection_url).info("server")["process_id"]
    try:
        os.kill(process, signal.SIGSTOP)
        context.wait(0.5, 2)
    finally:
        os.kill(process, signal.SIGCONT)


def kill_cache(context: FaultContext) -> None:
    """The cache crashes, and starts empty."""
    cache = context.running.cache
    try:
        cache.terminate()
        context.wait(0.5, 2)
    finally:
        cache.start()


# The clock of the site's processes


def step_clock(context: FaultContext) -> None:
    """The clock is an hour ahead or behind; positions and session cookies do not depend on it."""
    clock = context.running.clock
    try:
        clock.step(context.rng.choice((-3600, -20, 20, 3600)))
        context.wait(0.5, 2)
    finally:
        clock.step(0)


# MariaDB and MySQL


def gtid_lag(context: FaultContext) -> None:
    alias = context.replica
    try:
        context.gtid.pause(alias)
        context.wait(0.2, 1.5)
    finally:
        context.gtid.resume(alias)


def gtid_kill_replica(context: FaultContext) -> None:
    _kill_gtid_server(context, context.replica, 1, 3)


def gtid_kill_primary(context: FaultContext) -> None:
    _kill_gtid_server(context, GTID_PRIMARY, 0.5, 2)


def _kill_gtid_server(context: FaultContext, alias: str, least: float, most: float) -> None:
    try:
        context.gtid[alias].stop()
        context.wait(least, most)
    finally:
        context.gtid.repair()


def gtid_freeze_replica(context: FaultContext) -> None:
    with context.gtid[context.replica].frozen():
        context.wait(1, 3)


def gtid_freeze_primary(context: FaultContext) -> None:
    with context.gtid[GTID_PRIMARY].frozen():
        context.wait(0.5, 2)


def gtid_terminate(context: FaultContext) -> None:
    server = context.gtid[context.replica]
    own = f"FROM information_schema.processlist WHERE user = '{mariadb.USER}'"
    for (number,) in server.execute(f"SELECT id {own}"):
        # It may have ended meanwhile.
        with suppress(_errors_of(context.gtid)):
            server.execute(f"KILL {number}")


Faults = Mapping[Callable[[FaultContext], None], tuple[list[str], int]]
# Each with what it excuses, and how often it is drawn.
FAULTS: Final[Mapping[type, Faults]] = {
    Cluster: {
        lag: ([], 8),
        lag_of_all: ([], 4),
        terminate: ([], 2),
        kill_replica: ([], 2),
        kill_both_replicas: ([], 1),
        freeze_replica: ([], 2),
        replayed_lock: ([], 1),
        restart_replica_behind: ([], 1),
        freeze_primary: ([READS, WRITES], 1),
        kill_primary: ([READS, WRITES], 1),
        freeze_cache: ([PINS], 1),
        kill_cache: ([PINS, STORED_PINS], 1),
        step_clock: ([], 1),
    },
    mariadb.Servers: {
        gtid_lag: ([], 8),
        gtid_terminate: ([], 2),
        gtid_kill_replica: ([], 2),
        gtid_freeze_replica: ([], 2),
        gtid_freeze_primary: ([READS, WRITES], 1),
        gtid_kill_primary: ([READS, WRITES], 1),
        freeze_cache: ([PINS], 1),
        kill_cache: ([PINS, STORED_PINS], 1),
        step_clock: ([], 1),
    },
}


NAMES: Final = {
    cause.__name__
    for faults in (*FAULTS.values(), ADDRESS_FAULTS, PROMOTIONS, GTID_PROMOTIONS)
    for cause in faults
}
# Faults after which a replica leaves the rotation and returns.
REPLICA_FAULTS: Final = tuple(
    cause.__name__ for cause in (lag, terminate, kill_replica, freeze_replica)
)


def _offered(rig: Rig) -> Faults:
    """Return the faults that a layout can have."""
    known = next(each for kind, each in FAULTS.items() if isinstance(rig.servers, kind))
    if not rig.links:
        return known
    if isinstance(rig.servers, Cluster):
        return {**known, **ADDRESS_FAULTS, **PROMOTIONS}
    return {**known, **GTID_PROMOTIONS}


def schedule(
    running: Running,
    seed: int,
    recorder: Recorder,
    over: threading.Event,
    names: Sequence[str] = (),
) -> None:
    """
    Cause one fault after the other until the run is over: those with these names over and over, or
    drawn ones. An unexpected error ends the run.
    """
    try:
        _cause_faults(running, seed, recorder, over, names)
    except Exception:
        recorder.add(Error("a fault", traceback.format_exc()))
        over.set()


def _cause_faults(
    running: Running, seed: int, recorder: Recorder, over: threading.Event, names: Sequence[str]
) -> None:
    rng = random.Random(seed)
    context = FaultContext(running, rng, over, recorder)
    known = _offered(running.rig)
    by_name = {cause.__name__: cause for cause in known}
    given = cycle([by_name[name] for name in names])
    weights = [weight for _, weight in known.values()]
    while not over.is_set():
        cause = next(given, None) or rng.choices(list(known), weights)[0]
        fault = Fault(cause.__name__, time.monotonic(), None, known[cause][0])
        recorder.add(fault)
        failed = True
        try:
            # A server that still starts may refuse to be terminated or paused.
            with suppress(*_tolerated(cause, running.rig)):
                cause(context)
                failed = False
        finally:
            recorder.add(fault._replace(ended=time.monotonic(), failed=failed))
        context.wait(*PAUSES)


def _tolerated(cause: Callable[[FaultContext], None], rig: Rig) -> tuple[type[Exception], ...]:
    # A promotion that ends half-way leaves no cluster for the next fault.
    is_promotion = cause in PROMOTIONS or cause in GTID_PROMOTIONS
    return () if is_promotion else (_errors_of(rig.servers),)


def _errors_of(servers: Cluster | mariadb.Servers) -> type[Exception]:
    """Return the class of the errors of the servers' driver."""
    if isinstance(servers, Cluster):
        return psycopg.Error
    import MySQLdb

    return MySQLdb.Error
