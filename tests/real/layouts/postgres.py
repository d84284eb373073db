"""Faults of PostgreSQL servers, roles, and changes of replication."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from sample_site.cluster import STREAMING, Cluster, Node
from sample_site.wal import INSERTED, REPLAYED, end_of_log

from .waiting import eventually

# By whether the role may see the statistics of other roles.
ROLES: Final = {False: "site_plain", True: "site_monitor"}


# Unresponsive servers


@contextmanager
def frozen(*nodes: Node) -> Iterator[None]:
    """Freeze servers: they accept connections and are unresponsive. Thaw them on exit."""
    try:
        for node in nodes:
            node.freeze()
        yield
    finally:
        for node in nodes:
            node.thaw()


# Roles


def make_role(cluster: Cluster, monitor: bool = False, database: str = "site") -> str:
    """A role with all rights on the tables of a database, those to come included; its name.

    All servers have it afterwards. A `monitor` may see the replication status.
    """
    name, primary = ROLES[monitor], cluster.primary
    if not primary.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,)):
        primary.execute(f"CREATE ROLE {name} LOGIN")
    if monitor:
        primary.execute(f"GRANT pg_monitor TO {name}")
    for sql in (
        f"GRANT ALL ON SCHEMA public TO {name}",
        *(
            sql
            for kind in ("TABLES", "SEQUENCES")
            for sql in (
                f"GRANT ALL ON ALL {kind} IN SCHEMA public TO {name}",
                f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON {kind} TO {name}",
            )
        ),
    ):
        primary.execute(sql, database=database)
    wait_replayed(primary, *cluster.replicas)
    return name


# Replication


def has_replayed(replica: Node, position: int) -> bool:
    """Return whether a replica has replayed the log up to this position."""
    return bool(replica.execute(REPLAYED)[0][0] >= position)


def wait_replayed(primary: Node, *replicas: Node, timeout: float = 20) -> None:
    """Wait until replicas have caught up with this primary."""
    target = end_of_log(primary.execute(INSERTED)[0][0])
    for replica in replicas:
        assert eventually(partial(has_replayed, replica, target), timeout), replica


def follows(replica: Node, primary: Node) -> bool:
    """Return whether a replica is receiving the log of another server."""
    return bool(primary.execute(STREAMING, (replica.name,))[0][0])


def promote(replica: Node) -> None:
    """Promote a replica; the other replicas follow it after `repoint`."""
    replica.promote()
    assert not replica.in_recovery


def repoint(replica: Node, primary: Node, timeout: float = 20) -> None:
    """Let a running replica follow another server, and wait until it does."""
    replica.repoint(primary)
    assert eventually(lambda: follows(replica, primary), timeout), replica


# A crash after which a server has an older state


def copy_data(node: Node) -> Path:
    """Stop a server and copy its data, for `restart_behind`."""
    copy = node.folder.with_suffix(".copy")
    was_running = node.running
    node.stop()
    _copy(node.folder, copy)
    if was_running:
        node.start()
    return copy


def restart_behind(replica: Node, copy: Path) -> None:
    """Crash a replica, and restart it from the copy, disconnected from its primary."""
    replica.stop("immediate")
    _copy(copy, replica.folder)
    # Takes precedence over the configuration file, which is written at the start.
    (replica.folder / "postgresql.auto.conf").write_text("primary_conninfo = ''\n")
    replica.start()


def rejoin(replica: Node) -> None:
    """Let a disconnected replica follow its primary again."""
    replica.execute("ALTER SYSTEM RESET primary_conninfo")
    replica.execute("SELECT pg_reload_conf()")


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    # Preserves the owners.
    subprocess.run(["cp", "-a", source, target], check=True)
