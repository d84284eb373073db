"""
Connections from Django's psycopg pool: bounds the wait for one, and never returns one whose server
closed it while it was idle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pinning_middleware.servers.probe import probing
from pinning_middleware.servers.session_check import is_ready

__all__ = ["apply_pool_timeouts", "bounded_getconn", "get_live_connection", "has_pool"]


def has_pool(connection: Any) -> bool:
    return bool(connection.settings_dict["OPTIONS"].get("pool"))


def apply_pool_timeouts(connection: Any, always: bool, timeout: float) -> None:
    """
    Limit the wait for a connection of the pool to ``timeout`` seconds, unless the site has set
    ``OPTIONS["pool"]["timeout"]``.

    ``connect_timeout`` does not limit it, because a thread of the pool connects. With ``always``
    false, for a primary's pool, only probes are limited.
    """
    pool, options = connection.pool, connection.settings_dict["OPTIONS"]["pool"]
    is_set = isinstance(options, dict) and "timeout" in options
    if always:
        # Disable the pool's own check: it waits without a timeout. Lost or hung connections are
        # detected by get_live_connection() and by the read itself.
        pool._check = None
        if not is_set:
            pool.timeout = min(pool.timeout, timeout)
    elif not hasattr(pool, "pinning_probe_timeout"):
        pool.pinning_probe_timeout = None if is_set else timeout
        if (check := getattr(pool, "_check", None)) is not None:
            pool._check = functools.partial(_check, check)


def bounded_getconn(getconn: Any) -> Any:
    """Replace ``getconn()`` of psycopg's pools, to limit the wait of a probe."""

    def bounded(self: Any, timeout: float | None = None) -> Any:
        probe_timeout = getattr(self, "pinning_probe_timeout", None)
        return getconn(self, probe_timeout if probing.get() and probe_timeout else timeout)

    return bounded


def _check(check: Callable[[Any], None], raw: Any) -> None:
    if not probing.get():
        check(raw)


def get_live_connection(
    pool: Any, connect: Callable[[], Any], check_reachable: Callable[[], object]
) -> Any:
    """
    Return a connection of a pool that its server has not closed.

    ``check_reachable`` raises if the server cannot be connected to, since the pool would otherwise
    retry until its timeout.
    """
    raw = connect()
    if not _is_closed_by_server(raw):
        return raw
    pool.putconn(raw)
    check_reachable()
    for _ in range(pool.max_size):
        raw = connect()
        if not _is_closed_by_server(raw):
            return raw
        pool.putconn(raw)
    return connect()


def _is_closed_by_server(raw: Any) -> bool:
    """Return whether the server closed an idle connection. Sends nothing."""
    try:
        # First consume the server's final message, then EOF.
        while is_ready(raw.fileno(), 0):
            raw.pgconn.consume_input()
    except Exception:
        return True
    return False
