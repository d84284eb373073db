"""
Reads a second that a cluster serves, by its number of replicas and of pinned users. Each server
runs eight reads at a time, and each read takes 0.1 s without using the processor. Half of the users
have written and are pinned; their replicas have caught up.

    python -m benchmarks capacity [--replicas 1 2 4 8] [--users 10 100 1000 10000]
"""

from __future__ import annotations

import argparse
import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from sample_site.cluster import Cluster

from .fleet import Browser, Send, Variant, entry, served, site

AT_ONCE = 8
# Clients for each replica: a few more than it serves at once.
CLIENTS = 10
ROUNDS, SECONDS, WARM_UP = 3, 5.0, 1.0


class RoundRobinRouter:
    """Spreads reads over the replicas, whatever was written."""

    def __init__(self) -> None:
        from django.conf import settings

        self._replicas = itertools.cycle(settings.PINNING_REPLICAS)

    def db_for_read(self, model: object, **hints: object) -> str:
        return next(self._replicas)

    def db_for_write(self, model: object, **hints: object) -> str:
        return "default"


PRIMARY, WITHOUT_PINS, OURS = "primary alone", "without pins", "pinning_middleware"
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    PRIMARY: {"DATABASE_ROUTERS": [], "MIDDLEWARE": []},
    WITHOUT_PINS: {"DATABASE_ROUTERS": ["benchmarks.capacity.RoundRobinRouter"], "MIDDLEWARE": []},
    OURS: {},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks capacity")
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--users", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    given = parser.parse_args()
    with site(Variant(age=0), pools, replicas=max([4, *given.replicas])), served() as make:
        for replicas in given.replicas:
            compare(f"{replicas} replicas", make, replicas, users=100)
        for users in given.users:
            compare(f"{users:,} pinned users", make, replicas=4, users=users)


def pools(cluster: Cluster) -> Mapping[str, Any]:
    """Return entries of DATABASES with a pool of eight connections each."""
    pool = {"min_size": AT_ONCE, "max_size": AT_ONCE, "timeout": 60}
    return {
        "default" if node is cluster.primary else name: entry(
            node.host, node.port, Variant(age=0), pool=pool
        )
        for name, node in cluster.nodes.items()
    }


def compare(name: str, make: Callable[[], Send], replicas: int, users: int) -> None:
    """Print the reads a second of each strategy in interleaved rounds, and their ratios."""
    from django.db import connections
    from django.test import override_settings

    aliases = [f"replica{number + 1}" for number in range(replicas)]
    rates: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    with override_settings(PINNING_REPLICAS=aliases, PINNING_SECONDS=3600):
        browsers = [Browser(make()) for _ in range(2 * users)]
        for number, browser in enumerate(browsers[:users]):
            browser.request("POST", f"/user{number}/", "1")
        random.shuffle(browsers)
        for _ in range(ROUNDS):
            for strategy, settings in STRATEGIES.items():
                with override_settings(**settings):
                    rates[strategy].append(reads_a_second(browsers, CLIENTS * replicas))
        connections.close_all()
    figures = ", ".join(f"{median(each):.0f} {strategy}" for strategy, each in rates.items())
    print(f"{name}, reads a second: {figures}", end="")
    for other in (WITHOUT_PINS, PRIMARY):
        ratios = (mine / its for mine, its in zip(rates[OURS], rates[other], strict=True))
        print(f"; {median(ratios):.2f} of {other}", end="")
    print(flush=True)


def reads_a_second(browsers: Sequence[Browser], clients: int) -> float:
    """Let each client read as one of its users after the other."""
    from django.db import connections

    done, over = [0] * clients, threading.Event()

    def work(number: int) -> None:
        mine = itertools.cycle(browsers[number % len(browsers) :: clients])
        while not over.is_set():
            if next(mine).request("GET", "/work/") is None:
                raise RuntimeError("a read failed")
            done[number] += 1
        connections.close_all()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(WARM_UP)
    before, began = sum(done), time.monotonic()
    time.sleep(SECONDS)
    rate = (sum(done) - before) / (time.monotonic() - began)
    over.set()
    for thread in threads:
        thread.join()
    return rate


if __name__ == "__main__":
    main()
