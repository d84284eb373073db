"""Latency of writing and of pinned requests; twelve clients, and no replica lags."""

from __future__ import annotations

import os
import statistics

from .fleet import Tally, run, site

READS = int(os.environ.get("READS", "6000"))
ROUNDS = 5


def describe(seconds: list[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return f"p50 {cuts[49] * 1e3:6.2f} ms, p99 {cuts[98] * 1e3:6.2f} ms"


def main() -> None:
    names = ("django-multidb-router, 15 s", "pinning_middleware")
    totals = {name: Tally() for name in names}
    with site() as cluster:
        for _ in range(ROUNDS):
            for name in names:
                totals[name].add(run(name, READS // ROUNDS, cluster))
    for kind in ("write", "read"):
        for name in names:
            print(f"{kind:5}  {name:28}", describe(totals[name].seconds[kind]))


if __name__ == "__main__":
    main()
