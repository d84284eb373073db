"""Calls PINNING_SESSION_SETUP before the first statement of a scope on each connection."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pinning_middleware.conf import conf
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.scope import current_scope

# The statements that run are not the site's: they are neither moved nor recorded.
_unmanaged: ContextVar[bool] = ContextVar("pinning_unmanaged", default=False)
is_unmanaged = _unmanaged.get


@contextmanager
def unmanaged() -> Iterator[None]:
    """Run statements as if the package were not there."""
    outer = _unmanaged.get()
    _unmanaged.set(True)
    try:
        yield
    finally:
        _unmanaged.set(outer)


def set_up_session(connection: Any) -> None:
    """
    Set up the session of a connection for the scope, unless that has been done, or the alias
    belongs to no pool.
    """
    if conf.session_setup is None or _unmanaged.get() or connection.is_connecting:
        return
    known_pools = pools()
    if connection.alias not in (*known_pools.by_connection, *known_pools.same_as_primary):
        return
    connection.ensure_connection()
    scope, (raw, known) = current_scope(), connection.session_set_up_for
    if raw is connection.connection and known is not None and known() is scope:
        return
    with unmanaged():
        conf.session_setup(connection)
    connection.session_set_up_for = connection.connection, weakref.ref(scope)


def undo_session_setup(connection: Any) -> None:
    """
    Have the session set up again: a transaction was rolled back, and with it perhaps what was set
    up inside it, or the connection was closed, and a pool may return it after others have used it.
    """
    connection.session_set_up_for = None, None
