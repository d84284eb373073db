"""What happens to PostgreSQL servers, and who connects to them."""

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

# By whether they may see the statistics of others.
ROLES: Final = {False: "site_plain", True: "site_monitor"}


# Silence


@contextmanager
def frozen(*nodes: Node) -> Iterator[None]:
    """Servers that take connections and say nothing; they go on at the end of the block."""
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

    All nodes know it afterwards. A plain one isn't told how replication goes, a `monitor` is.
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
    """Whether a replica has what the log held up to this position."""
    return bool(replica.execute(REPLAYED)[0][0] >= position)


def wait_replayed(primary: Node, *replicas: Node, timeout: float = 20) -> None:
    """Wait until replicas have what this primary has by now."""
    target = end_of_log(primary.execute(INSERTED)[0][0])
    for replica in replicas:
        assert eventually(partial(has_replayed, replica, target), timeout), replica


def follows(replica: Node, primary: Node) -> bool:
    """Whether a replica receives another node's log right now."""
    return bool(primary.execute(STREAMING, (replica.name,))[0][0])


def promote(replica: Node) -> None:
    """Make a primary of a replica; the others follow it when they are told to (`repoint`)."""
    replica.promote()
    assert not replica.in_recovery


def repoint(replica: Node, primary: Node, timeout: float = 20) -> None:
    """Let a replica that runs follow another node, without a restart, and wait until it does."""
    replica.repoint(primary)
    assert eventually(lambda: follows(replica, primary), timeout), replica


# A crash after which a server is older than before


def keep_copy(node: Node) -> Path:
    """Copy a server's data, for which it is stopped; for `come_back_behind`."""
    copy = node.folder.with_suffix(".copy")
    was_running = node.running
    node.stop()
    _copy(node.folder, copy)
    if was_running:
        node.start()
    return copy


def come_back_behind(replica: Node, copy: Path) -> None:
    """Let a replica crash and come back on the copy of its data, cut off from its primary."""
    replica.stop("immediate")
    _copy(copy, replica.folder)
    # Stronger than the configuration file, which the start writes.
    (replica.folder / "postgresql.auto.conf").write_text("primary_conninfo = ''\n")
    replica.start()


def rejoin(replica: Node) -> None:
    """Let a replica that was cut off follow its primary again."""
    replica.execute("ALTER SYSTEM RESET primary_conninfo")
    replica.execute("SELECT pg_reload_conf()")


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    # Keeps the owners.
    subprocess.run(["cp", "-a", source, target], check=True)
