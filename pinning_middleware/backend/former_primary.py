"""Connections of the primary's alias that are to a former primary."""

from __future__ import annotations

import time
from typing import Final

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.call import Call, may_move, rejection_error
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.policy import Rejection, is_former_primary
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.scope import Scope
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import (
    endpoint_for,
    is_session_modified,
    state_of,
    without_failover,
)
from pinning_middleware.servers.psycopg_pool import close_for_good

# Maximum number of connections that are discarded: not every connection pool replaces them.
MAX_REOPENS: Final = 100
_DEMOTED: Final = Rejection(Fault.DEMOTED)


def leave_former_primary(pool: Pool, call: Call, rejection: Rejection = _DEMOTED) -> None:
    """
    Reopen the connection of a statement that must not run on a former primary.

    Raise OperationalError if it cannot be reopened, or if the alias still resolves to that server.
    """
    connection = call.cursor.db
    if not may_move(connection):
        raise rejection_error(connection.alias, rejection, "a transaction is open")
    _reopen_or_raise(pool, connection, call.scope, rejection)
    call.move_to(connection)


def check_primary(pool: Pool, call: Call) -> None:
    """Leave a former primary before a write, or before a transaction that may write."""
    connection, raw = call.cursor.db, call.cursor.db.connection
    if raw is None or connection.in_atomic_block:
        return
    if is_former_primary(pool, connection, call.scope):
        leave_former_primary(pool, call)
    else:
        call.renew_cursor(raw)


def check_before_transaction(pool: Pool, connection: BaseDatabaseWrapper, scope: Scope) -> None:
    """Leave a former primary before Django opens a transaction."""
    if is_former_primary(pool, connection, scope):
        _reopen_or_raise(pool, connection, scope, _DEMOTED)


def _reopen_or_raise(
    pool: Pool, connection: BaseDatabaseWrapper, scope: Scope, rejection: Rejection
) -> None:
    if is_session_modified(connection):
        # A new session would not have what the code has set. The next statement gets one.
        discard(connection)
        raise rejection_error(connection.alias, rejection, "its session was modified")
    if not reopen_elsewhere(pool, connection, scope):
        raise rejection_error(
            connection.alias, rejection, "its address still resolves to the former primary"
        )


def reopen_elsewhere(pool: Pool, connection: BaseDatabaseWrapper, scope: Scope) -> bool:
    """
    Reopen a connection until it is a new one.

    Return whether the alias resolves to another server than a former primary by now. Raise what
    connecting raises.
    """
    began = time.monotonic()
    is_former = True
    for _ in range(MAX_REOPENS):
        discard(connection)
        with without_failover():
            connection.ensure_connection()
            is_former = is_former_primary(pool, connection, scope)
        # A connection pool may have more connections of the same age.
        raw = connection.connection
        is_old = raw is not None and state_of(connection).opened_at < began
        if not (is_former and is_old):
            break
    return not is_former


def record_rejected_write(connection: BaseDatabaseWrapper, error: Exception) -> None:
    """
    Record that a server rejected a write because it is read-only: if it is a former primary, a new
    connection resolves to another server.
    """
    dialect = dialect_for(connection)
    if dialect is None or connection.connection is None:
        return
    state = state_of(connection)
    if not state.session_modified and dialect.error_code(error) in dialect.read_only_errors:
        state.rejected_write = True


def discard(connection: BaseDatabaseWrapper) -> None:
    """Close a connection to a former primary for good, also one that belongs to a pool."""
    close_for_good(connection)
    endpoint_for(connection).must_reidentify = True
