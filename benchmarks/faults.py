"""
Twelve clients while a replica at a time is killed for two seconds, and all backends of one are
terminated every 0.7 s. The other replica is up and caught up.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading

from psycopg import Error

from .fleet import meanwhile, run, site

READS = int(os.environ.get("READS", "20000"))
TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


def main() -> None:
    logging.getLogger("pinning_middleware").addHandler(logging.NullHandler())
    with site() as cluster:

        def kill(over: threading.Event) -> None:
            for node in itertools.cycle(cluster.replicas):
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
                    continue  # it is the one that was killed

        with meanwhile(kill, terminate):
            tally = run("pinning_middleware", READS)
        print(tally.line(cluster))


if __name__ == "__main__":
    main()
