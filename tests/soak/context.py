"""What a fault acts on: the servers, addresses, cache and clock of a run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sample_site.cluster import Cluster, Node
from tests.real import mariadb

from .history import Fault, Recorder
from .network import Link
from .rig import Running

__all__ = [
    "GTID_PRIMARY",
    "LOST_WRITES",
    "PINS",
    "READS",
    "STORED_PINS",
    "WRITES",
    "FaultContext",
]

READS, WRITES, PINS, LOST_WRITES = "reads", "writes", "pins", "lost writes"
STORED_PINS: Final = "stored pins"
GTID_PRIMARY, GTID_REPLICAS = "my", ("my1", "my2")


class FaultContext:
    """Acts on the servers of a run; ``wait`` returns early when the run is over."""

    def __init__(
        self, running: Running, rng: random.Random, over: threading.Event, recorder: Recorder
    ) -> None:
        self.running, self.rng, self.over = running, rng, over
        self._recorder = recorder

    def wait(self, least: float, most: float) -> None:
        self.over.wait(self.rng.uniform(least, most))

    @contextmanager
    def excused(self, name: str, *excuses: str) -> Iterator[None]:
        """Record a part of a fault that excuses more than the rest of it."""
        fault = Fault(name, time.monotonic(), None, list(excuses))
        self._recorder.add(fault)
        try:
            yield
        finally:
            self._recorder.add(fault._replace(ended=time.monotonic()))

    @property
    def replica(self) -> Any:
        """A replica: a node of PostgreSQL's cluster, or the alias of a server with GTIDs."""
        servers = self.running.rig.servers
        return self.rng.choice(servers.replicas if isinstance(servers, Cluster) else GTID_REPLICAS)

    @property
    def primary(self) -> Node:
        return self.cluster.primary

    @property
    def cluster(self) -> Cluster:
        assert isinstance(self.running.rig.servers, Cluster)
        return self.running.rig.servers

    @property
    def gtid(self) -> mariadb.Servers:
        assert isinstance(self.running.rig.servers, mariadb.Servers)
        return self.running.rig.servers

    @property
    def links(self) -> dict[str, Link]:
        """The link of each alias, if the layout has them."""
        return self.running.rig.links
