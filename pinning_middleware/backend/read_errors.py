"""Classify the error of a read: what it means for its server, and whether the read is retried."""

from __future__ import annotations

from enum import Enum, auto

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.call import (
    Call,
    may_fail_over,
    may_run_on_primary,
)
from pinning_middleware.backend.read_timeouts import answers_probe, has_timed_out
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pool import Pool
from pinning_middleware.servers.blocked_reads import ProbeOutcome, probe_afresh
from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.connect import CONNECT_TIMEOUT, RETRY_IF_FAILED_WITHIN
from pinning_middleware.servers.dialects import Refusal, dialect_for
from pinning_middleware.servers.liveness import ReplayWaits, ServerGone, ServerUnresponsive
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    endpoint_for,
    is_session_modified,
    refusal_of,
    state_of,
    without_failover,
)
from pinning_middleware.servers.registry import registry
from pinning_middleware.utils.transactions import is_transaction_open


class ErrorAction(Enum):
    """What becomes of a read after an error."""

    # Another server would raise the same error, or failover is not possible.
    RAISE = auto()
    # The connection was lost, perhaps while it was idle: open it anew, once.
    REOPEN = auto()
    # Another server may succeed.
    ELSEWHERE = auto()
    # The server cannot be reached, or does not answer.
    TAKE_OUT = auto()


def classify_error(
    pool: Pool,
    call: Call,
    connection: BaseDatabaseWrapper,
    error: Exception,
    ran_for: float | None,
) -> ErrorAction | Refusal:
    """
    Return what becomes of a read, or why a standby refuses it for being one.

    ``ran_for``: seconds that the statement ran, or None if it was not sent. A connection that
    cannot be used any more is closed.
    """
    has_run = ran_for is not None
    # Before the connection is closed, which ends a transaction.
    in_transaction = connection.in_atomic_block or is_transaction_open(connection)
    is_write = has_run and call.written_alias is not None
    is_modified = is_session_modified(connection) or (
        isinstance(error, ServerUnresponsive) and error.ended_modified_session
    )
    if isinstance(error, (BudgetExhausted, ReplayWaits)):
        if isinstance(error, ReplayWaits):
            _take_out_blocked(pool, connection)
        connection.close()
        must_stay = in_transaction or is_write or is_modified
        return ErrorAction.RAISE if must_stay else ErrorAction.ELSEWHERE
    if in_transaction or call.many or is_write:
        if not in_transaction and isinstance(error, (ServerUnresponsive, ServerGone)):
            # The driver still waits for the answer.
            connection.close()
        return ErrorAction.RAISE
    refusal = None
    if has_run and may_run_on_primary(pool, call):
        refusal = refusal_of(connection, error)
    if refusal is not None:
        return refusal
    if not isinstance(error, CONNECTION_ERRORS):
        return ErrorAction.RAISE
    if ran_for is not None and has_timed_out(connection, error, ran_for):
        if is_modified or answers_probe(connection, error, ran_for):
            return ErrorAction.RAISE
        connection.close()
        return ErrorAction.ELSEWHERE
    if has_run and _waited_for_lock(pool, connection, error):
        if not may_fail_over(connection, call):
            return ErrorAction.RAISE
        _take_out_blocked(pool, connection)
        return ErrorAction.ELSEWHERE
    if not _is_lost(connection, error):
        is_sites_own = has_run and not _is_retryable(connection, error)
        return ErrorAction.RAISE if is_sites_own else ErrorAction.ELSEWHERE
    if is_modified:
        if isinstance(error, (ServerUnresponsive, ServerGone)):
            connection.close()
        return ErrorAction.RAISE
    was_made = connection.connection is not None
    can_reopen = was_made and not is_unresponsive(connection, error)
    was_ended = (
        can_reopen
        and ran_for is not None
        and not isinstance(error, ServerGone)
        and _was_ended(connection, ran_for)
    )
    connection.close()
    if was_ended:
        # No replica substitutes for a primary that is up.
        is_primary = connection.alias == pool.primary
        return ErrorAction.RAISE if is_primary else ErrorAction.ELSEWHERE
    return ErrorAction.REOPEN if can_reopen else ErrorAction.TAKE_OUT


def _waited_for_lock(pool: Pool, connection: BaseDatabaseWrapper, error: Exception) -> bool:
    """Return whether a timeout of the server's ended a wait for a lock on a standby."""
    dialect = dialect_for(connection)
    if dialect is None or connection.alias == pool.primary or connection.connection is None:
        return False
    code, state = dialect.error_code(error), state_of(connection)
    if not state.may_be_standby:
        # A replica's alias may resolve to the primary, where a lock is that of another statement.
        return False
    is_timeout = code in dialect.timeout_errors and state.waits_for_lock
    return is_timeout or code in dialect.lock_errors


def _take_out_blocked(pool: Pool, connection: BaseDatabaseWrapper) -> None:
    """
    Take a standby out of rotation whose replay seems to wait for a lock, and have the monitor check
    that. Behind a load balancer, the monitor may be connected to another server.
    """
    endpoint, dialect = endpoint_for(connection), dialect_for(connection)
    can_check = dialect is not None and bool(dialect.replay_waits)
    server = state_of(connection).server if connection.connection is not None else None
    if can_check and server is not None:
        server.replay_waits = True
        pool.health.update_status(endpoint, server)
    endpoint.replay_suspected = True
    registry.request_work(endpoint)


def is_unresponsive(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    """Return whether the server of a connection did not answer."""
    is_marked = endpoint_for(connection).out_of_rotation is Fault.UNRESPONSIVE
    return isinstance(error, ServerUnresponsive) or is_marked


def _is_lost(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    if isinstance(error, ServerUnresponsive) or connection.connection is None:
        return True
    dialect = dialect_for(connection)
    if dialect is not None and dialect.is_lost(error):
        return True
    with without_failover():
        try:
            return not connection.is_usable()
        except OperationalError:
            # The server does not answer, or not in what is left of the budget.
            return True


def _was_ended(connection: BaseDatabaseWrapper, ran_for: float) -> bool:
    """
    Return whether a running read was ended, by an administrator or by the timeout of a proxy, while
    its server goes on: running it there once more may end in the same way.
    """
    if ran_for < RETRY_IF_FAILED_WITHIN or dialect_for(connection) is None:
        return False
    if len(endpoint_for(connection).recent_servers) > 1:
        # Another server may answer the probe.
        return False
    with read_budget.spending():
        outcome = probe_afresh(state_of(connection), min(CONNECT_TIMEOUT, read_budget.left))
    return outcome is ProbeOutcome.ANSWERED


def _is_retryable(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    dialect = dialect_for(connection)
    return dialect is not None and dialect.is_retryable(error)
