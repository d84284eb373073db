"""
PINNING_CONSISTENCY. With ``read-your-writes`` a client sees its own writes; what other clients
wrote may appear and disappear, and this module has nothing to do.

With ``monotonic-reads`` a client also never sees an older state than it has seen, within a scope
and after it. The primary counts as having everything, but for commits that wait for a synchronous
standby: a replica may show them although the primary does not yet.
https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION
"""

from __future__ import annotations

from collections.abc import Callable

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, Position, merge_points
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.scope import PoolState, Scope
from pinning_middleware.servers.budget import read_budget
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    fetch,
    probing_allowed,
    state_of,
    without_failover,
)
from pinning_middleware.utils import clock


def must_reach(pool: Pool, state: PoolState, alias: str) -> Position | None:
    """
    Return the position that an alias must have reached so that a scope which has read from this
    pool sees no older state, or None.

    Raise LookupError if that is unknown, so that only the primary will do.
    """
    if alias == pool.primary:
        return None
    last, known = state.read_from[-1]
    connection = connections[last]
    is_open = connection.connection is not None
    if alias == last and (not is_open or state_of(connection) is known):
        # A connection that is opened anew is judged when a statement runs on it.
        return None
    position = _position_of(pool, last, known)
    if position is None:
        raise LookupError(f"the position of {last} is unknown")
    return position


def record_observed(pool: Pool, scope: Scope, connection: BaseDatabaseWrapper) -> None:
    """Record which connection answered a read; only for a pool that ``tracks_reads``."""
    alias = connection.alias
    source = alias, None if connection.connection is None else state_of(connection)
    if scope.state(pool.key).read_from[-1:] == (source,):
        return

    def change(state: PoolState) -> PoolState:
        read_from = (*(one for one in state.read_from if one[0] != alias), source)
        # The first read changes the outgoing pins; later ones do not.
        is_first = not state.read_from
        return state._replace(
            read_from=read_from,
            revision=state.revision + is_first,
            first_reads=state.first_reads + is_first,
        )

    scope.update(pool.key, change)


def primary_lacks_observed(pool: Pool, scope: Scope, state: PoolState) -> bool:
    """
    Return whether the primary may not show yet what the client has read from a replica, because
    commits wait for a synchronous standby. Queries the primary once for each scope.
    """
    if state.observed is None or not state.observed.is_live(clock.now()):
        return False
    if state.primary_hides_commits is None:
        found = _has_waiting_commits(pool)
        state = scope.update(pool.key, lambda latest: latest._replace(primary_hides_commits=found))
    return bool(state.primary_hides_commits)


def _has_waiting_commits(pool: Pool) -> bool:
    connection, sql = connections[pool.primary], pool.dialect and pool.dialect.waiting_commits
    if not sql or not probing_allowed(connection):
        return False
    try:
        with without_failover(), read_budget.spending():
            return int(fetch(connection, sql)[0]) > 0
    except (DatabaseError, InterfaceError):
        # The read that follows raises the primary's own error.
        return False


def observed_pin(
    pool: Pool, state: PoolState, now: float, query_position: Callable[[], Position | None]
) -> Pin | None:
    """
    Return the pin for what the scope has read, or None. May probe the servers.
    ``query_position`` returns that of the primary.
    """
    position: Position | None = None
    for alias, known in state.read_from:
        is_primary = alias == pool.primary
        reached = query_position() if is_primary else _position_of(pool, alias, known)
        if reached is None:
            # A server that failed after the read cannot report: only the window ends the pin.
            return Pin(now + conf.seconds) if pool.supports_positions else None
        points = merge_points(position.points if position else {}, reached.points)
        position = Position(points)
    return None if position is None else Pin(now + conf.seconds, None, position)


def _position_of(pool: Pool, alias: str, known: ConnectionState | None) -> Position | None:
    """
    Return what the server of a connection has replayed by now, None if unknown: its alias may
    resolve to another one.
    """
    if alias == pool.primary:
        return pool.current_position()
    connection = connections[alias]
    try:
        result = pool.health.probe(connection)
    except CONNECTION_ERRORS:
        return None
    if result is None or not result.server.position or result.server.timeline_hidden:
        return None
    state = state_of(connection)
    if known is not None and known.server is not None:
        is_same = known.server is result.server
    else:
        is_same = known is state or pool.health.is_only_server(state, certain=True)
    return Position(result.server.position) if is_same else None
