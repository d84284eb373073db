"""Layouts of sites between Django and its servers, each a context manager.

    with haproxy(*cluster.replicas) as proxy:
        entry = database(proxy, conn_max_age=None)

These modules need neither Django nor the package.
"""

from __future__ import annotations

from .addresses import Address, Forwarder, Place, black_hole, database
from .daemons import Bouncer, PgPool, Proxy, haproxy, pgbouncer, pgpool
from .patroni import Member, PatroniCluster, patroni_cluster
from .postgres import (
    copy_data,
    follows,
    frozen,
    has_replayed,
    make_role,
    promote,
    rejoin,
    repoint,
    restart_behind,
    wait_replayed,
)
from .versions import MAJORS, chosen, installation
from .waiting import eventually, missing

__all__ = [
    "MAJORS",
    "Address",
    "Bouncer",
    "Forwarder",
    "Member",
    "PatroniCluster",
    "PgPool",
    "Place",
    "Proxy",
    "black_hole",
    "chosen",
    "copy_data",
    "database",
    "eventually",
    "follows",
    "frozen",
    "haproxy",
    "has_replayed",
    "installation",
    "make_role",
    "missing",
    "patroni_cluster",
    "pgbouncer",
    "pgpool",
    "promote",
    "rejoin",
    "repoint",
    "restart_behind",
    "wait_replayed",
]
