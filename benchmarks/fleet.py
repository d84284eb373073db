"""Clients that write to and read from a real cluster, and count stale reads."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, Final, NamedTuple

import django
import psycopg

from sample_site.cluster import Cluster, Node
from sample_site.wal import INSERTED, REPLAYED, end_of_log

CLIENTS = 12
THINK_TIME = 0.02

# The settings of each strategy. Without PINNING_REPLICAS this package does not move reads of a
# replica to the primary after a write.
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "every read on the primary": {
        "DATABASE_ROUTERS": [],
        "MIDDLEWARE": [],
        "PINNING_REPLICAS": [],
    },
    "round robin, no pins": {
        "DATABASE_ROUTERS": ["multidb.ReplicaRouter"],
        "MIDDLEWARE": [],
        "PINNING_REPLICAS": [],
    },
    "django-multidb-router, 1 s": {
        "DATABASE_ROUTERS": ["multidb.PinningReplicaRouter"],
        "MIDDLEWARE": ["multidb.middleware.PinningRouterMiddleware"],
        "MULTIDB_PINNING_SECONDS": 1,
        "PINNING_REPLICAS": [],
    },
    "django-multidb-router, 15 s": {
        "DATABASE_ROUTERS": ["multidb.PinningReplicaRouter"],
        "MIDDLEWARE": ["multidb.middleware.PinningRouterMiddleware"],
        "MULTIDB_PINNING_SECONDS": 15,
        "PINNING_REPLICAS": [],
    },
    "pinning_middleware": {},
}
OURS: Final = "pinning_middleware"

# The database roles that a site may use.
SUPERUSER, MONITOR, PLAIN = "superuser", "monitor", "plain"
ROLES: Final = {SUPERUSER: "postgres", MONITOR: "site_monitor", PLAIN: "site_plain"}


class Load(NamedTuple):
    """How often a client reads after each write, and for how long replicas are paused (seconds)."""

    reads_per_write: int = 6
    least: float = 0.2
    most: float = 1.5


class Variant(NamedTuple):
    """How the site is run, from the command line."""

    asgi: bool = False
    pool: bool = False
    age: int | None = None
    role: str = SUPERUSER

    def __str__(self) -> str:
        pool = "Django's pool" if self.pool else f"CONN_MAX_AGE = {self.age}"
        return f"{'ASGI' if self.asgi else 'WSGI'}, {pool}, {self.role}"


def variant() -> Variant:
    """Return the variant that the command line selects."""
    parser = argparse.ArgumentParser(prog=sys.argv[0])
    parser.add_argument("--asgi", action="store_true", help="async views, under uvicorn")
    parser.add_argument("--pool", action="store_true", help="Django's pool of connections")
    parser.add_argument("--age", type=int, default=None, help="CONN_MAX_AGE; None by default")
    parser.add_argument("--role", choices=ROLES, default=SUPERUSER)
    return Variant(**vars(parser.parse_args()))


def entry(host: str, port: int | str, how: Variant = Variant(), **options: Any) -> dict[str, Any]:  # noqa: B008
    """Return an entry of Django's DATABASES."""
    pool = {"pool": {"min_size": 0, "max_size": 2 * CLIENTS}} if how.pool else {}
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "site",
        "USER": ROLES[how.role],
        "PASSWORD": "",
        "HOST": host,
        "PORT": str(port),
        "CONN_MAX_AGE": 0 if how.pool else how.age,
        "OPTIONS": {**options, **pool},
    }


@contextmanager
def site(
    how: Variant = Variant(),  # noqa: B008
    more: Mapping[str, Mapping[str, Any]] | Callable[[Cluster], Mapping[str, Any]] | None = None,
    replicas: int = 2,
) -> Iterator[Cluster]:
    """
    Run the benchmarks' site on a cluster of its own. ``more`` are entries of DATABASES beside those
    of the primary and the replicas, or in their place.
    """
    with (
        tempfile.TemporaryDirectory(prefix="pinning-benchmark-") as folder,
        Cluster(Path(folder), replicas=replicas, keep=False) as cluster,
    ):
        cluster.create_database("site")
        _make_roles(cluster.primary, ROLES[how.role])
        databases: dict[str, Any] = {
            "default" if node is cluster.primary else name: entry(node.host, node.port, how)
            for name, node in cluster.nodes.items()
        }
        databases.update(more(cluster) if callable(more) else more or {})
        os.environ["BENCHMARK_DATABASES"] = json.dumps(databases)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        django.setup()
        from django.core.management import call_command
        from django.db import connections

        from .models import Entry

        call_command("migrate", run_syncdb=True, verbosity=0)
        Entry.objects.create(client="first", number=1)
        cluster.wait_caught_up()
        try:
            yield cluster
        finally:
            connections.close_all()
            if how.pool:
                for alias in databases:
                    connections[alias].close_pool()  # type: ignore[attr-defined]


