"""
Connecting takes no longer than a site can stand, whatever the driver's own patience is; and what
was cut off while it was made, or long ago in a pool, is made anew.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend

from pinning_middleware.conf import conf

from .positions import family_of
from .questions import FAILURES, hurried, link_of
from .silence import is_ready

__all__ = ["CONNECT_TIMEOUT", "bound", "private", "refused"]

# Seconds. Drivers otherwise wait for minutes; a value in OPTIONS has its way.
CONNECT_TIMEOUT = 2
# Seconds within which an attempt fails that nobody had to wait for.
AT_ONCE = 0.5

# Aliases that a test has made unreachable.
refused: set[str] = set()


def bound(connection: BaseDatabaseWrapper) -> None:
    """Let attempts of this connection, and its wait for Django's pool, end after a while."""
    family = family_of(connection)
    if family is None:
        return
    made: Any = connection
    made.get_connection_params = functools.partial(
        _parameters, connection, family.connect_timeout, made.get_connection_params
    )
    made.get_new_connection = functools.partial(_connect, made, made.get_new_connection)
    made.connect = functools.partial(_connect_again, made, made.connect)


def _is_ours(connection: BaseDatabaseWrapper) -> bool:
    """Return whether somebody else could serve, or nobody is to wait."""
    return hurried.get() or _is_always_ours(connection)


def _is_always_ours(connection: BaseDatabaseWrapper) -> bool:
    alias = connection.alias
    return (
        alias in conf.primary_of
        or "_pinning_private" in connection.__dict__
        or (conf.primary_down == "stale" and alias in conf.replicas)
    )


def _parameters(
    connection: BaseDatabaseWrapper, option: str, parameters: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    chosen = parameters()
    # A pool's are those of all its connections, whoever makes it.
    is_pooled = connection.settings_dict["OPTIONS"].get("pool")
    if _is_always_ours(connection) or (hurried.get() and not is_pooled):
        chosen.setdefault(option, CONNECT_TIMEOUT)
    return chosen


def _connect(connection: Any, connect: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    if connection.alias in refused:
        raise OperationalError(f"{connection.alias} was cut off by a test")
    if not _is_ours(connection):
        return connect(parameters)
    options = connection.settings_dict["OPTIONS"].get("pool")
    if options:
        _bound_pool(connection, isinstance(options, dict) and "timeout" in options)
    raw = connect(parameters)
    if options and _is_cut_off(raw):
        raw = _from_pool_again(connection, raw, connect, parameters)
    # Before Django sets its session up, which is a wait too.
    link_of(connection, raw)
    return raw


def _bound_pool(connection: Any, is_chosen: bool) -> None:
    """
    Let the wait for a pool's connection end; ``is_chosen``: the site has said when. It waits for
    its own thread, which bounds nothing. Nor does it check what it gives: nobody would watch that
    wait, and what was cut off, or is silent, is found out here and by the read.
    """
    pool = connection.pool
    if _is_always_ours(connection):
        pool._check = None
        if not is_chosen:
            pool.timeout = min(pool.timeout, CONNECT_TIMEOUT)
    elif "getconn" not in pool.__dict__:
        pool.getconn = functools.partial(_getconn, pool.getconn, is_chosen)
        if (check := getattr(pool, "_check", None)) is not None:
            pool._check = functools.partial(_check, check)


# A primary's pool, where only a question of ours is not to wait


def _getconn(getconn: Callable[..., Any], is_chosen: bool, timeout: float | None = None) -> Any:
    return getconn(CONNECT_TIMEOUT if hurried.get() and not is_chosen else timeout)


def _check(check: Callable[[Any], None], raw: Any) -> None:
    if not hurried.get():
        check(raw)


def _is_cut_off(raw: Any) -> bool:
    """Return whether the server ended a connection that nobody used. Asks nobody."""
    try:
        # Its farewell is read first, then the end.
        while is_ready(raw.fileno(), 0):
            raw.pgconn.consume_input()
    except Exception:
        return True
    return False


def _from_pool_again(
    connection: Any, raw: Any, connect: Callable[..., Any], parameters: dict[str, Any]
) -> Any:
    """Return a connection of a pool that was not cut off, instead of one that was."""
    connection.pool.putconn(raw)
    # Where there is nothing to connect to, the pool would be waited for in vain.
    with contextlib.closing(private(connection.alias)) as other:
        other.ensure_connection()
    for _ in range(connection.pool.max_size):
        raw = connect(parameters)
        if not _is_cut_off(raw):
            return raw
        connection.pool.putconn(raw)
    return connect(parameters)


def _connect_again(connection: Any, connect: Callable[[], None]) -> None:
    """Connect; once more where that failed at once, as when it is cut off in the middle."""
    began = time.monotonic()
    try:
        # Django turns the driver's errors into its own around all of this.
        with connection.wrap_database_errors:
            connect()
    except FAILURES:
        if time.monotonic() - began >= AT_ONCE or not _is_ours(connection):
            raise
        connection.close()
        connect()


def private(alias: str) -> BaseDatabaseWrapper:
    """Return a connection of our own, from no pool, that any thread may use."""
    settings = connections.settings[alias]
    options = {name: value for name, value in settings["OPTIONS"].items() if name != "pool"}
    backend: Any = load_backend(settings["ENGINE"])
    connection = backend.DatabaseWrapper({**settings, "OPTIONS": options}, alias)
    connection.inc_thread_sharing()
    connection.__dict__["_pinning_private"] = True
    bound(connection)
    return connection  # type: ignore[no-any-return]
