"""
Many readers of replicas that cannot serve them: how often the servers are probed, by readers and
monitors together, and how many reads are served a second. First both replicas are behind the pins
of all readers, then both are down.

    python -m benchmarks herds
    python -m benchmarks herds --against ../pinning_middleware-0.1

With another checkout of this repository, both sites read alternately on the same servers.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
ROUNDS = int(os.environ.get("ROUNDS", "5"))
READERS = 8
SECONDS = 2.0
WRITES = 400


# The process that is measured. It imports nothing else of this checkout.


class Probes(logging.Handler):
    """Counts the probes of all threads."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


class Site:
    """A site in this process, with the settings of the benchmarks."""

    def __init__(self, wait: float) -> None:
        import django
        import psycopg

        from benchmarks import settings

        settings.PINNING_WAIT = wait  # type: ignore[attr-defined]
        settings.PINNING_SECONDS = 600  # type: ignore[attr-defined]
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        self.connects, connect = 0, psycopg.connect

        def counted(*args: Any, **options: Any) -> Any:
            self.connects += 1
            return connect(*args, **options)

        psycopg.connect = counted
        django.setup()
        self.probes = Probes()
        for name in ("probes", "questions"):
            log = logging.getLogger(f"pinning_middleware.{name}")
            log.addHandler(self.probes)
            log.setLevel(logging.DEBUG)
            log.propagate = False
        logging.getLogger("pinning_middleware").addHandler(logging.NullHandler())
        from django.core.handlers.wsgi import WSGIHandler
        from django.test import RequestFactory

        self._handler: Any = WSGIHandler()
        self._factory = RequestFactory()
        self._tokens: list[str] = []

    def _request(self, method: str, path: str, token: str | None = None) -> Any:
        headers = None if token is None else {"Cookie": f"pinning={token}"}
        environ = self._factory.generic(method, path, headers=headers).environ
        response = self._handler(environ, lambda status, headers: None)
        response.close()
        assert response.status_code < 300, response.content
        return response

    def pin(self) -> dict[str, float]:
        """Write, and keep the token of each write."""
        for number in range(WRITES):
            response = self._request("POST", f"/one/?{os.getpid()}-{number}")
            self._tokens.append(response.cookies["pinning"].value)
        return {}

    def read(self, seconds: float) -> dict[str, float]:
        """Read in READERS threads, with a pin each; return the reads and probes."""
        reads, before, until = [0] * READERS, self.probes.count, time.monotonic() + seconds
        cpu = time.process_time()

        def run(number: int) -> None:
            from django.db import connections

            while time.monotonic() < until:
                token = random.choice(self._tokens) if self._tokens else None
                self._request("GET", "/first/", token)
                reads[number] += 1
            connections.close_all()

        threads = [threading.Thread(target=run, args=(number,)) for number in range(READERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cpu = time.process_time() - cpu
        return {"reads": sum(reads), "probes": self.probes.count - before, "cpu": cpu}

    def attempts(self, seconds: float) -> dict[str, float]:
        """Return the attempts to connect, a second, while few reads go to the primary."""
        before, until = self.connects, time.monotonic() + seconds
        while time.monotonic() < until:
            self._request("GET", "/first/")
            time.sleep(0.05)
        return {"attempts": (self.connects - before) / seconds}

    def back(self) -> dict[str, float]:
        """Read until both replicas have served a read; return the seconds."""
        began, ports, until = time.monotonic(), set[str](), time.monotonic() + 30
        while len(ports) < 2 and time.monotonic() < until:
            port = self._request("GET", "/first/").content.decode().split()[1]
            ports |= {port} - {os.environ["PRIMARY_PORT"]}
            time.sleep(0.005)
        return {"back": time.monotonic() - began}


def serve(wait: float) -> None:
    measured = Site(wait)
    for line in sys.stdin:
        name, *arguments = line.split()
        answer = getattr(measured, name)(*map(float, arguments))
        print(json.dumps(answer), flush=True)


# The process that compares


@contextlib.contextmanager
def process(checkout: Path, wait: float) -> Iterator[Callable[..., dict[str, float]]]:
    """Start a site of a checkout; yield a function that calls a method there."""
    # -P: this folder is not where modules are imported from.
    command = [sys.executable, "-P", __file__, "--serve", str(wait)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as started:

        def call(*words: object) -> dict[str, float]:
            assert started.stdin is not None
            assert started.stdout is not None
            print(*words, file=started.stdin, flush=True)
            answer: dict[str, float] = json.loads(started.stdout.readline())
            return answer

        yield call
        assert started.stdin is not None
        started.stdin.close()


Sites = dict[str, Callable[..., dict[str, float]]]


def behind(cluster: Any, sites: Sites, title: str) -> None:
    """Compare reads whose pins no replica has reached."""
    for call in sites.values():
        # Identify each replica before it is behind.
        call("read", 0.2)
    for node in cluster.replicas:
        node.pause()
    try:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sites}
        for call in sites.values():
            call("pin")
        orders = itertools.cycle(itertools.permutations(sites))
        for _ in range(ROUNDS):
            for name in next(orders):
                found[name].append(sites[name]("read", SECONDS))
    finally:
        for node in cluster.replicas:
            node.resume()
        cluster.wait_caught_up()
    for name, rounds in found.items():
        reads = sum(one["reads"] for one in rounds)
        probes = sum(one["probes"] for one in rounds)
        cpu = sum(one["cpu"] for one in rounds)
        print(
            f"{title:34} {name:6} {reads / SECONDS / len(rounds):6.0f} reads/s, "
            f"{probes / reads:.3f} probes and {1000 * cpu / reads:.2f} ms of CPU time a read",
            flush=True,
        )
    if "other" in found:
        pairs = zip(found["here"], found["other"], strict=True)
        ratio = statistics.median(here["reads"] / other["reads"] for here, other in pairs)
        print(f"{title:34} reads/s here / other: {ratio:.2f}", flush=True)


def down(cluster: Any, sites: Sites) -> None:
    """Compare the attempts to connect to replicas that are down, and their return."""
    title = "both replicas are down"
    for name, call in sites.items():
        call("read", 0.5)
        for node in cluster.replicas:
            node.stop("immediate")
        call("attempts", 2.0)
        attempts = call("attempts", 5.0)["attempts"] / len(cluster.replicas)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda node: node.start(), cluster.replicas))
        back = call("back")["back"]
        cluster.wait_caught_up(timeout=30)
        print(
            f"{title:34} {name:6} {attempts:6.1f} attempts/s at each replica, both read again "
            f"{back:.2f} s after they have started",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks herds")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=("monitor", "plain"), help="both by default")
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
    elif options.role is not None:
        compare(options.role, options.against and options.against.resolve())
    else:
        # A process for each, since each sets up Django with the ports of its own cluster.
        for role in ("monitor", "plain"):
            command = [sys.executable, "-m", "benchmarks.herds", f"--role={role}", *sys.argv[1:]]
            subprocess.check_call(command)


def compare(role: str, other: Path | None) -> None:
    """Run each site of a role in a process of its own, on a cluster of its own."""
    from benchmarks.fleet import Variant, site

    checkouts = {"here": ROOT} if other is None else {"here": ROOT, "other": other}
    with site(Variant(role=role)) as cluster:
        os.environ["PRIMARY_PORT"] = str(cluster.primary.port)
        for wait in (0.0, 0.05):
            with contextlib.ExitStack() as stack:
                sites = {n: stack.enter_context(process(p, wait)) for n, p in checkouts.items()}
                behind(cluster, sites, f"behind, {role}, PINNING_WAIT = {wait:g}")
        if role == "monitor":
            with contextlib.ExitStack() as stack:
                sites = {n: stack.enter_context(process(p, 0)) for n, p in checkouts.items()}
                down(cluster, sites)


if __name__ == "__main__":
    main()
