"""
Twelve clients while a replica at a time is killed for two seconds, and all backends of one are
terminated every 0.7 s. The other replica is up and caught up.

    python -m benchmarks faults [--asgi] [--pool] [--age 0] [--role plain|monitor]

``FAULT=freeze``: a replica at a time is frozen for two seconds (SIGSTOP) instead.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading

from psycopg import Error

from .fleet import OURS, ReplayObserver, meanwhile, run, site, variant

# What no read should take (seconds).
LONG = 1.5
READS = int(os.environ.get("READS", "20000"))
FAULT = os.environ.get("FAULT", "kill")
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


def main() -> None:
    logging.getLogger("pinning_middleware").addHandler(logging.NullHandler())
    how = variant()
    print(how)
    with site(how) as cluster, ReplayObserver(cluster) as observer:

        def kill(over: threading.Event) -> None:
            for node in itertools.cycle(cluster.replicas):
                with observer.without(node):
                    node.stop("immediate")
                    over.wait(2)
                    node.start()
                if over.wait(2):
                    return

        def terminate(over: threading.Event) -> None:
            while not over.wait(0.7):
                node = random.choice(cluster.replicas)
                try:
                    node.execute(TERMINATE)
                except Error:
                    continue  # the replica that was killed

        def freeze(over: threading.Event) -> None:
            for node in itertools.cycle(cluster.replicas):
                with observer.without(node):
                    node.freeze()
                    over.wait(2)
                    node.thaw()
                if over.wait(2):
                    return

        with meanwhile(*((freeze,) if FAULT == "freeze" else (kill, terminate))):
            tally = run(OURS, READS, cluster, observer, how.asgi)
        print(tally.line(cluster))
        took = tally.seconds["read"]
        print(f"  longest read {max(took):.2f} s, {sum(t > LONG for t in took)} over {LONG} s")


if __name__ == "__main__":
    main()
