"""
Connecting takes no longer than a site can stand, whatever the driver's own patience is; and what
was cut off while it was made is made anew.
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
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import CONNECTION_ERRORS, probing, state_of
from pinning_middleware.servers.psycopg_pool import (
    apply_pool_timeouts,
    get_live_connection,
    has_pool,
)

__all__ = ["CONNECT_TIMEOUT", "apply_timeouts", "dedicated_connection", "unreachable_in_tests"]

# Seconds. Drivers otherwise wait for minutes; a value in OPTIONS has its way.
CONNECT_TIMEOUT = 2
# Seconds within which an attempt fails that nobody had to wait for.
AT_ONCE = 0.5

# Aliases that a test has made unreachable.
unreachable_in_tests: set[str] = set()


def apply_timeouts(connection: BaseDatabaseWrapper) -> None:
    """Let attempts of this connection, and its wait for Django's pool, end after a while."""
    dialect = dialect_for(connection)
    if dialect is None:
        return
    made: Any = connection
    made.get_connection_params = functools.partial(
        _parameters, connection, dialect.connect_timeout, made.get_connection_params
    )
    made.get_new_connection = functools.partial(_connect, made, made.get_new_connection)
    made.connect = functools.partial(_connect_again, made, made.connect)


def _needs_timeout(connection: BaseDatabaseWrapper) -> bool:
    """Return whether somebody else could serve, or nobody is to wait."""
    return probing.get() or _always_needs_timeout(connection)


def _always_needs_timeout(connection: BaseDatabaseWrapper) -> bool:
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
    if _always_needs_timeout(connection) or (probing.get() and not has_pool(connection)):
        chosen.setdefault(option, CONNECT_TIMEOUT)
    return chosen


def _connect(connection: Any, connect: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    if connection.alias in unreachable_in_tests:
        raise OperationalError(f"{connection.alias} was cut off by a test")
    if not _needs_timeout(connection):
        return connect(parameters)
    if has_pool(connection):
        apply_pool_timeouts(connection, _always_needs_timeout(connection), CONNECT_TIMEOUT)
        raw = get_live_connection(
            connection.pool,
            functools.partial(connect, parameters),
            functools.partial(_try, connection.alias),
        )
    else:
        raw = connect(parameters)
    # Before Django sets its session up, which is a wait too.
    state_of(connection, raw)
    return raw


def _try(alias: str) -> None:
    with contextlib.closing(dedicated_connection(alias)) as other:
        other.ensure_connection()


def _connect_again(connection: Any, connect: Callable[[], None]) -> None:
    """Connect; once more where that failed at once, as when it is cut off in the middle."""
    began = time.monotonic()
    try:
        # Django turns the driver's errors into its own around all of this.
        with connection.wrap_database_errors:
            connect()
    except CONNECTION_ERRORS:
        if time.monotonic() - began >= AT_ONCE or not _needs_timeout(connection):
            raise
        connection.close()
        connect()


def dedicated_connection(alias: str) -> BaseDatabaseWrapper:
    """Return a connection of our own, from no pool, that any thread may use."""
    settings = connections.settings[alias]
    options = {name: value for name, value in settings["OPTIONS"].items() if name != "pool"}
    backend: Any = load_backend(settings["ENGINE"])
    connection = backend.DatabaseWrapper({**settings, "OPTIONS": options}, alias)
    connection.inc_thread_sharing()
    connection.__dict__["_pinning_private"] = True
    apply_timeouts(connection)
    return connection  # type: ignore[no-any-return]
