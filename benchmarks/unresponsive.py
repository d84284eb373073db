"""
Eight threads that read while a replica is frozen, while the primary is frozen, and while a
replica is an address that accepts connections and never answers.

    python -m benchmarks unresponsive [--asgi] [--pool] [--age 0] [--role plain|monitor]

``THINK_TIME``: seconds between two reads of a thread.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from sample_site.cluster import Cluster, Node

from .fleet import Browser, entry, served, site, variant

READERS = 8
THINK_TIME = float(os.environ.get("THINK_TIME", "0.01"))
# Seconds before, during and after the time without answers.
BEFORE, FROZEN, AFTER = 3.0, 6.0, 12.0
STEP = 0.5
LONG = 0.5


class Read(NamedTuple):
    began: float
    ended: float
    port: int


class Readers:
    """Threads that read continuously."""

    def __init__(self, asgi: bool) -> None:
        self._asgi = asgi
        self.reads: list[Read] = []
        self.failed = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        over = threading.Event()
        with served(self._asgi) as make:

            def read() -> None:
                from django.db import connections

                browser = Browser(make())
                while not over.wait(THINK_TIME):
                    began = time.monotonic()
                    answer = browser.request("GET", "/first/")
                    if answer is None:
                        self.failed += 1
                    else:
                        port = int(answer.text.split()[1])
                        self.reads.append(Read(began, time.monotonic(), port))
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

    def report(self, name: str, before: float, began: float, ended: float) -> None:
        """Print the reads between two times, and their rate relative to that since ``before``."""
        usual = self._ends(before, began) / (began - before) * STEP
        reads = [read for read in self.reads if began - 5 <= read.began < ended]
        took = sorted((read.ended - read.began for read in reads), reverse=True)
        steps = [began + STEP * n for n in range(int((ended - began) / STEP))]
        paces = [self._ends(step, step + STEP) / usual for step in steps]
        long = sum(seconds > LONG for seconds in took)
        print(
            f"{name:26} longest read {took[0]:.2f} s, {long} over {LONG} s, {self.failed} failed; "
            f"rate relative to {usual / STEP:.0f} reads/s before, each {STEP} s:",
            " ".join(f"{pace:.2f}" for pace in paces),
            flush=True,
        )

    def _ends(self, since: float, until: float) -> int:
        return sum(since <= read.ended < until for read in self.reads)


def frozen(name: str, node: Node, asgi: bool) -> None:
    readers = Readers(asgi)
    with readers.reading():
        time.sleep(1)
        before = time.monotonic()
        time.sleep(BEFORE)
        began = time.monotonic()
        node.freeze()
        try:
            time.sleep(FROZEN)
        finally:
            ended = time.monotonic()
            node.thaw()
        time.sleep(AFTER)
    readers.report(name, before, began, ended)
    back = [read.ended for read in readers.reads if read.port == node.port and read.ended > ended]
    if back:
        print(f"{'':28} back in rotation {min(back) - ended:.1f} s after it was resumed")


def hole(asgi: bool) -> None:
    from django.test import override_settings

    readers = Readers(asgi)
    with readers.reading():
        time.sleep(1)
        before = time.monotonic()
        time.sleep(BEFORE)
        began = time.monotonic()
    with override_settings(PINNING_REPLICAS=["replica1", "hole"]):
        # The rate before is that of two replicas that answer, in the same process.
        gap = time.monotonic() - began
        readers.reads = [Read(r.began + gap, r.ended + gap, r.port) for r in readers.reads]
        before, began = before + gap, began + gap
        with readers.reading():
            time.sleep(FROZEN)
            ended = time.monotonic()
    readers.report("a black hole as a replica", before, began, ended)


def main() -> None:
    logging.getLogger("pinning_middleware").addHandler(logging.NullHandler())
    how = variant()
    print(how)
    with closing(socket.create_server(("127.0.0.1", 0), backlog=100)) as listener:
        port = listener.getsockname()[1]

        def more(cluster: Cluster) -> dict[str, dict[str, object]]:
            return {"hole": entry("127.0.0.1", port, how)}

        with site(how, more) as cluster:
            hole(how.asgi)
            frozen("a replica is frozen", cluster.replicas[0], how.asgi)
            frozen("the primary is frozen", cluster.primary, how.asgi)


if __name__ == "__main__":
    main()
