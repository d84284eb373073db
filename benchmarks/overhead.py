"""
The time of a whole request with one query on a real cluster, compared with a site without the
package, with one of django-multidb-router and, optionally, with another checkout of the package:

    python -m benchmarks.overhead
    python -m benchmarks.overhead --against ../pinning_middleware-0.1

Each site is a process of its own, because the package affects every connection; the processes
alternate. With another checkout it is run twice, to show the difference between two equal sites,
and the other package is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import psycopg

from .measure import ratio

ROUNDS = int(os.environ.get("ROUNDS", "150"))
# Requests of one kind before the next process is measured; the fastest of them counts.
BLOCK = 12
KINDS = ("unpinned read", "write", "first pinned read", "later pinned reads")
ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE, PLAIN, MULTIDB = "package", "plain", "multidb"
# The cookies of the packages.
COOKIES: Final = {"pinning", "multidb_pin_writes"}
INSERTED: Final = "SELECT pg_current_wal_insert_lsn()::text"
REPLAYED: Final = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"


class PlainRouter:
    """Reads one replica and writes the primary, and does nothing else."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica1"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


# The process that is measured


class Site:
    """A site in this process, which measures blocks of requests of one kind."""

    def __init__(self, name: str) -> None:
        import django

        from . import settings

        if name != PACKAGE:
            settings.INSTALLED_APPS = ["benchmarks"]
            settings.MIDDLEWARE = []
            settings.DATABASE_ROUTERS = ["benchmarks.overhead.PlainRouter"]
        if name == MULTIDB:
            settings.MIDDLEWARE = ["multidb.middleware.PinningRouterMiddleware"]
            settings.DATABASE_ROUTERS = ["multidb.PinningReplicaRouter"]
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        django.setup()
        from django.core.handlers.wsgi import WSGIHandler
        from django.db import connections
        from django.test import RequestFactory

        self._handler: Any = WSGIHandler()
        self._factory = RequestFactory()
        self._numbers = itertools.count()
        self._name = f"{name}-{os.getpid()}"
        # The Cookie header of a pin.
        self._pin_cookie = ""
        self._direct = [self._connect(connections.settings[alias]) for alias in connections]

    def block(self, kind: str) -> list[float]:
        """Return the times of BLOCK requests (seconds)."""
        if kind == "later pinned reads":
            self._pin()
            for _ in range(2):
                self._request("GET")
        seconds = []
        for _ in range(BLOCK):
            if kind == "unpinned read":
                self._pin_cookie = ""
            elif kind == "first pinned read":
                self._pin()
            seconds.append(self._request("POST" if kind == "write" else "GET"))
        return seconds

    def _pin(self) -> None:
        """Write, and wait until all replicas have caught up."""
        self._request("POST")
        primary, *replicas = self._direct
        ((position,),) = primary.execute(INSERTED).fetchall()
        for replica in replicas:
            while not replica.execute(REPLAYED, (position,)).fetchall()[0][0]:
                time.sleep(0.0001)

    def _request(self, method: str) -> float:
        path = f"/one/?{self._name}-{next(self._numbers)}"
        headers = {"Cookie": self._pin_cookie} if self._pin_cookie else None
        environ = self._factory.generic(method, path, headers=headers).environ
        began = time.perf_counter()
        response = self._handler(environ, lambda status, headers: None)
        response.close()
        seconds = time.perf_counter() - began
        assert response.status_code < 300, response.content
        for name in COOKIES & response.cookies.keys():
            self._pin_cookie = f"{name}={response.cookies[name].value}"
        return seconds

    def _connect(self, entry: dict[str, Any]) -> psycopg.Connection:
        conninfo = psycopg.conninfo.make_conninfo(
            host=entry["HOST"], port=entry["PORT"], user=entry["USER"], dbname=entry["NAME"]
        )
        return psycopg.connect(conninfo, autocommit=True)


def serve(name: str) -> None:
    measured = Site(name)
    for line in sys.stdin:
        print(json.dumps(measured.block(line.strip())), flush=True)


# The process that compares


@contextlib.contextmanager
def process(name: str, checkout: Path) -> Iterator[Callable[[str], list[float]]]:
    """Start a site of a checkout; yield a function that measures a block of requests there."""
    command = [sys.executable, "-m", "benchmarks.overhead", name]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with subprocess.Popen(
        command,
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:

        def ask(kind: str) -> list[float]:
            requests, answers = _pipes(started)
            print(kind, file=requests, flush=True)
            seconds: list[float] = json.loads(answers.readline())
            return seconds

        yield ask
        _pipes(started)[0].close()


def _pipes(started: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert started.stdin is not None
    assert started.stdout is not None
    return started.stdin, started.stdout


def compare(rounds: int, other: Path | None) -> None:
    """Measure the sites alternately, in changing order, and print the ratios of their times."""
    sites = {"here": (PACKAGE, ROOT), "plain": (PLAIN, ROOT)}
    pairs = [("here", "plain")]
    if other is None:
        sites["multidb"] = MULTIDB, ROOT
        pairs += [("multidb", "plain"), ("here", "multidb")]
    else:
        sites |= {"other": (PACKAGE, other), "other again": (PACKAGE, other)}
        pairs += [("other", "plain"), ("here", "other"), ("other again", "other")]
    with contextlib.ExitStack() as stack:
        ask = {name: stack.enter_context(process(*site)) for name, site in sites.items()}
        orders = itertools.cycle(itertools.permutations(sites))
        took: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for number in range(rounds + 5):
            for kind in KINDS:
                found = {name: min(ask[name](kind)) for name in next(orders)}
                # The first rounds connect and warm up.
                if number >= 5:
                    took[kind].append(found)
    for kind, rows in took.items():
        for one, two in pairs:
            text = ratio([(row[one], row[two]) for row in rows])
            print(f"{kind:20} {one:>11} / {two:7} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument(
        "name", nargs="?", choices=(PACKAGE, PLAIN, MULTIDB), help=argparse.SUPPRESS
    )
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    options = parser.parse_args()
    if options.name is not None:
        serve(options.name)
        return
    from .fleet import site

    with site():
        databases = json.loads(os.environ["BENCHMARK_DATABASES"])
        for age, rounds in ((None, ROUNDS), (0, ROUNDS // 5)):
            for entry in databases.values():
                entry["CONN_MAX_AGE"] = age
            os.environ["BENCHMARK_DATABASES"] = json.dumps(databases)
            print(f"CONN_MAX_AGE = {age}")
            compare(rounds, options.against and options.against.resolve())


if __name__ == "__main__":
    main()
