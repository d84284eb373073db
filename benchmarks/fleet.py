"""Clients that write and read on a real cluster, and count what they miss."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import django

from sample_site.cluster import Cluster

CLIENTS = 12
READS_A_WRITE = 6
THINKS = 0.02

# Settings of what is compared. The last is ours.
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "every read on the primary": {"DATABASE_ROUTERS": [], "MIDDLEWARE": []},
    "round robin, no pins": {"DATABASE_ROUTERS": ["multidb.ReplicaRouter"], "MIDDLEWARE": []},
    "django-multidb-router, 1 s": {
        "DATABASE_ROUTERS": ["multidb.PinningReplicaRouter"],
        "MIDDLEWARE": ["multidb.middleware.PinningRouterMiddleware"],
        "MULTIDB_PINNING_SECONDS": 1,
    },
    "django-multidb-router, 15 s": {
        "DATABASE_ROUTERS": ["multidb.PinningReplicaRouter"],
        "MIDDLEWARE": ["multidb.middleware.PinningRouterMiddleware"],
        "MULTIDB_PINNING_SECONDS": 15,
    },
    "pinning_middleware": {},
}


@contextmanager
def site() -> Iterator[Cluster]:
    """Run the benchmarks' site on a cluster of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="pinning-benchmark-") as folder,
        Cluster(Path(folder), keep=False) as cluster,
    ):
        cluster.create_database("site")
        for name, node in (
            ("DATABASE", "primary"),
            ("REPLICA1", "replica1"),
            ("REPLICA2", "replica2"),
        ):
            os.environ[f"{name}_URL"] = cluster.url(node, "site")
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        django.setup()
        from django.core.management import call_command

        call_command("migrate", run_syncdb=True, verbosity=0)
        cluster.wait_caught_up()
        yield cluster


class Tally:
    """What all clients of a run have seen."""

    def __init__(self) -> None:
        self.reads = self.stale = self.failed = 0
        self.served: Counter[int] = Counter()
        self.seconds: dict[str, list[float]] = {"write": [], "read": []}

    def add(self, other: Tally) -> None:
        self.reads += other.reads
        self.stale += other.stale
        self.failed += other.failed
        self.served += other.served
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds

    def line(self, cluster: Cluster) -> str:
        on_replicas = sum(
            count for port, count in self.served.items() if port != cluster.primary.port
        )
        return (
            f"{self.reads:7,} reads: {self.stale:6,} stale ({self.stale / self.reads:6.2%}), "
            f"{on_replicas / self.reads:6.1%} on replicas, {self.failed} requests failed"
        )


def run(strategy: str, reads: int) -> Tally:
    """Let all clients work at once until they have read so often, and return what they saw."""
    from django.test import override_settings

    total, lock = Tally(), threading.Lock()

    def work(number: int) -> None:
        from django.db import connections

        mine = _work(f"{strategy}-{number}".replace(" ", "-"), reads // CLIENTS)
        connections.close_all()
        with lock:
            total.add(mine)

    with override_settings(ALLOWED_HOSTS=["*"], **STRATEGIES[strategy]):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return total


def _work(name: str, reads: int) -> Tally:
    browser, tally, number = _browser(), Tally(), 0
    while tally.reads < reads:
        number += 1
        tally.failed += not browser(
            tally,
            "write",
            lambda client, n=number: client.post(f"/{name}/", str(n), content_type="text/plain"),
        )
        for _ in range(READS_A_WRITE):
            time.sleep(THINKS)
            response = browser(tally, "read", lambda client: client.get(f"/{name}/"))
            tally.reads += 1
            if response is None:
                tally.failed += 1
                continue
            seen, port = map(int, response.content.split())
            tally.stale += seen < number
            tally.served[port] += 1
    return tally


def _browser() -> Callable[..., Any]:
    from django.test import Client

    client = Client()
    ends: dict[str, float] = {}

    def request(tally: Tally, kind: str, send: Callable[[Client], Any]) -> Any:
        # Django's client keeps cookies for ever; browsers do not.
        now = time.monotonic()
        for name in [name for name, end in ends.items() if end <= now]:
            client.cookies.pop(name, None)
            del ends[name]
        try:
            response = send(client)
        except Exception as error:
            print(f"failed: {type(error).__name__}: {error}")
            return None
        tally.seconds[kind].append(time.monotonic() - now)
        for name, morsel in response.cookies.items():
            ends[name] = time.monotonic() + int(morsel["max-age"] or 0)
        return response

    return request


@contextmanager
def meanwhile(*troubles: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each of these in a thread while the block runs; they end when their event is set."""
    over = threading.Event()
    threads = [threading.Thread(target=trouble, args=(over,)) for trouble in troubles]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
