"""
What every statement of every connection comes by, once: an execute wrapper. It finds out what the
statement does, has a write noted or refused, lets a read outlive its server, and counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pinning_middleware.backend.failover import run
from pinning_middleware.backend.writes import alias_of, begin, end, examine, text_of
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import Facts, entered_scope
from pinning_middleware.servers.probe import state_of
from pinning_middleware.sql import Kind
from pinning_middleware.utils.counters import Read, observers, reads

__all__ = ["install", "statement"]

# How many changes of route a scope remembers.
MOST_ROUTES: Final = 16
# Where a replica was meant, also if it is a mirror of the primary.
_BY_REPLICA = (Reason.ROUND_ROBIN, Reason.CAUGHT_UP, Reason.USE_REPLICA)


def statement(
    execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    """Run one statement, as an execute wrapper of every connection."""
    connection = context["connection"]
    known = pools()
    pool = known.by_connection.get(connection.alias)
    if pool is None:
        return execute(sql, params, many, context)
    cursor = context["cursor"]
    meant = alias_of(cursor)
    kind, alters = examine(connection, sql)
    if alters and pool.dialect is not None:
        state_of(connection).session_modified = True
    notes = begin(connection, meant, kind, sql) if kind >= Kind.LOCK else None
    moving = known.moving.get(connection.alias)
    failed = True
    try:
        if moving is None:
            result = execute(sql, params, many, context)
        else:
            result = run(moving, kind, execute, (sql, params, many), context)
        failed = False
    finally:
        if notes is not None:
            end(connection, notes, failed)
    if kind is Kind.READ or kind is Kind.LOCK:
        _count(pool, meant, kind, cursor, sql)
    return result


def _count(pool: Pool, meant: str, kind: Kind, cursor: Any, sql: Any) -> None:
    """Count a read that has run, by the reason of the decision that it followed."""
    connection = cursor.db
    served = connection.alias
    scope = entered_scope()
    facts = None if scope is None else scope.get(pool.key)
    reason: str = pool.otherwise
    if facts is not None:
        decided = facts.decided
        if decided is None:
            if facts.answer == meant:
                reason = facts.reason
        else:
            facts.decided = None
            if decided[0] == meant:
                reason = decided[1]
    if served != meant or "pinning_reason" in cursor.__dict__:
        reason = cursor.__dict__.get("pinning_reason", Reason.FAILOVER)
    elif kind is Kind.LOCK:
        reason = Reason.LOCK
    if facts is not None:
        routes, route = facts.routes, (served, reason)
        if len(routes) < MOST_ROUTES and routes[-1:] != (route,):
            facts.routes = (*routes, route)
    kept = connection.__dict__.get("_pinning_link")
    server = None if kept is None else kept[1].server
    reads[pool.primary, served, server, reason] += 1
    if observers:
        _show(pool, facts, meant, served, reason, text_of(connection, sql), server, connection)


def _show(
    pool: Pool,
    facts: Facts | None,
    meant: str,
    served: str,
    reason: str,
    sql: str,
    server: Any,
    connection: BaseDatabaseWrapper,
) -> None:
    if reason in _BY_REPLICA and meant == pool.primary and facts is not None and facts.meant:
        meant = facts.meant
    role = "primary" if meant == pool.primary else "replica"
    read = Read(pool.primary, meant, served, role, reason, sql, server, connection)
    for observe in tuple(observers):
        observe(read)


def _watch(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    # `connection.execute_wrapper()` is a block that appends and pops; this one stays, outermost,
    # and so sees what is tried before all others do.
    if statement not in connection.execute_wrappers:
        connection.execute_wrappers.insert(0, statement)


def install() -> None:
    """Watch every connection, those that are open already too. Again changes nothing."""
    connection_created.connect(_watch, dispatch_uid="pinning_middleware.statements")
    for connection in connections.all(initialized_only=True):
        _watch(connection=connection)
