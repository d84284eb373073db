"""Connections of the primary's alias that are to a former primary."""

from __future__ import annotations

import time
from typing import Final

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.call import Call, may_move, rejection_error
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.policy import Rejection, is_former_primary
from pinning_middleware.routing.pool import Pool
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import endpoint_for, state_of, without_failover
from pinning_middleware.servers.psycopg_pool import close_for_good

_DEMOTED: Final = Rejection(Fault.DEMOTED)


def leave_former_primary(pool: Pool, call: Call, rejection: Rejection = _DEMOTED) -> None:
    """
    Reopen the connection of a statement that must not run on a former primary.

    Raise OperationalError if it cannot be reopened, or if the alias still resolves to that server.
    """
    alias = call.cursor.db.alias
    if not may_move(call.cursor.db):
        raise rejection_error(alias, rejection, "a transaction is open")
    if not reopen_elsewhere(pool, call):
        raise rejection_error(alias, rejection, "its address still resolves to the former primary")


def reopen_elsewhere(pool: Pool, call: Call) -> bool:
    """
    Reopen the connection of a statement until it is a new one.

    Return whether the alias resolves to another server than a former primary by now. Raise what
    connecting raises.
    """
    connection, began = call.cursor.db, time.monotonic()
    is_former, is_old = True, True
    while is_former and is_old:
        _replace(call)
        with without_failover():
            is_former = is_former_primary(pool, connection, call.scope)
        is_old = _is_older(connection, began)
    return not is_former


def reopen(call: Call) -> None:
    """Reopen the connection of a statement that was lost. Raise what connecting raises."""
    began = time.monotonic()
    _replace(call)
    while _is_older(call.cursor.db, began):
        _replace(call)


def _replace(call: Call) -> None:
    discard(call.cursor.db)
    call.move_to(call.cursor.db)


def _is_older(connection: BaseDatabaseWrapper, began: float) -> bool:
    """Return whether a pool has given a connection that was opened before ``began``."""
    return connection.connection is not None and state_of(connection).opened_at < began


def record_rejected_write(connection: BaseDatabaseWrapper, error: Exception) -> None:
    """
    Note that a server rejected a write because it is read-only: if it is a former primary, a new
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
