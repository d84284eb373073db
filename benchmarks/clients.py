"""Twelve clients while one replica at a time is paused for 0.2 to 1.5 s."""

from __future__ import annotations

import os
import random
import threading

from .fleet import STRATEGIES, meanwhile, run, site

OURS = int(os.environ.get("READS", "100000"))
OTHERS = OURS // 10


def main() -> None:
    with site() as cluster:

        def lag(over: threading.Event) -> None:
            while not over.is_set():
                node = random.choice(cluster.replicas)
                node.pause()
                over.wait(random.uniform(0.2, 1.5))
                node.resume()

        for strategy in STRATEGIES:
            with meanwhile(lag):
                tally = run(strategy, OURS if strategy == "pinning_middleware" else OTHERS)
            print(f"{strategy:28}", tally.line(cluster), flush=True)
            cluster.wait_caught_up()


if __name__ == "__main__":
    main()
