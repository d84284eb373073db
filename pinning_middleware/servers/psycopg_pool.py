"""
Connections from Django's psycopg pool.

A read waits for one as long as the site's settings of the connection pool specify: if all its
connections are in use, that is not a fault of the server. While it waits, a fresh connection
outside of the pool checks whether the server can be reached. Connections that the server closed
while they were idle are discarded, at most ``max_size + 1`` of them for each read.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakValueDictionary

from pinning_middleware.servers.budget import read_budget
from pinning_middleware.servers.probe import endpoint_for, is_connection_pool_exhausted, probing
from pinning_middleware.servers.session_check import is_ready

# Seconds that a read waits for a connection until a check of whether the server can be reached.
POOL_CHECK_AFTER: Final = 0.15
# Seconds until the next check.
NEXT_POOL_CHECK_AFTER: Final = 1.0
# Seconds for which one check counts for all reads that wait.
CHECK_VALID_FOR: Final = 1.0

# Seconds that ``getconn()`` waits now, if not as long as the pool's own timeout.
_limit: ContextVar[float | None] = ContextVar("pinning_pool_limit", default=None)
# The pools of the replicas, by alias.
_connection_pools: WeakValueDictionary[str, Any] = WeakValueDictionary()


def has_connection_pool(connection: Any) -> bool:
    """Return whether a connection belongs to Django's pool of its alias."""
    return bool(connection.settings_dict["OPTIONS"].get("pool"))


def close_for_good(connection: Any) -> None:
    """Close a connection. One that belongs to a pool is not returned to it, but replaced."""
    if connection.connection is not None and has_connection_pool(connection):
        # If it were closed first, the pool would log a warning.
        connection.connection._expire_at = 0.0
    connection.close()


def apply_pool_timeouts(connection: Any, always: bool, timeout: float) -> None:
    """
    Disable the pool's own check of its connections for all reads, or for probes only.

    A check waits without a timeout. Lost or hung connections are detected by
    ``get_live_connection()`` and by the read itself. With ``always`` false, for a primary's pool,
    probes wait for a connection at most ``timeout`` seconds, unless the site has set
    ``OPTIONS["pool"]["timeout"]``.
    """
    pool, options = connection.pool, connection.settings_dict["OPTIONS"]["pool"]
    is_set = isinstance(options, dict) and "timeout" in options
    if always:
        pool._check = None
        _connection_pools[connection.alias] = pool
    elif not hasattr(pool, "pinning_probe_timeout"):
        pool.pinning_probe_timeout = None if is_set else timeout
        if (check := getattr(pool, "_check", None)) is not None:
            pool._check = functools.partial(_check, check)


def bounded_getconn(getconn: Any) -> Any:
    """Replace ``getconn()`` of psycopg's pools, to limit how long it waits."""

    def bounded(self: Any, timeout: float | None = None) -> Any:
        limit = _limit.get()
        return getconn(self, timeout if limit is None else limit)

    return bounded


def _check(check: Callable[[Any], None], raw: Any) -> None:
    if not probing.get():
        check(raw)


def get_live_connection(
    connection: Any, get: Callable[[], Any], check_reachable: Callable[[], object]
) -> Any:
    """
    Return a driver connection from the pool that the server has not closed. Raise what
    ``check_reachable`` raises, or the pool's own error.

    ``get`` returns the pool's next one. ``check_reachable`` raises if the server cannot be
    connected to, since the pool would otherwise retry until its timeout.
    """
    pool = connection.pool
    for number in range(pool.max_size + 1):
        raw = _get_in_time(connection, get, check_reachable)
        if not _is_closed_by_server(raw):
            return raw
        pool.putconn(raw)
        if not number:
            check_reachable()
    return _get_in_time(connection, get, check_reachable)


def _get_in_time(
    connection: Any, get: Callable[[], Any], check_reachable: Callable[[], object]
) -> Any:
    """
    Return the pool's next connection. Raise what ``check_reachable`` raises if the server cannot be
    reached, or the pool's error if it can and no connection became free.
    """
    pool, endpoint = connection.pool, endpoint_for(connection)
    timeout = (getattr(pool, "pinning_probe_timeout", None) if probing.get() else None) or (
        pool.timeout
    )
    deadline, check_after = time.monotonic() + timeout, POOL_CHECK_AFTER
    while True:
        began = time.monotonic()
        limit = min(check_after, deadline - began)
        token = _limit.set(limit)
        try:
            return get()
        except Exception as error:
            waited = time.monotonic() - began
            _forget_expired(pool)
            if not is_connection_pool_exhausted(error):
                read_budget.spend(waited)
                raise
            if endpoint.is_down or _claim_check(pool):
                try:
                    check_reachable()
                except Exception:
                    # The next read must check again.
                    pool.pinning_checked_at = -math.inf
                    read_budget.spend(waited)
                    raise
            # Raised at once: as many wait already as the site allows (max_waiting).
            is_refused = time.monotonic() < began + limit
            if is_refused or time.monotonic() >= deadline:
                raise
        finally:
            _limit.reset(token)
        check_after = NEXT_POOL_CHECK_AFTER


def _forget_expired(pool: Any) -> None:
    """Remove expired clients from the queue of the pool, which ``max_waiting`` limits."""
    with pool._lock:
        waiting = [client for client in pool._waiting if client.error is None]
        pool._waiting.clear()
        pool._waiting.extend(waiting)


def _claim_check(pool: Any) -> bool:
    """Return whether the caller must check the server, for all reads that wait for the pool."""
    now = time.monotonic()
    if now - getattr(pool, "pinning_checked_at", -math.inf) < CHECK_VALID_FOR:
        return False
    pool.pinning_checked_at = now
    return True


def fail_waiting_reads(alias: str, why: str) -> None:
    """Let the reads fail that wait for a connection of a replica's pool: its server is down."""
    pool = _connection_pools.get(alias)
    if pool is None:
        return
    from psycopg import OperationalError

    with pool._lock:
        waiting = tuple(pool._waiting)
    for client in waiting:
        client.fail(OperationalError(why))


def _is_closed_by_server(raw: Any) -> bool:
    """Return whether the server closed an idle connection. Sends nothing."""
    try:
        # First consume the server's final message, then EOF.
        while is_ready(raw.fileno(), 0):
            raw.pgconn.consume_input()
    except Exception:
        return True
    return False
