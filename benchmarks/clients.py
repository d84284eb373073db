"""
Twelve clients while one replica at a time is paused for 0.2 to 1.5 s.

    python -m benchmarks clients [--asgi] [--pool] [--age 0] [--role plain|monitor]
"""

from __future__ import annotations

import os

from .fleet import OURS, STRATEGIES, ReplayObserver, Variant, lag, meanwhile, run, site, variant

READS = int(os.environ.get("READS", "100000"))


def main() -> None:
    how = variant()
    # These options make no difference to the other strategies.
    strategies = [OURS] if how != Variant() else list(STRATEGIES)
    print(how)
    with site(how) as cluster:
        for strategy in strategies:
            reads = READS if strategy == OURS else READS // 10
            with ReplayObserver(cluster) as observer, meanwhile(lag(cluster)):
                tally = run(strategy, reads, cluster, observer, how.asgi)
            print(f"{strategy:28}", tally.line(cluster), flush=True)
            cluster.wait_caught_up()


if __name__ == "__main__":
    main()
