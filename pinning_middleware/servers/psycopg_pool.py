"""
Django's pool of connections (psycopg's): nobody waits for one longer than for a server, and one
that its server ended long ago is not handed out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pinning_middleware.servers.liveness import is_ready
from pinning_middleware.servers.probe import probing

__all__ = ["apply_pool_timeouts", "get_live_connection", "has_pool"]


def has_pool(connection: Any) -> bool:
    return bool(connection.settings_dict["OPTIONS"].get("pool"))


def apply_pool_timeouts(connection: Any, is_ours: bool, timeout: float) -> None:
    """
    Let the wait for a pool's connection end after so many seconds, unless the site has said when:
    it waits for its own thread, which bounds nothing. Of one that is not ours, a primary's, only a
    question of ours is not to wait.
    """
    pool, options = connection.pool, connection.settings_dict["OPTIONS"]["pool"]
    is_chosen = isinstance(options, dict) and "timeout" in options
    if is_ours:
        # Nobody would watch the wait of its check; what was cut off, or is silent, is found out
        # here and by the read.
        pool._check = None
        if not is_chosen:
            pool.timeout = min(pool.timeout, timeout)
    elif "getconn" not in pool.__dict__:
        pool.getconn = functools.partial(_getconn, pool.getconn, None if is_chosen else timeout)
        if (check := getattr(pool, "_check", None)) is not None:
            pool._check = functools.partial(_check, check)


def _getconn(
    getconn: Callable[..., Any], longest: float | None, timeout: float | None = None
) -> Any:
    return getconn(longest if probing.get() and longest is not None else timeout)


def _check(check: Callable[[Any], None], raw: Any) -> None:
    if not probing.get():
        check(raw)


def get_live_connection(
    pool: Any, connect: Callable[[], Any], is_there: Callable[[], object]
) -> Any:
    """
    Return a connection of a pool that was not cut off. ``is_there`` raises where there is nothing
    to connect to: then the pool would be waited for in vain.
    """
    raw = connect()
    if not _is_cut_off(raw):
        return raw
    pool.putconn(raw)
    is_there()
    for _ in range(pool.max_size):
        raw = connect()
        if not _is_cut_off(raw):
            return raw
        pool.putconn(raw)
    return connect()


def _is_cut_off(raw: Any) -> bool:
    """Return whether the server ended a connection that nobody used. Asks nobody."""
    try:
        # Its farewell is read first, then the end.
        while is_ready(raw.fileno(), 0):
            raw.pgconn.consume_input()
    except Exception:
        return True
    return False
