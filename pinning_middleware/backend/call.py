"""A statement as an execute wrapper gets it, and whether it may run on another server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.session_setup import set_up_session
from pinning_middleware.backend.writes import recording_write
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.compatibility import is_interchangeable
from pinning_middleware.routing.policy import Rejection
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.overrides import Effects, effects_on
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.servers.probe import (
    failover_disabled,
    is_session_modified,
    without_failover,
)
from pinning_middleware.utils.transactions import is_transaction_open

# Why a read needs the primary, or a replica that has caught up.
_PINNED: Final = (Reason.WROTE, Reason.MANUAL, Reason.PINNED, Reason.NOT_CAUGHT_UP)


class UnopenedCursor:
    """
    The driver's cursor of a connection that could not be opened.

    Whatever is called on it raises the connection's error. The statement may run on another server.
    """

    def __init__(self, error: Exception, name: str | None) -> None:
        self.error, self.name = error, name
        # Whether the error has been dealt with: the next statement may connect again.
        self.is_handled = False

    def __getattr__(self, name: str) -> Any:
        raise self.error

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class OutOfRotation(OperationalError):
    """An alias is known to be unreachable, so no attempt to connect was made."""


class Call(NamedTuple):
    """
    A statement as an execute wrapper gets it.

    ``cursor`` is Django's, from which the caller fetches the rows. ``scope`` and ``effects``: the
    scope that runs the statement, and what the overrides mean for its pool. ``written_alias``: the
    alias for which it is recorded as a write, although it looks like a read.
    """

    execute: Callable[..., Any]
    sql: Any
    params: Any
    many: bool
    context: dict[str, Any]
    cursor: Any
    scope: Scope
    effects: Effects
    written_alias: str | None = None

    def run(self) -> Any:
        """Run the statement on the connection that the cursor belongs to now."""
        set_up_session(self.cursor.db)
        if self.written_alias is None:
            return self.execute(self.sql, self.params, self.many, self.context)
        with recording_write(self.cursor.db, self.written_alias, self.sql):
            return self.execute(self.sql, self.params, self.many, self.context)

    def as_write(self, alias: str) -> Call:
        """Return the statement as one that is recorded as a write where it runs."""
        return self._replace(written_alias=alias)

    def move_to(self, connection: BaseDatabaseWrapper) -> None:
        """Replace the driver's cursor by a new one of a connection, which may be the same one."""
        cursor = self.cursor
        if connection.alias != cursor.db.alias:
            # Not by getattr(), which Django's cursors pass on to the driver's.
            cursor.__dict__.setdefault("pinning_alias", cursor.db.alias)
        is_chunked = getattr(cursor.cursor, "name", None) is not None
        with without_failover():
            fresh = connection.chunked_cursor() if is_chunked else connection.cursor()
        cursor.cursor, cursor.db = fresh.cursor, fresh.db

    def renew_cursor(self, raw: Any) -> None:
        """
        Replace the driver's cursor if a probe has closed or reopened its connection. ``raw``: the
        driver's connection before the probe.
        """
        if self.cursor.db.connection is not raw:
            self.move_to(self.cursor.db)


def call_of(pool: Pool, cursor: Any) -> Call:
    """Return a statement that does nothing, for methods of the driver that bypass the wrappers."""
    context = {"cursor": cursor, "connection": cursor.db}
    scope, effects = current_scope(), effects_on(pool.primary)
    return Call(lambda *args: None, "", None, False, context, cursor, scope, effects)


def connect_anyway(call: Call) -> None:
    """Connect to an alias that is marked as unreachable, for what only its server can run."""
    opened = call.cursor.cursor
    if isinstance(opened, UnopenedCursor) and isinstance(opened.error, OutOfRotation):
        call.move_to(call.cursor.db)


def may_move(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a statement of this connection may run on another one."""
    return not is_transaction_open(connection) and not failover_disabled.get()


def may_fail_over(connection: BaseDatabaseWrapper, call: Call) -> bool:
    """Return whether a read of this connection may run on another server."""
    return may_move(connection) and not call.many and not is_session_modified(connection)


def may_run_on_primary(pool: Pool, call: Call) -> bool:
    """Return whether a read that was sent to a replica may run on the primary."""
    connection = call.cursor.db
    return (
        connection.alias != pool.primary
        and may_fail_over(connection, call)
        and is_interchangeable(connection.alias, pool.primary)
        and not is_session_modified(connections[pool.primary])
    )


def rejection_error(alias: str, rejection: Rejection, why: str) -> Exception:
    """
    Return the error to raise for a statement that this alias must not run, and that no other one
    can. ``why``: the cause of the latter.
    """
    if rejection.error is not None:
        return rejection.error
    text = f"Cannot use {alias!r} ({rejection.reason.description}), and {why}."
    if rejection.reason in _PINNED:
        text += " Read inside use_replica() if the result may be stale."
    return OperationalError(text)
