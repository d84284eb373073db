"""
How soon a server serves requests again after a fault has ended, while eight threads read and write:

    python -m benchmarks recovery

A server that crashed has recovered from its fault when it accepts connections. ``ROUNDS``: how
often each fault happens; the median and the longest time count.
"""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sample_site.cluster import Cluster, Node

from .faults import TERMINATE
from .fleet import Browser, served, site

ROUNDS = int(os.environ.get("ROUNDS", "5"))
THREADS, THINK_TIME = 8, 0.005
# Seconds that a fault lasts, and after which the server counts as lost.
DURING, LOST = 3.0, 60.0
MAX_LAG = 1.0


class Served:
    """When each server has last served a request: the time at which that began, by its port."""

    def __init__(self) -> None:
        self.began: dict[int, float] = {}

    def wait(self, node: Node, since: float) -> float:
        """Return how long after ``since`` a server has first served a request (seconds)."""
        while time.monotonic() - since < LOST:
            if self.began.get(node.port, 0.0) >= since:
                return time.monotonic() - since
            time.sleep(0.001)
        raise RuntimeError(f"{node} serves nothing")


@contextmanager
def requests(primary: Node) -> Iterator[Served]:
    """Read without pins, and write, in threads."""
    seen, over = Served(), threading.Event()
    with served() as make:

        def work(number: int) -> None:
            from django.db import connections

            is_writer = number == 0
            while not over.wait(THINK_TIME):
                # A client without a cookie each time.
                browser, began = Browser(make()), time.monotonic()
                method = "POST" if is_writer else "GET"
                answer = browser.request(method, "/recovery/", "1")
                if answer is not None:
                    port = primary.port if is_writer else int(answer.text.split()[1])
                    seen.began[port] = max(began, seen.began.get(port, 0.0))
            connections.close_all()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            over.set()
            for thread in threads:
                thread.join()


# The faults: each returns when it has ended


def terminate(*nodes: Node) -> None:
    for node in nodes:
        node.execute(TERMINATE)


def crash(*nodes: Node) -> None:
    for node in nodes:
        node.stop("immediate")
    time.sleep(DURING)
    for node in nodes:
        node.start()


def freeze(*nodes: Node) -> None:
    for node in nodes:
        node.freeze()
    time.sleep(DURING)
    for node in nodes:
        node.thaw()


def delay(*nodes: Node) -> None:
    for node in nodes:
        node.pause()
    time.sleep(DURING)
    for node in nodes:
        node.resume()


def one(cluster: Cluster) -> list[Node]:
    return cluster.replicas[:1]


def both(cluster: Cluster) -> list[Node]:
    return list(cluster.replicas)


def primary(cluster: Cluster) -> list[Node]:
    return [cluster.primary]


FAULTS: Final[dict[str, tuple[Callable[..., None], Callable[[Cluster], list[Node]]]]] = {
    "a replica closes all connections": (terminate, one),
    "a replica crashes": (crash, one),
    "both replicas crash": (crash, both),
    "a replica is frozen": (freeze, one),
    "both replicas are frozen": (freeze, both),
    "a replica lags more than PINNING_MAX_LAG": (delay, one),
    "the primary crashes": (crash, primary),
    "the primary is frozen": (freeze, primary),
}


def main() -> None:
    from django.test import override_settings

    logging.getLogger("pinning_middleware").addHandler(logging.NullHandler())
    logging.getLogger("django.request").addHandler(logging.NullHandler())
    logging.getLogger("django.request").propagate = False
    with site() as cluster, override_settings(PINNING_MAX_LAG=MAX_LAG):
        for name, (cause, chosen) in FAULTS.items():
            nodes, took = chosen(cluster), []
            with requests(cluster.primary) as seen:
                for _ in range(ROUNDS):
                    start = time.monotonic()
                    for node in (cluster.primary, *cluster.replicas):
                        seen.wait(node, start)
                    cause(*nodes)
                    ended = time.monotonic()
                    took.append(max(seen.wait(node, ended) for node in nodes))
            print(
                f"{name:42} serves again after {statistics.median(took):5.2f} s, "
                f"at most {max(took):5.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
