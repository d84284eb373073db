"""
Connect within a bounded time, whatever the driver's own timeout is, and retry an attempt that fails
at once.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.utils import load_backend

from pinning_middleware.conf import conf
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import CONNECTION_ERRORS, endpoint_for, probing, state_of
from pinning_middleware.servers.psycopg_pool import (
    apply_pool_timeouts,
    get_live_connection,
    has_pool,
)

if TYPE_CHECKING:
    # The class that the mixin is combined with, whose attributes differ by ENGINE.
    from typing import TypeAlias

    Base: TypeAlias = Any
else:
    Base = object

__all__ = ["CONNECT_TIMEOUT", "BoundedConnect", "dedicated_connection", "unreachable_in_tests"]

# Seconds. Drivers wait for minutes by default. A value in OPTIONS takes precedence.
CONNECT_TIMEOUT = 2
# An attempt that fails within so many seconds is retried once.
RETRY_IF_FAILED_WITHIN = 0.5

# Aliases that a test has made unreachable.
unreachable_in_tests: set[str] = set()


class BoundedConnect(Base):  # type: ignore[misc]
    """
    A mixin of connection classes that limits the time for connecting, and for getting a connection
    of Django's pool, and retries an attempt that fails at once.

    Applies if another server could serve, or to a probe. Otherwise the driver's behaviour is kept.
    """

    # A connection for the package's own use; see dedicated_connection().
    is_dedicated = False

    def get_connection_params(self) -> dict[str, Any]:
        """Return the driver's parameters, with a timeout unless OPTIONS has one."""
        params: dict[str, Any] = super().get_connection_params()
        dialect = dialect_for(self)
        # The parameters of a pool apply to all its connections, also if a probe creates the pool.
        is_probe = probing.get() and not has_pool(self)
        if dialect is not None and (is_probe or _always_needs_timeout(self)):
            params.setdefault(dialect.connect_timeout, CONNECT_TIMEOUT)
        return params

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """Return a new connection of the driver."""
        if self.alias in unreachable_in_tests:
            raise OperationalError(
                f"{self.alias} is made unreachable by pinning_middleware.testing"
            )
        get_new_connection = super().get_new_connection
        if not _needs_timeout(self):
            return get_new_connection(conn_params)
        if has_pool(self):
            apply_pool_timeouts(self, _always_needs_timeout(self), CONNECT_TIMEOUT)
            raw = get_live_connection(
                self,
                functools.partial(get_new_connection, conn_params),
                functools.partial(_check_reachable, self.alias),
            )
        else:
            raw = get_new_connection(conn_params)
        # Watch the connection from here on: Django's init_connection_state() waits for it too.
        state_of(self, raw)
        return raw

    def connect(self) -> None:
        """Connect, and retry once if the attempt failed at once."""
        # A pool may hand out another connection of the driver than the last one.
        self.__dict__.pop("pinning_state", None)
        began = time.monotonic()
        try:
            # Django wraps the driver's errors outside of connect().
            with self.wrap_database_errors:
                super().connect()
        except CONNECTION_ERRORS:
            if time.monotonic() - began >= RETRY_IF_FAILED_WITHIN or not _needs_timeout(self):
                raise
            if self.is_dedicated and endpoint_for(self).is_down:
                # Its monitor tries again in a moment.
                raise
            self.close()
            super().connect()


def _needs_timeout(connection: Any) -> bool:
    """Return whether to limit the time: another server could serve, or this is a probe."""
    if dialect_for(connection) is None:
        return False
    return probing.get() or _always_needs_timeout(connection)


def _always_needs_timeout(connection: Any) -> bool:
    alias = connection.alias
    may_substitute = conf.primary_down == "stale" and alias in conf.replicas
    return bool(alias in conf.primary_by_replica or connection.is_dedicated or may_substitute)


def _check_reachable(alias: str) -> None:
    with contextlib.closing(dedicated_connection(alias)) as connection:
        connection.ensure_connection()


@functools.lru_cache
def _bounded_class(base: Any) -> Any:
    """Return the connection class of an ENGINE with the mixin."""
    return type(base.__name__, (BoundedConnect, base), {"__module__": base.__module__})


def dedicated_connection(alias: str) -> BaseDatabaseWrapper:
    """Return a new connection for the package's own use, not from a pool, for any thread."""
    settings = connections.settings[alias]
    options = {name: value for name, value in settings["OPTIONS"].items() if name != "pool"}
    backend: Any = load_backend(settings["ENGINE"])
    connection = _bounded_class(backend.DatabaseWrapper)({**settings, "OPTIONS": options}, alias)
    connection.is_dedicated = True
    connection.inc_thread_sharing()
    return connection  # type: ignore[no-any-return]
