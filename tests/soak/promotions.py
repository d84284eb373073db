"""Promotions, in a layout where each alias has a link that can lead to another server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from sample_site.cluster import ClusterError, Node
from sample_site.node import HOST
from sample_site.wal import REPLAYED
from tests.real.layouts import Address, eventually, follows, rejoin, wait_replayed

from .context import GTID_PRIMARY, GTID_REPLICAS, LOST_WRITES, READS, WRITES, FaultContext

__all__ = ["GTID_PROMOTIONS", "PROMOTIONS"]

NOWHERE: Final = Address(HOST, 1)
RECEIVES: Final = "SELECT count(*) FROM pg_stat_wal_receiver"
HAS_REPLAYED_ALL: Final = (
    "SELECT pg_last_wal_receive_lsn() IS NULL "
    "OR pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()"
)


def promote_without_loss(context: FaultContext) -> None:
    """A switchover: the primary has sent everything before it stops."""
    old = context.primary
    _wait_followed(context)
    with context.excused("primary stopped", READS, WRITES):
        # Waits until its replicas have received everything.
        # https://www.postgresql.org/docs/current/protocol-replication.html
        old.stop("fast")
        alias = _most_advanced(context)
        context.cluster.nodes[alias].promote()
        _point_primary_to(context, alias)
    old.follow(context.primary)
    old.start()
    context.links[alias].point_to(old)


def promote_with_loss(context: FaultContext) -> None:
    """The primary crashes with writes that no replica has received."""
    old = context.primary
    alias = _promote_behind(context, "primary lost", lambda: old.stop("immediate"))
    _copy_anew(context, old)
    context.links[alias].point_to(old)


def promote_unfenced(context: FaultContext) -> None:
    """The former primary still accepts writes, and appears under the alias of a replica."""
    old = context.primary
    alias = _promote_behind(
        context, "primary unreachable", lambda: context.links["default"].point_to(NOWHERE)
    )
    context.links[alias].point_to(old)
    context.wait(1, 3)
    _copy_anew(context, old)


def _promote_behind(context: FaultContext, name: str, cut_off: Callable[[], object]) -> str:
    """Cut off the primary, promote a replica that lacks its last writes; return its old alias."""
    _wait_followed(context)
    with context.excused(name, READS, WRITES):
        with context.excused("writes lost", LOST_WRITES):
            _disconnect(context)
            context.wait(0.1, 0.5)
            cut_off()
        alias = _most_advanced(context)
        context.cluster.nodes[alias].promote()
        _point_primary_to(context, alias)
    return alias


def _wait_followed(context: FaultContext) -> None:
    """Wait until both replicas have everything that was acknowledged before."""
    for replica in context.cluster.replicas:
        _wait_follows(context, replica)
    wait_replayed(context.primary, *context.cluster.replicas)


def _wait_follows(context: FaultContext, replica: Node) -> None:
    if not eventually(lambda: follows(replica, context.primary)):
        raise ClusterError(f"{replica} does not follow {context.primary}")


def _disconnect(context: FaultContext) -> None:
    for replica in context.cluster.replicas:
        replica.execute("ALTER SYSTEM SET primary_conninfo = ''")
        replica.execute("SELECT pg_reload_conf()")
    for replica in context.cluster.replicas:
        if not eventually(partial(_has_no_receiver, replica)):
            raise ClusterError(f"{replica} still receives")


def _has_no_receiver(replica: Node) -> bool:
    return replica.execute(RECEIVES) == [(0,)]


def _has_replayed_all(replica: Node) -> bool:
    return bool(replica.execute(HAS_REPLAYED_ALL)[0][0])


def _most_advanced(context: FaultContext) -> str:
    """Return the alias of the replica that the other one can follow."""
    replayed = {}
    for alias, node in context.cluster.nodes.items():
        if node is not context.primary:
            eventually(partial(_has_replayed_all, node))
            replayed[alias] = node.execute(REPLAYED)[0][0]
    return max(replayed, key=replayed.__getitem__)


def _point_primary_to(context: FaultContext, alias: str) -> None:
    """Let the primary's alias resolve to the promoted replica, and the other replica follow it."""
    nodes = context.cluster.nodes
    nodes["primary"], nodes[alias] = nodes[alias], nodes["primary"]
    context.links["default"].point_to(context.primary)
    rejoin(context.primary)
    for replica in context.cluster.replicas:
        if replica is not nodes[alias]:
            # The new address first: it must receive nothing more from the former primary.
            replica.repoint(context.primary)
            rejoin(replica)
            _wait_follows(context, replica)


def _copy_anew(context: FaultContext, old: Node) -> None:
    """Make a replica of a former primary, whose own log has gone on."""
    old.stop("immediate")
    old.follow(context.primary)
    old.make()
    old.start()


def gtid_switch_over(context: FaultContext) -> None:
    """A replica of MariaDB or MySQL becomes the primary, and later the former one again."""
    alias = context.replica
    _hand_over(context, GTID_PRIMARY, alias, {"default": alias, alias: GTID_PRIMARY})
    context.wait(1, 3)
    _hand_over(context, alias, GTID_PRIMARY, {"default": GTID_PRIMARY, alias: alias})


def _hand_over(context: FaultContext, old: str, new: str, places: Mapping[str, str]) -> None:
    """Promote a server that has everything; let aliases lead to these servers afterwards."""
    former, promoted = context.gtid[old], context.gtid[new]
    with context.excused("primary stopped", READS, WRITES):
        former.execute(f"SET GLOBAL {former.READ_ONLY} = 1")
        position = former.position
        replicas = [context.gtid[each] for each in (GTID_PRIMARY, *GTID_REPLICAS) if each != old]
        for replica in replicas:
            replica.wait_for(position)
        promoted.promote()
        former.demote(promoted)
        for replica in replicas:
            if replica is not promoted:
                replica.follow(promoted)
        for alias, leads_to in places.items():
            context.links[alias].point_to(Address(HOST, context.gtid[leads_to].port))


Promotions = Mapping[Callable[[FaultContext], None], tuple[list[str], int]]
PROMOTIONS: Final[Promotions] = {
    promote_without_loss: ([], 1),
    promote_with_loss: ([], 1),
    promote_unfenced: ([], 1),
}
GTID_PROMOTIONS: Final[Promotions] = {gtid_switch_over: ([], 3)}
