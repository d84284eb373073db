"""
Reads that outlive their replica: on another one, or on the primary, without an error.

Two places see a replica fail. Opening a cursor does where the replica can't be reached: the
cursor then comes from another node. Running a statement does where the connection is lost, or
the replica gives it up by design: the statement then runs again, on the same node first if only
the connection was lost. Neither happens inside a transaction, nor for anything but a read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from django.db import InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from .conf import conf
from .looks import asking, has_reached, lags_less, one_node, order_by_freshness, update
from .pins import Position
from .pools import Pool, pools
from .positions import family_of
from .signals import primary_fallback, read_rerun
from .sql import Kind, kind_of
from .state import entered_scope

__all__ = ["install", "rerun"]

logger = logging.getLogger("pinning_middleware")

# Seconds. Drivers otherwise wait for minutes; a value in OPTIONS has its way.
CONNECT_TIMEOUT = 2

_FAILURES = (OperationalError, InterfaceError)


def open_cursor(
    connection: BaseDatabaseWrapper, cursor: Callable[..., Any], name: str | None = None
) -> Any:
    """Do what ``connection._cursor`` does, on another node where a replica is of no use."""
    alias = connection.alias
    pool = pools().by_replica.get(alias)
    if pool is None or asking.get() or connection.in_atomic_block:
        return cursor(name)
    health = pool.health
    before = connection.connection
    if before is None and health.replicas[alias].out != "lag" and not health.may_connect(alias):
        return _open_elsewhere(pool, alias, name, "left out")
    try:
        if health.claim_look(alias):
            update(pool, connection)
        opened = cursor(name)
    except _FAILURES as error:
        if connection.connection is not None and connection.is_usable():
            raise
        health.leave_out(alias, "connect")
        return _open_elsewhere(pool, alias, name, error)
    made = connection.connection
    reason = _unfit(pool, alias, is_new=made is not before)
    if reason is None and connection.connection is made:
        return opened
    opened.close()
    if reason is None:
        # Lost while it was asked how far it is, and asked again on a new connection.
        return open_cursor(connection, cursor, name)
    return _open_elsewhere(pool, alias, name, reason)


def rerun(
    execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    """Run a read again that failed for a reason that another node would not share."""
    try:
        return execute(sql, params, many, context)
    except _FAILURES as error:
        connection = context["connection"]
        pool = _pool_to_fail_over(connection.alias)
        if (
            pool is None
            or many
            or asking.get()
            or connection.in_atomic_block
            or kind_of(str(sql), connection.vendor) is not Kind.READ
        ):
            raise
        lost = not connection.is_usable()
        if not lost and not _is_passing(connection, error):
            raise
        if lost:
            connection.close()
            if connection.alias in pool.health.replicas:
                pool.health.suspect(connection.alias)
        return _rerun(
            pool, functools.partial(execute, sql, params, many, context), context, lost, error
        )


def _rerun(
    pool: Pool, again: Callable[[], Any], context: dict[str, Any], lost: bool, error: Exception
) -> Any:
    cursor, failed = context["cursor"], context["connection"].alias
    chunked = getattr(cursor.cursor, "name", None) is not None
    for alias in _candidates(pool, failed, same_first=lost):
        try:
            with one_node():
                if not _connect(pool, failed, alias):
                    continue
                other = connections[alias]
                fresh = other.chunked_cursor() if chunked else other.cursor()
                # The caller goes on to fetch from here. A write that is meant for the replica is
                # refused, wherever its cursor leads to.
                cursor.cursor, cursor.db = fresh.cursor, fresh.db
                if alias != failed != pool.primary:
                    cursor.pinning_alias = getattr(cursor, "pinning_alias", failed)
                result = again()
        except _FAILURES as next_error:
            if alias in pool.health.replicas and connections[alias].connection is None:
                pool.health.leave_out(alias, "connect")
            error = next_error
            continue
        _served(pool, failed, alias, error)
        return result
    raise error


def _open_elsewhere(pool: Pool, failed: str, name: str | None, why: object) -> Any:
    for alias in _candidates(pool, failed, same_first=False):
        try:
            with one_node():
                if not _connect(pool, failed, alias):
                    continue
                opened = connections[alias]._cursor(name)  # type: ignore[attr-defined]
        except _FAILURES:
            if alias == pool.primary:
                raise
            pool.health.leave_out(alias, "connect")
            continue
        opened.pinning_alias = failed
        _served(pool, failed, alias, why)
        return opened
    raise AssertionError("the primary is the last candidate")


def _connect(pool: Pool, failed: str, alias: str) -> bool:
    """Connect to a node; return whether it may serve this scope in place of the failed one."""
    connection = connections[alias]
    connection.close_if_health_check_failed()
    connection.ensure_connection()
    return pool.primary in (alias, failed) or _still_fits(pool, alias)


def _candidates(pool: Pool, failed: str, same_first: bool) -> Iterator[str]:
    """Yield the nodes that may serve instead, each once, and the primary last."""
    if same_first:
        yield failed
    if failed == pool.primary:
        yield from order_by_freshness(pool)
        return
    max_lag = _max_lag(pool)
    for alias in pool.rotation.order():
        if alias != failed and (max_lag is None or lags_less(pool, alias, max_lag)):
            yield alias
    yield pool.primary


def _wanted(pool: Pool) -> Position | None:
    """Return the position that this scope's reads have to have."""
    scope = entered_scope()
    return None if scope is None else pool.wanted(scope)


