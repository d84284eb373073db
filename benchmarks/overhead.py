"""
What a request costs with the package, beside the same request of a site without it, on a real
cluster. Both are processes of their own, since the package is on the way of every connection, and
take turns. Two more show what is not the package's doing. One reads the replicas by turns, without
anything else. One does the least that any such package can: a middleware, a router and a wrapper
of statements that keep one flag, one signed position and one question, with none of the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import IO, Any, Final

import psycopg
from django.core import signing
from django.db.backends.signals import connection_created

from .measure import ratio

ROUNDS = int(os.environ.get("ROUNDS", "150"))
# Requests of one kind before the next process has its turn; the fastest of them counts.
BLOCK = 12
KINDS = {
    "unpinned read": 1.05,
    "write": 1.25,
    "first pinned read": 1.25,
    "later pinned reads": 1.08,
}
PACKAGE, PLAIN, TURNS, LEAST = "package", "plain", "turns", "least"
INSERTED: Final = "SELECT pg_current_wal_insert_lsn()::text"
REPLAYED_NOW: Final = "SELECT pg_last_wal_replay_lsn()::text"
REPLAYED: Final = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"


class PlainRouter:
    """Reads one replica and writes the primary, and does nothing else."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica1"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return "default"


class TurnsRouter(PlainRouter):
    turns = itertools.cycle(["replica1", "replica2"])

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return next(self.turns)


class Least:
    """What the least middleware knows of a request."""

    has_written = False
    replica = ""
    wanted = ""


least: ContextVar[Least] = ContextVar("least")


class LeastMiddleware:
    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        known = Least()
        if token := request.COOKIES.get("pinning"):
            known.wanted = signing.loads(token)
        least.set(known)
        response = self.get_response(request)
        if known.has_written:
            position = _ask("default", INSERTED)
            response.set_cookie("pinning", signing.dumps(position), 15)
            response.headers["Vary"], response.headers["Cache-Control"] = "Cookie", "private"
        return response

    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        """Be there, as whoever wants to know the user has to."""


class LeastRouter(TurnsRouter):
    def db_for_read(self, model: Any, **hints: Any) -> str:
        known = least.get()
        if known.has_written:
            return "default"
        if not known.replica:
            known.replica = next(self.turns)
            if known.wanted and not _reached(_ask(known.replica, REPLAYED_NOW), known.wanted):
                known.replica = "default"
        return known.replica


def least_wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
    if not sql.startswith("SELECT"):
        least.get().has_written = True
    return execute(sql, params, many, context)


def _watch(*, connection: Any, **kwargs: Any) -> None:
    connection.execute_wrappers.append(least_wrapper)
    _ask(connection.alias, INSERTED if connection.alias == "default" else REPLAYED_NOW, True)


def _ask(alias: str, sql: str, is_first: bool = False) -> str:
    from django.db import connections

    connections[alias].ensure_connection()
    pgconn = connections[alias].connection.pgconn
    if is_first:
        pgconn.prepare(b"least", sql.encode())
    return str(pgconn.exec_prepared(b"least", []).get_value(0, 0).decode())


def _reached(replayed: str, wanted: str) -> bool:
    one, other = ([int(part, 16) for part in text.split("/")] for text in (replayed, wanted))
    return one >= other


# The process that is measured


