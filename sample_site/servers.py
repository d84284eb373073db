"""`python -m sample_site.servers`: run a primary and replicas until Ctrl-C, for a site of yours."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from .cluster import Cluster
from .node import HOST, SUPERUSER
from .programs import END_SIGNALS, ClusterError

FOLDER = Path(__file__).parent / ".demo" / "servers"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sample_site.servers",
        description="Run a PostgreSQL primary and streaming replicas until Ctrl-C.",
    )
    parser.add_argument("--port", type=int, default=15432, help="the primary's; default: 15432")
    parser.add_argument("--replicas", type=int, default=2, help="their number; default: 2")
    parser.add_argument("--lag", type=float, default=0, help="of each replica, in seconds")
    parser.add_argument("--database", default="mysite", help="its name; default: mysite")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the data is kept")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the servers, and return the exit code."""
    chosen, ended = arguments(words), threading.Event()
    for number in END_SIGNALS:
        signal.signal(number, lambda number, frame: ended.set())
    print("Starting PostgreSQL …", flush=True)
    cluster = Cluster(chosen.folder, replicas=chosen.replicas, first_port=chosen.port)
    try:
        with cluster:
            cluster.create_database(chosen.database)
            # Without a delay yet, so that the replicas have the database.
            cluster.wait_caught_up()
            for replica in cluster.replicas:
                replica.set_delay(chosen.lag)
            for node in cluster.nodes.values():
                print(f"  {node.name:<10}{HOST}:{node.port}")
            print(f'Database "{chosen.database}", user "{SUPERUSER}", no password.')
            print(f"Each replica lags {chosen.lag:g} s. Ctrl-C stops the servers.", flush=True)
            # Python runs a handler in the main thread, which another thread's signal does not wake.
            while not ended.wait(0.5):
                pass
            print("\nStopping …", flush=True)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
