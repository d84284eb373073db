"""Calls PINNING_SESSION_SETUP before the first statement of a scope on each connection."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import Any

from pinning_middleware.conf import conf
from pinning_middleware.scopes.scope import current_scope

__all__ = ["is_setting_up", "set_up_session", "undo_session_setup"]

# PINNING_SESSION_SETUP is running: its own statements are not routed.
_setting_up: ContextVar[bool] = ContextVar("pinning_setting_up", default=False)
is_setting_up = _setting_up.get


def set_up_session(connection: Any) -> None:
    """Set up the session of a connection for the scope, unless that has been done."""
    if conf.session_setup is None or _setting_up.get() or connection.is_connecting:
        return
    connection.ensure_connection()
    scope, (raw, known) = current_scope(), connection.session_set_up_for
    if raw is connection.connection and known is not None and known() is scope:
        return
    connection.session_set_up_for = connection.connection, weakref.ref(scope)
    _setting_up.set(True)
    try:
        conf.session_setup(connection)
    finally:
        _setting_up.set(False)


def undo_session_setup(connection: Any) -> None:
    """Note that a transaction was rolled back, and with it perhaps what was set up inside it."""
    connection.session_set_up_for = None, None