def _make_roles(primary: Node, owner: str) -> None:
    for role, name in ROLES.items():
        if role != SUPERUSER:
            primary.execute(f"CREATE ROLE {name} LOGIN")
    primary.execute(f"GRANT pg_monitor TO {ROLES[MONITOR]}")
    primary.execute(f"ALTER DATABASE site OWNER TO {owner}")


# Which replicas could serve


class ReplayObserver:
    """
    The replay position of each replica, polled every few milliseconds on a separate connection.

    The position only grows while a server runs, so a read that begins later could be served there.
    It is a lower bound: no read is counted as possible that no replica could serve.
    """

    EVERY: Final = 0.003

    def __init__(self, cluster: Cluster) -> None:
        self.primary = cluster.primary.port
        self._replayed: dict[int, int] = {}
        self._down: Counter[int] = Counter()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(node,)) for node in cluster.replicas
        ]

    def __enter__(self) -> ReplayObserver:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def caught_up(self, position: int) -> set[int]:
        """Return the ports of the replicas that are known to have replayed a position."""
        return {port for port, replayed in self._replayed.items() if replayed >= position}

    @contextmanager
    def without(self, node: Node) -> Iterator[None]:
        """Exclude a replica while it is down."""
        self._down[node.port] += 1
        self._replayed.pop(node.port, None)
        try:
            yield
        finally:
            self._down[node.port] -= 1

    def _watch(self, node: Node) -> None:
        while not self._over.is_set():
            with (
                suppress(psycopg.Error),
                psycopg.connect(node.conninfo(), autocommit=True) as connection,
            ):
                while not self._over.wait(self.EVERY):
                    ((replayed,),) = connection.execute(REPLAYED).fetchall()
                    if not self._down[node.port]:
                        self._replayed[node.port] = replayed
            self._over.wait(self.EVERY)


# Clients


class Answer(NamedTuple):
    status: int
    text: str
    cookies: SimpleCookie


# Sends a request: its method, path, body and header `Cookie`.
Send = Callable[[str, str, str, str], Answer]


