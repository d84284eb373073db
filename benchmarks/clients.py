"""
Twelve clients, with each strategy, while one replica at a time is paused: for 0.2 to 1.5 s, while
they write often; and for 2 to 5 s, while they write rarely.

    python -m benchmarks clients [--asgi] [--pool] [--age 0] [--role plain|monitor]
"""

from __future__ import annotations

import os
from typing import Final

from .fleet import (
    OURS,
    STRATEGIES,
    Load,
    ReplayObserver,
    Variant,
    lag,
    meanwhile,
    run,
    site,
    variant,
)

READS = int(os.environ.get("READS", "100000"))
LOADS: Final = {"short lags, often written": Load(), "long lags, rarely written": Load(120, 2, 5)}


def main() -> None:
    how = variant()
    # These options make no difference to the other strategies.
    strategies = [OURS] if how != Variant() else list(STRATEGIES)
    print(how)
    with site(how) as cluster:
        for name, load in LOADS.items():
            print(name)
            for strategy in strategies:
                reads = READS if strategy == OURS else READS // 10
                with ReplayObserver(cluster) as observer, meanwhile(lag(cluster, load)):
                    tally = run(strategy, reads, cluster, observer, how.asgi, load.reads_per_write)
                print(f"{strategy:28}", tally.line(cluster), flush=True)
                cluster.wait_caught_up()


if __name__ == "__main__":
    main()
