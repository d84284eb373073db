"""
The longest wait of eight threads that read while servers do not answer, or make reads wait:

    python -m benchmarks.waits
    python -m benchmarks.waits --against ../pinning_middleware-0.1

With another checkout of the package the two alternate. Each run has a process and a cluster of its
own. ``ROUNDS``: runs of each fault; the median counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg

from sample_site.cluster import Cluster

from .fleet import Browser, Variant, entry, served, site

ROUNDS = int(os.environ.get("ROUNDS", "3"))
READERS, THINK_TIME = 8, 0.01
# Seconds before and during a fault.
BEFORE, DURING = 2.0, 6.0
# A wait that a user notices (seconds).
LONG = 1.6
ROOT: Final = Path(__file__).resolve().parent.parent


class Found(NamedTuple):
    longest: float
    long: int
    failed: int
    reads: int


class Fault(NamedTuple):
    """A fault, how the site connects, and what its replicas are (more entries of DATABASES)."""

    begin: Callable[[Cluster, ExitStack], object]
    age: int | None = None
    replicas: Callable[[Cluster, Variant], dict[str, dict[str, Any]]] | None = None
    pool: bool = False
    asgi: bool = False


def stop(*numbers: int, pause: float = 0.0) -> Callable[[Cluster, ExitStack], None]:
    def begin(cluster: Cluster, stack: ExitStack) -> None:
        for number in numbers:
            node = cluster.replicas[number]
            node.freeze()
            stack.callback(node.thaw)
            time.sleep(pause)

    return begin


def delay_replay(cluster: Cluster, stack: ExitStack) -> None:
    """A report on a replica delays the replay of a lock, and all later reads wait behind it."""
    replica = cluster.replicas[1]
    report = stack.enter_context(closing(psycopg.connect(replica.conninfo("site"))))
    report.execute("SELECT count(*) FROM benchmarks_entry")
    cluster.primary.execute("ALTER TABLE benchmarks_entry ADD COLUMN more int", database="site")


def host_list(cluster: Cluster, how: Variant) -> dict[str, dict[str, Any]]:
    hosts, ports = zip(*((node.host, str(node.port)) for node in cluster.replicas), strict=True)
    return {"many": entry(",".join(hosts), ",".join(ports), how)}


def black_holes(cluster: Cluster, how: Variant) -> dict[str, dict[str, Any]]:
    ports = ",".join(str(listener.getsockname()[1]) for listener in _LISTENERS)
    healthy = cluster.replicas[1]
    return {
        "holes": entry("127.0.0.1,127.0.0.1", ports, how),
        "healthy": entry(healthy.host, healthy.port, how),
    }


FAULTS: Final = {
    "a replica is frozen": Fault(stop(0)),
    "a replica is frozen, CONN_MAX_AGE = 0": Fault(stop(0), 0),
    "a replica is frozen, connection pool": Fault(stop(0), pool=True),
    "a replica is frozen, ASGI": Fault(stop(0), asgi=True),
    "both, 1.5 s apart": Fault(stop(0, 1, pause=1.5)),
    "both at the same time, CONN_MAX_AGE = 0": Fault(stop(0, 1), 0),
    "one host of a list, CONN_MAX_AGE = 0": Fault(stop(0), 0, host_list),
    "an alias of two black holes": Fault(lambda cluster, stack: None, 0, black_holes),
    "a replayed lock": Fault(delay_replay),
}
_LISTENERS: list[Any] = []


# The process that is measured


@contextmanager
def reading(found: list[float | None], asgi: bool) -> Iterator[None]:
    """Read in eight threads; append the duration of each read, or None if it failed."""
    over = threading.Event()
    with served(asgi) as make:

        def read() -> None:
            from django.db import connections

            browser = Browser(make())
            while not over.wait(THINK_TIME):
                began = time.monotonic()
                answer = browser.request("GET", "/first/")
                found.append(None if answer is None else time.monotonic() - began)
            connections.close_all()

        threads = [threading.Thread(target=read) for _ in range(READERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def measure(name: str) -> Found:
    import socket

    logging.getLogger("pinning_middleware").addHandler(logging.NullHandler())
    fault = FAULTS[name]
    how = Variant(age=fault.age, pool=fault.pool, asgi=fault.asgi)
    _LISTENERS.extend(socket.create_server(("127.0.0.1", 0), backlog=100) for _ in range(2))
    replicas = fault.replicas
    found: list[float | None] = []
    with site(how, None if replicas is None else lambda cluster: replicas(cluster, how)) as cluster:
        for node in cluster.replicas:
            node.execute("ALTER SYSTEM SET max_standby_streaming_delay = '30s'")
            node.execute("SELECT pg_reload_conf()")
        with _chosen(cluster, replicas, how), reading(found, how.asgi):
            time.sleep(BEFORE)
            with ExitStack() as stack:
                fault.begin(cluster, stack)
                time.sleep(DURING)
            time.sleep(BEFORE / 2)
    took = [seconds for seconds in found if seconds is not None]
    failed = len(found) - len(took)
    return Found(max(took), sum(seconds > LONG for seconds in took), failed, len(found))


@contextmanager
def _chosen(cluster: Cluster, replicas: Any, how: Variant) -> Iterator[None]:
    from django.test import override_settings

    if replicas is None:
        yield
        return
    with override_settings(PINNING_REPLICAS=list(replicas(cluster, how))):
        yield


# The process that compares


def run(name: str, checkout: Path) -> Found:
    """Measure one fault in a new process with the package of a checkout."""
    module = [sys.executable, "-m", "benchmarks.other", str(checkout), "waits"]
    command = [*module, "--measure", name]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Found(*json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, other: Path | None) -> None:
    checkouts = [ROOT] if other is None else [ROOT, other]
    found: list[list[Found]] = [[] for _ in checkouts]
    for _ in range(ROUNDS):
        for runs, checkout in zip(found, checkouts, strict=True):
            runs.append(run(name, checkout))
    longest = [statistics.median(each.longest for each in runs) for runs in found]
    for label, runs, seconds in zip(("here", "other"), found, longest, strict=False):
        long, failed = sum(each.long for each in runs), sum(each.failed for each in runs)
        reads = sum(each.reads for each in runs)
        print(
            f"{name:38} {label:6} longest {seconds:5.2f} s, {long:3} of {reads:6,} over {LONG} s, "
            f"{failed} failed",
            flush=True,
        )
    if other is not None:
        print(f"{'':45} ratio {longest[0] / longest[1]:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waits")
    parser.add_argument("--measure", choices=FAULTS, help=argparse.SUPPRESS)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    for name in FAULTS:
        compare(name, options.against and options.against.resolve())


if __name__ == "__main__":
    main()