@contextmanager
def served(asgi: bool = False) -> Iterator[Callable[[], Send]]:
    """Run the site by its WSGI handler, or under uvicorn; yield a factory of ``Send``."""
    if not asgi:
        from django.core.handlers.wsgi import WSGIHandler

        yield partial(partial, _by_wsgi, WSGIHandler())
        return
    import uvicorn
    from django.core.asgi import get_asgi_application

    config = uvicorn.Config(
        get_asgi_application(), port=0, lifespan="off", log_level="error", access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield lambda: partial(_by_http, http.client.HTTPConnection("127.0.0.1", port))
    finally:
        server.should_exit = True
        thread.join()


def _by_wsgi(handler: Any, method: str, path: str, body: str, cookie: str) -> Answer:
    from django.test import RequestFactory

    headers = {"Cookie": cookie} if cookie else None
    request = RequestFactory().generic(method, path, body, "text/plain", headers=headers)
    response = handler(request.environ, lambda status, headers: None)
    try:
        return Answer(response.status_code, response.content.decode(), response.cookies)
    finally:
        response.close()


def _by_http(
    connection: http.client.HTTPConnection, method: str, path: str, body: str, cookie: str
) -> Answer:
    connection.request(method, f"/async{path}", body, {"Cookie": cookie} if cookie else {})
    response = connection.getresponse()
    text, cookies = response.read().decode(), SimpleCookie()
    for header in response.msg.get_all("Set-Cookie", ()):
        cookies.load(header)
    return Answer(response.status, text, cookies)


class Browser:
    """A client with cookies."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._cookies: dict[str, tuple[str, float]] = {}

    def request(self, method: str, path: str, body: str = "") -> Answer | None:
        """Return the answer, or None for an error of the site."""
        now = time.monotonic()
        self._cookies = {name: kept for name, kept in self._cookies.items() if kept[1] > now}
        cookie = "; ".join(f"{name}={value}" for name, (value, _) in self._cookies.items())
        answer = self._send(method, path, body, cookie)
        if answer.status >= 500:
            return None
        for name, morsel in answer.cookies.items():
            self._cookies[name] = morsel.value, time.monotonic() + int(morsel["max-age"] or 0)
        return answer


# Results


class Tally:
    """The results of the reads of a run."""

    def __init__(self) -> None:
        self.reads = self.stale = self.failed = 0
        # Reads that a replica could serve, and those of them that a replica served.
        self.possible = self.taken = 0
        self.served: Counter[int] = Counter()
        self.seconds: dict[str, list[float]] = {"write": [], "read": []}

    def add(self, other: Tally) -> None:
        self.reads += other.reads
        self.stale += other.stale
        self.failed += other.failed
        self.possible += other.possible
        self.taken += other.taken
        self.served += other.served
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds

    def line(self, cluster: Cluster) -> str:
        on_replicas = sum(
            count for port, count in self.served.items() if port != cluster.primary.port
        )
        return (
            f"{self.reads:7,} reads: {self.stale:6,} stale ({self.stale / self.reads:6.2%}), "
            f"{on_replicas / self.reads:6.1%} on replicas, of the {self.possible:,} that one could "
            f"serve {self.taken / max(self.possible, 1):7.2%}; {self.failed} requests failed"
        )


def run(
    strategy: str,
    reads: int,
    cluster: Cluster,
    observer: ReplayObserver | None = None,
    asgi: bool = False,
    reads_per_write: int = Load().reads_per_write,
) -> Tally:
    """Run all clients at the same time for this many reads, and return their tally."""
    from django.test import override_settings

    total, lock = Tally(), threading.Lock()

    def work(number: int, make: Callable[[], Send], watching: ReplayObserver) -> None:
        from django.db import connections

        name = f"{strategy}-{number}".replace(" ", "-")
        with psycopg.connect(cluster.primary.conninfo(), autocommit=True) as primary:
            each = reads // CLIENTS
            mine = _work(name, each, reads_per_write, Browser(make()), primary, watching)
        connections.close_all()
        with lock:
            total.add(mine)

    with override_settings(**STRATEGIES[strategy]), served(asgi) as make:
        if observer is None:
            with ReplayObserver(cluster) as own:
                _together(partial(work, make=make, watching=own))
        else:
            _together(partial(work, make=make, watching=observer))
    return total


def _together(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _work(
    name: str,
    reads: int,
    reads_per_write: int,
    browser: Browser,
    primary: psycopg.Connection,
    observer: ReplayObserver,
) -> Tally:
    tally, number, position = Tally(), 0, 0

    def timed(kind: str, *request: str) -> Answer | None:
        began = time.monotonic()
        answer = browser.request(*request)
        tally.seconds[kind].append(time.monotonic() - began)
        return answer

    while tally.reads < reads:
        number += 1
        tally.failed += timed("write", "POST", f"/{name}/", str(number)) is None
        # Everything that this client wrote is before this position.
        ((inserted,),) = primary.execute(INSERTED).fetchall()
        position = end_of_log(inserted)
        for _ in range(reads_per_write):
            time.sleep(THINK_TIME)
            before = observer.caught_up(position)
            answer = timed("read", "GET", f"/{name}/")
            tally.reads += 1
            if answer is None:
                tally.failed += 1
                continue
            seen, port = map(int, answer.text.split())
            tally.stale += seen < number
            tally.served[port] += 1
            # A replica that failed meanwhile could not.
            if before & observer.caught_up(position):
                tally.possible += 1
                # Without a row the port is 0, which also means a replica.
                tally.taken += port != observer.primary
    return tally


@contextmanager
def meanwhile(*troubles: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each function in a thread while the block runs; they end when their event is set."""
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


def lag(cluster: Cluster, load: Load = Load()) -> Callable[[threading.Event], None]:  # noqa: B008
    """Return a function that pauses one replica at a time."""

    def trouble(over: threading.Event) -> None:
        while not over.is_set():
            node = random.choice(cluster.replicas)
            node.pause()
            over.wait(random.uniform(load.least, load.most))
            node.resume()

    return trouble
