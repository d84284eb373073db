"""The layouts that sites have between Django and its servers, each started and stopped by a block.

    with haproxy(*cluster.replicas) as proxy:
        entry = database(proxy, conn_max_age=None)

Nothing in here needs Django or the package.
"""

from __future__ import annotations

from .addresses import Address, Forwarder, Place, black_hole, database
from .daemons import Bouncer, Proxy, haproxy, pgbouncer
from .postgres import (
    come_back_behind,
    follows,
    frozen,
    has_replayed,
    keep_copy,
    make_role,
    promote,
    rejoin,
    repoint,
    wait_replayed,
)
from .versions import MAJORS, installation
from .waiting import eventually, missing

__all__ = [
    "MAJORS",
    "Address",
    "Bouncer",
    "Forwarder",
    "Place",
    "Proxy",
    "black_hole",
    "come_back_behind",
    "database",
    "eventually",
    "follows",
    "frozen",
    "haproxy",
    "has_replayed",
    "installation",
    "keep_copy",
    "make_role",
    "missing",
    "pgbouncer",
    "promote",
    "rejoin",
    "repoint",
    "wait_replayed",
]