class Site:
    """A site in this process; it is asked for a kind and says what requests of it took."""

    def __init__(self, name: str) -> None:
        import django

        from . import settings

        if name != PACKAGE:
            settings.INSTALLED_APPS = ["benchmarks"]
            settings.MIDDLEWARE = []
            settings.DATABASE_ROUTERS = [f"benchmarks.overhead.{name.title()}Router"]
        if name == LEAST:
            settings.MIDDLEWARE = ["benchmarks.overhead.LeastMiddleware"]
            # This process runs the module under another name than the one that Django imports.
            connection_created.connect(importlib.import_module("benchmarks.overhead")._watch)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        django.setup()
        from django.core.handlers.wsgi import WSGIHandler
        from django.db import connections
        from django.test import RequestFactory

        self._handler: Any = WSGIHandler()
        self._factory = RequestFactory()
        self._numbers = itertools.count()
        self._name = f"{name}-{os.getpid()}"
        self._token = ""
        self._beside = [self._connect(connections.settings[alias]) for alias in connections]

    def block(self, kind: str) -> list[float]:
        """Return the seconds of some requests."""
        if kind == "later pinned reads":
            self._pin()
            for _ in range(2):
                self._request("GET")
        seconds = []
        for _ in range(BLOCK):
            if kind == "unpinned read":
                self._token = ""
            elif kind == "first pinned read":
                self._pin()
            seconds.append(self._request("POST" if kind == "write" else "GET"))
        return seconds

    def _pin(self) -> None:
        """Write, and wait until all replicas have it."""
        self._request("POST")
        primary, *replicas = self._beside
        ((position,),) = primary.execute(INSERTED).fetchall()
        for replica in replicas:
            while not replica.execute(REPLAYED, (position,)).fetchall()[0][0]:
                time.sleep(0.0001)

    def _request(self, method: str) -> float:
        path = f"/one/?{self._name}-{next(self._numbers)}"
        headers = {"Cookie": f"pinning={self._token}"} if self._token else None
        environ = self._factory.generic(method, path, headers=headers).environ
        began = time.perf_counter()
        response = self._handler(environ, lambda status, headers: None)
        response.close()
        seconds = time.perf_counter() - began
        assert response.status_code < 300, response.content
        if "pinning" in response.cookies:
            self._token = response.cookies["pinning"].value
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
def process(name: str) -> Iterator[Callable[[str], list[float]]]:
    """A site in a process of its own; yield what has it measure a block of requests."""
    command = [sys.executable, "-m", "benchmarks.overhead", name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:

        def ask(kind: str) -> list[float]:
            asked, answers = _pipes(started)
            print(kind, file=asked, flush=True)
            seconds: list[float] = json.loads(answers.readline())
            return seconds

        yield ask
        _pipes(started)[0].close()


def _pipes(started: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert started.stdin is not None
    assert started.stdout is not None
    return started.stdin, started.stdout


def compare(rounds: int) -> None:
    """Let the three take turns, each time in another order, and print what they took."""
    with contextlib.ExitStack() as stack:
        sites = {
            name: stack.enter_context(process(name)) for name in (PACKAGE, PLAIN, TURNS, LEAST)
        }
        orders = itertools.cycle(itertools.permutations(sites))
        took: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for number in range(rounds + 5):
            for kind in KINDS:
                found = {name: min(sites[name](kind)) for name in next(orders)}
                # The first ones connect, and warm up.
                if number >= 5:
                    took[kind].append(found)
    for kind, wanted in KINDS.items():
        pairs = [(found[PACKAGE], found[PLAIN]) for found in took[kind]]
        print(f"{kind:20}", ratio(pairs), f"(at most {wanted:.2f} wanted)", flush=True)
        for name, said in ((TURNS, "  by turns, without"), (LEAST, "  the least")):
            pairs = [(found[name], found[PLAIN]) for found in took[kind]]
            print(f"{said:20}", ratio(pairs), flush=True)


def main() -> None:
    if sys.argv[1:]:
        serve(sys.argv[1])
        return
    from .fleet import site

    with site():
        databases = json.loads(os.environ["BENCHMARK_DATABASES"])
        for age, rounds in ((None, ROUNDS), (0, ROUNDS // 5)):
            for entry in databases.values():
                entry["CONN_MAX_AGE"] = age
            os.environ["BENCHMARK_DATABASES"] = json.dumps(databases)
            print(f"CONN_MAX_AGE = {age}")
            compare(rounds)


if __name__ == "__main__":
    main()