def _max_lag(pool: Pool) -> float | None:
    """Return what the open ``use_replica`` block lets a replica lag."""
    scope = entered_scope()
    if scope is None or scope.override is None:
        return None
    block = scope.override.for_pool(pool.primary)
    return None if block is None else block.max_lag


def _unfit(pool: Pool, alias: str, *, is_new: bool) -> str | None:
    """Return why a replica that can be reached will not do."""
    out = pool.health.replicas[alias].out
    if out == "role" or (out == "lag" and pool.rotation):
        return out
    if out == "connect":
        pool.health.take_back(alias)
    return "behind" if is_new and not _still_fits(pool, alias) else None


def _still_fits(pool: Pool, alias: str) -> bool:
    # Behind a new connection may be a server that was restarted, and is not yet as far again.
    wanted = _wanted(pool)
    return wanted is None or has_reached(pool, alias, wanted)


def _pool_to_fail_over(alias: str) -> Pool | None:
    known = pools()
    pool = known.by_replica.get(alias)
    return known.by_primary.get(alias) if pool is None and conf.primary_down == "stale" else pool


def _is_passing(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    family = family_of(connection)
    if family is None:
        return False
    code = family.error_code(error)
    return code in family.passing_errors or str(code).startswith("08")


def _served(pool: Pool, failed: str, alias: str, error: object) -> None:
    """Say who served instead, and let the rest of the scope go there at once."""
    logger.warning("A read of %s went to %s: %s", failed, alias, error)
    read_rerun.send(pool.primary, failed=failed, served=alias, error=error)
    if failed == pool.primary:
        if alias != failed:
            primary_fallback.send(pool.primary, served=alias, reason="primary down")
        return
    if alias == pool.primary:
        primary_fallback.send(pool.primary, served=alias, reason="no replica")
    scope = entered_scope()
    if scope is None or alias == failed:
        return
    state = pool.state(scope)
    if state.served is not None:
        state.served.add(alias)
    # One that is in may have come back behind what a pin asks for: the next read decides anew.
    if failed in pool.health.out or pool.wanted(scope) is not None:
        state.leave(failed)


def _watch(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    if rerun not in connection.execute_wrappers:
        connection.execute_wrappers.insert(0, rerun)
    pool = pools().by_replica.get(connection.alias)
    if pool is not None:
        pool.health.forget(connection.alias)


def install() -> None:
    """Let every connection fail over from now on. Calling it again changes nothing."""
    connection_created.connect(_watch, dispatch_uid="pinning_middleware.failover")
    create = connections.create_connection
    if getattr(create, "_pinning", False):
        return

    def create_connection(alias: str) -> BaseDatabaseWrapper:
        return _prepare(create(alias))

    create_connection._pinning = True  # type: ignore[attr-defined]
    # The signal comes when a connection is there; what can't be reached never sends it.
    connections.create_connection = create_connection  # type: ignore[method-assign]
    for connection in connections.all(initialized_only=True):
        _prepare(connection)


def _prepare(connection: BaseDatabaseWrapper) -> BaseDatabaseWrapper:
    family = family_of(connection)
    if family is None:
        return connection
    made: Any = connection
    made._cursor = functools.partial(open_cursor, connection, made._cursor)
    if family.connect_timeout is not None:
        made.get_connection_params = functools.partial(
            _bounded, connection, family.connect_timeout, made.get_connection_params
        )
    return connection


def _bounded(
    connection: BaseDatabaseWrapper, option: str, parameters: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    chosen = parameters()
    known = pools()
    if connection.alias in known.by_replica or (
        # Somebody stands in for this one too.
        conf.primary_down == "stale" and connection.alias in known.by_primary
    ):
        chosen.setdefault(option, CONNECT_TIMEOUT)
    return chosen
