"""
The retry policy for reads: one visible loop with one time budget.

A read runs where it was sent. If the server there must not or cannot serve it, the read is tried
once on each other replica of the pool and at the end on the primary. It is never moved if that
could change more than the server: inside a transaction, in a session that the code has modified,
to an alias that is not interchangeable, or inside ``no_failover()``. Then the server's own error is
raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, NamedTuple

from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.session_setup import set_up_session
from pinning_middleware.backend.writes import recording_write, sql_text
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.choice import balance_key
from pinning_middleware.routing.compatibility import is_interchangeable
from pinning_middleware.routing.policy import Decision, Rejection, admit, is_former_primary
from pinning_middleware.routing.pool import Pool
from pinning_middleware.scopes.overrides import current_overrides, innermost_override
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.dialects import Refusal, dialect_for
from pinning_middleware.servers.liveness import ReplayWaits, ServerUnresponsive
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    endpoint_for,
    failover_disabled,
    is_pool_exhausted,
    refusal_of,
    state_of,
    without_failover,
)
from pinning_middleware.servers.psycopg_pool import has_pool
from pinning_middleware.servers.registry import registry
from pinning_middleware.signals import fell_back_to_primary, fell_back_to_replica, read_retried
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import refusals
from pinning_middleware.utils.logging import log_rate_limited
from pinning_middleware.utils.transactions import is_transaction_open

__all__ = [
    "Call",
    "UnopenedCursor",
    "admit_cursor",
    "discard",
    "execute_on_primary",
    "execute_read",
    "may_move",
    "record_rejected_write",
]

logger = logging.getLogger("pinning_middleware.reads")

# Seconds of the budget without which no other replica is tried.
MIN_LEFT: Final = 0.25

# The policy requires the primary: no other replica may serve, and nothing has failed.
_PRIMARY_ONLY: Final = (Reason.WROTE, Reason.LOCK, Reason.PINNED, Reason.PRIMARY_MODEL)
# Reasons that are decisions of the policy, not failures: logged at DEBUG, without a signal.
_BY_POLICY: Final = (*_PRIMARY_ONLY, Reason.NOT_CAUGHT_UP)


_DEMOTED: Final = Rejection(Fault.DEMOTED)


class UnopenedCursor:
    """
    The driver's cursor of a connection that could not be opened.

    Whatever is called on it raises the connection's error, unless the statement is run elsewhere.
    """

    def __init__(self, error: Exception, name: str | None) -> None:
        self.error, self.name = error, name
        # Whether the error has been dealt with: the next statement may connect again.
        self.is_handled = False

    def __getattr__(self, name: str) -> Any:
        raise self.error

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


class Call(NamedTuple):
    """A statement as an execute wrapper gets it."""

    execute: Callable[..., Any]
    sql: Any
    params: Any
    many: bool
    context: dict[str, Any]

    @property
    def cursor(self) -> Any:
        """Django's cursor, from which the caller fetches the rows."""
        return self.context["cursor"]

    def run(self) -> Any:
        """Run the statement on the connection that the cursor belongs to now."""
        set_up_session(self.cursor.db)
        return self.execute(self.sql, self.params, self.many, self.context)

    def as_write(self, alias: str) -> Call:
        """Return the statement as one that is recorded as a write where it runs."""

        def execute(sql: Any, params: Any, many: bool, context: dict[str, Any]) -> Any:
            with recording_write(context["cursor"].db, alias, sql):
                return self.execute(sql, params, many, context)

        return self._replace(execute=execute)

    def move_to(self, connection: BaseDatabaseWrapper) -> None:
        """Make the cursor one of another connection, or of the same one after it was reopened."""
        cursor = self.cursor
        is_chunked = getattr(cursor.cursor, "name", None) is not None
        with without_failover():
            fresh = connection.chunked_cursor() if is_chunked else connection.cursor()
        cursor.cursor, cursor.db = fresh.cursor, fresh.db


class _Served(NamedTuple):
    result: Any


def execute_read(pool: Pool, call: Call) -> Any:
    """
    Run a read, on another server of the pool if necessary, and return its result.

    Raise the last server's error if none could serve it; OperationalError if the connection must
    not serve this scope and nothing may take over.
    """
    try:
        return _execute_read(pool, call)
    finally:
        read_budget.renew()


def _execute_read(pool: Pool, call: Call) -> Any:
    scope, first = current_scope(), call.cursor.db
    refused = pool.refusals
    known = None if refused.is_empty else refused.find(sql_text(first, call.sql))
    if known is not None and known.is_write:
        call = call.as_write(pool.primary)
    if first.alias == pool.primary and conf.primary_down != "stale":
        return _execute_on_own_primary(pool, scope, call)
    if known is not None and _may_run_on_primary(pool, call):
        refusals[pool.primary, known.name] += 1
        return _run_on_primary_only(pool, scope, call, Rejection(Reason.PRIMARY_MODEL)).result
    outcome = _run_on(pool, scope, call, first)
    if isinstance(outcome, _Served):
        return outcome.result
    first_rejection = outcome
    if not _may_fail_over(first, call):
        raise _error(first.alias, outcome, "its transaction or session cannot be moved")
    if first.alias == pool.primary:
        # Nothing else is left that could serve.
        read_budget.renew()
    for alias in _alternatives(pool, scope, first.alias, outcome):
        if not is_interchangeable(first.alias, alias):
            continue
        if alias != pool.primary and read_budget.left < MIN_LEFT:
            continue
        next_outcome = _run_on(pool, scope, call, connections[alias])
        if isinstance(next_outcome, _Served):
            _report_failover(pool, scope, call.cursor, first.alias, alias, first_rejection)
            return next_outcome.result
        if next_outcome.error is not None:
            outcome = next_outcome
    raise _error(
        first.alias, outcome, "no other alias in its pool has the same USER, NAME and OPTIONS"
    )


def admit_cursor(pool: Pool, cursor: Any) -> None:
    """
    Make a cursor one that may serve a read, for methods of the driver that take no execute wrapper.

    Raise what ``execute_read()`` raises.
    """
    context = {"cursor": cursor, "connection": cursor.db}
    execute_read(pool, Call(lambda *args: None, "", None, False, context))


def _execute_on_own_primary(pool: Pool, scope: Scope, call: Call) -> Any:
    """Run a read of the primary, whose errors are the site's own; never on a former primary."""
    connection, raw = call.cursor.db, call.cursor.db.connection
    rejection = None if raw is None else admit(pool, connection, scope)
    if rejection is not None:
        leave_former_primary(pool, call, rejection)
    elif connection.connection is not raw:
        # Closed or reopened by a probe.
        call.move_to(connection)
    result = call.run()
    if pool.guarantee.tracks_reads:
        pool.guarantee.record_read(pool, scope, connection.alias)
    return result


def leave_former_primary(pool: Pool, call: Call, rejection: Rejection = _DEMOTED) -> None:
    """
    Reopen the connection of a statement that must not run on a former primary.

    Raise OperationalError if it cannot be reopened, or if the alias still resolves to that server.
    """
    connection = call.cursor.db
    if not may_move(connection):
        raise _error(connection.alias, rejection, "a transaction is open")
    began, is_superseded, is_old = time.monotonic(), True, True
    while is_superseded and is_old:
        discard(connection)
        call.move_to(connection)
        is_superseded = _is_superseded(pool, connection)
        # A pool may have more connections of the same age.
        raw = connection.connection
        is_old = raw is not None and state_of(connection).opened_at < began
    if is_superseded:
        raise _error(
            connection.alias, rejection, "its address still resolves to the former primary"
        )


def record_rejected_write(connection: BaseDatabaseWrapper, error: Exception) -> None:
    """
    Note that a server rejected a write because it is read-only: if it is a former primary, a new
    connection leads to another server.
    """
    dialect = dialect_for(connection)
    if dialect is None or connection.connection is None:
        return
    state = state_of(connection)
    if not state.session_modified and dialect.error_code(error) in dialect.read_only_errors:
        state.rejected_write = True


def discard(connection: BaseDatabaseWrapper) -> None:
    """Close a connection to a former primary for good, also one that belongs to a pool."""
    if connection.connection is not None and has_pool(connection):
        connection.connection.close()
    connection.close()
    endpoint_for(connection).must_reidentify = True


def _is_superseded(pool: Pool, connection: BaseDatabaseWrapper) -> bool:
    """Return whether a new connection of the primary's alias is to a former primary, too."""
    with without_failover():
        return is_former_primary(pool, connection, current_scope())


def _run_on(
    pool: Pool, scope: Scope, call: Call, connection: BaseDatabaseWrapper
) -> _Served | Rejection:
    """
    Admit a connection and run the statement on it.

    A connection that turns out to be lost is opened anew once: it may have been closed while it was
    idle. Raise errors that another server would repeat.
    """
    is_first = call.cursor.db is connection
    if (connect_error := _connect_error(call, connection)) is not None:
        return _take_out(connection, connect_error)
    for is_last in (False, True):
        was_open, has_run = connection.connection is not None, False
        try:
            if is_last or not is_first or isinstance(call.cursor.cursor, UnopenedCursor):
                _reopen(connection)
                call.move_to(connection)
            raw = connection.connection
            rejection = admit(pool, connection, scope)
            if rejection is not None:
                if rejection.reason is not Fault.DEMOTED or not may_move(connection):
                    return rejection
                if not is_last:
                    discard(connection)
                    continue
                if _is_superseded(pool, connection):
                    return rejection
            if connection.connection is not raw:
                # Reopened by a probe.
                call.move_to(connection)
            has_run = True
            result = _run_watched(pool, call, connection)
        except BudgetExhausted as error:
            connection.close()
            return Rejection(Reason.FAILOVER, error)
        except ReplayWaits as error:
            connection.close()
            return _suspect_replay(connection, error)
        except (DatabaseError, InterfaceError) as error:
            if connection.in_atomic_block or call.many:
                raise
            if has_run and _may_run_on_primary(pool, call):
                refusal = refusal_of(connection, error)
                if refusal is not None:
                    return _run_refused(pool, scope, call, error, refusal)
            if not isinstance(error, CONNECTION_ERRORS):
                raise
            if has_run and _waited_for_lock(pool, connection, error):
                if not _may_fail_over(connection, call):
                    raise
                return _suspect_replay(connection, error)
            if not _is_lost(connection, error):
                if has_run and not _is_retryable(connection, error):
                    raise
                return Rejection(Reason.FAILOVER, error)
            if has_run and state_modified(connection):
                raise
            was_made = connection.connection is not None
            connection.close()
            may_retry = (is_first and has_run) or was_open or not has_run
            if was_made and may_retry and not (is_last or _is_unresponsive(connection, error)):
                endpoint_for(connection).must_reidentify = True
                continue
            return _take_out(connection, error)
        if pool.guarantee.tracks_reads:
            pool.guarantee.record_read(pool, scope, connection.alias)
        return _Served(result)
    raise AssertionError("unreachable")


def _waited_for_lock(pool: Pool, connection: BaseDatabaseWrapper, error: Exception) -> bool:
    """Return whether a timeout of the server's ended a wait for a lock on a standby."""
    dialect = dialect_for(connection)
    if dialect is None or connection.alias == pool.primary or connection.connection is None:
        return False
    code = dialect.error_code(error)
    is_timeout = code in dialect.timeout_errors and state_of(connection).waits_for_lock
    return is_timeout or code in dialect.lock_errors


def _suspect_replay(connection: BaseDatabaseWrapper, error: Exception) -> Rejection:
    """Have the monitor find out whether the server's replay waits for a lock."""
    endpoint = endpoint_for(connection)
    endpoint.replay_suspected = True
    registry.request_attention(endpoint)
    return Rejection(Reason.FAILOVER, error)


def _may_run_on_primary(pool: Pool, call: Call) -> bool:
    connection = call.cursor.db
    return (
        connection.alias != pool.primary
        and _may_fail_over(connection, call)
        and is_interchangeable(connection.alias, pool.primary)
    )


def _run_on_primary_only(pool: Pool, scope: Scope, call: Call, rejection: Rejection) -> _Served:
    """Run a statement on the primary, because no replica can. Raise the primary's own error."""
    failed = call.cursor.db.alias
    outcome = _run_on(pool, scope, call, connections[pool.primary])
    if not isinstance(outcome, _Served):
        raise _error(pool.primary, outcome, "no replica can run the statement")
    _report_failover(pool, scope, call.cursor, failed, pool.primary, rejection)
    return outcome


def _run_refused(
    pool: Pool, scope: Scope, call: Call, error: Exception, refusal: Refusal
) -> _Served:
    """
    Run a statement on the primary that a standby has refused for being one. If that succeeds, the
    next one goes there at once.
    """
    if refusal.is_write:
        call = call.as_write(pool.primary)
    outcome = _run_on_primary_only(pool, scope, call, Rejection(Reason.FAILOVER, error))
    primary = call.cursor.db
    known = pool.refusals.add(refusal, sql_text(primary, call.sql), primary.settings_dict["USER"])
    refusals[pool.primary, known.name] += 1
    if refusal.is_lasting:
        advice = "PINNING_WRITING_FUNCTIONS" if refusal.is_write else "PINNING_PRIMARY_MODELS"
        log_rate_limited(
            logger,
            logging.WARNING,
            (pool.primary, known.name),
            "Every standby refuses %s, which goes to the primary from now on; see %s: %s",
            known.name,
            "PINNING_OFFLOAD" if refusal.all_reads else advice,
            error,
            extra={"pool": pool.primary, "refused": known.name, "error": str(error)},
        )
    return outcome


def _connect_error(call: Call, connection: BaseDatabaseWrapper) -> Exception | None:
    """Return the error with which connecting for this cursor has just failed, or None."""
    opened = call.cursor.cursor
    if not isinstance(opened, UnopenedCursor) or call.cursor.db is not connection:
        return None
    if opened.is_handled:
        return None
    opened.is_handled = True
    if connection.connection is not None and not _is_unresponsive(connection, opened.error):
        # It was lost while it was idle.
        return None
    connection.close()
    return opened.error


def _is_unresponsive(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    is_marked = endpoint_for(connection).out_of_rotation is Fault.UNRESPONSIVE
    return isinstance(error, ServerUnresponsive) or is_marked


def _take_out(connection: BaseDatabaseWrapper, error: Exception) -> Rejection:
    """
    Take what an alias resolves to out of rotation, unless it is already.

    Raise the error if only the site's own pool had no connection, which says nothing of the server.
    """
    if is_pool_exhausted(error):
        raise error
    endpoint = endpoint_for(connection)
    if not (endpoint.is_down or isinstance(error, BudgetExhausted)):
        is_unresponsive = _is_unresponsive(connection, error)
        fault = Fault.UNRESPONSIVE if is_unresponsive else Fault.UNREACHABLE
        registry.mark_down(endpoint, fault, conf.retry_after, error)
    return Rejection(Reason.FAILOVER, error)


def _reopen(connection: BaseDatabaseWrapper) -> None:
    with without_failover():
        connection.close_if_health_check_failed()
        connection.ensure_connection()


def _run_watched(pool: Pool, call: Call, connection: BaseDatabaseWrapper) -> Any:
    """
    Run the statement; notice if its server does not answer, or makes it wait for a lock of
    recovery, and another one may serve it.
    """
    if pool.dialect is None:
        return call.run()
    state = state_of(connection)
    if connection.alias == pool.primary:
        if conf.primary_down != "stale":
            return call.run()
        state.may_fail_over = not is_transaction_open(connection)
        try:
            return call.run()
        finally:
            state.may_fail_over = False
    state.waits_for_lock = False
    state.may_leave = partial(_may_fail_over, connection, call)
    try:
        return call.run()
    finally:
        state.may_leave = None


def execute_on_primary(pool: Pool, call: Call, reason: Reason) -> Any:
    """Run a statement of a replica's cursor on the primary: only there can it take its locks."""
    call.move_to(connections[pool.primary])
    cursor = call.cursor
    cursor.pinning_decision = Decision(pool.primary, None, reason)
    cursor.__dict__.pop("pinning_alias", None)
    return cursor.execute(call.sql, call.params)


def may_move(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a statement of this connection may run on another one."""
    return not is_transaction_open(connection) and not failover_disabled.get()


def state_modified(connection: BaseDatabaseWrapper) -> bool:
    """Return whether the code has modified the session, and nothing restores it elsewhere."""
    if conf.session_setup is not None or dialect_for(connection) is None:
        return False
    return connection.connection is not None and state_of(connection).session_modified


def _may_fail_over(connection: BaseDatabaseWrapper, call: Call) -> bool:
    return may_move(connection) and not call.many and not state_modified(connection)


def _alternatives(pool: Pool, scope: Scope, failed: str, rejection: Rejection) -> Iterator[str]:
    """Yield the aliases that may serve instead, each once, and the primary last."""
    if failed == pool.primary:
        if conf.primary_down == "stale":
            yield from pool.replica_set.freshest_first()
        return
    if rejection.reason not in _PRIMARY_ONLY:
        override = innermost_override(current_overrides(), pool.primary)
        max_lag, group = (override.max_lag, override.group) if override else (None, None)
        # For a pinned read the primary comes before a higher tier.
        is_pinned = override is None and scope.state(pool.key).is_bound(clock.now())
        rotations = pool.replica_set.rotations
        for alias in rotations.alternatives(group, balance_key(scope), fallback=not is_pinned):
            lag = pool.replica_set.lag(alias) if max_lag is not None else 0.0
            if alias != failed and (max_lag is None or (lag is not None and lag <= max_lag)):
                yield alias
    yield pool.primary


def _is_lost(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    if isinstance(error, ServerUnresponsive) or connection.connection is None:
        return True
    dialect = dialect_for(connection)
    if dialect is not None and dialect.is_lost(error):
        return True
    with without_failover():
        try:
            return not connection.is_usable()
        except ServerUnresponsive:
            return True


def _is_retryable(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    dialect = dialect_for(connection)
    return dialect is not None and dialect.is_retryable(error)


def _error(alias: str, rejection: Rejection, why: str) -> Exception:
    if rejection.error is not None:
        return rejection.error
    return OperationalError(
        f"Cannot read from {alias!r} ({rejection.reason.description}), and {why}. Read inside "
        "use_replica() if the result may be stale."
    )


def _report_failover(
    pool: Pool, scope: Scope, cursor: Any, failed: str, served: str, rejection: Rejection
) -> None:
    """Log and signal the failover, and make the rest of the scope use the new server."""
    reason = rejection.reason if isinstance(rejection.reason, Reason) else Reason.FAILOVER
    replica = None if served == pool.primary else served
    decision = cursor.__dict__.get("pinning_decision")
    if decision is None:
        decision = Decision(failed, None if failed == pool.primary else failed, reason)
    cursor.pinning_decision = decision._replace(reason=reason)
    cursor.__dict__.setdefault("pinning_alias", failed)
    may_keep = served == pool.primary or served in pool.replica_set.rotation.weights
    if may_keep and (failed in pool.replica_set.out_of_rotation or reason is Reason.NOT_CAUGHT_UP):
        scope.update(pool.key, lambda state: state._replace(replica=replica))
    if reason in _BY_POLICY:
        logger.debug("Read %s instead of %s: %s", served, failed, reason.description)
        return
    cause = rejection.error or rejection.reason.description
    log_rate_limited(
        logger,
        logging.WARNING,
        (pool.primary, failed, served),
        "Could not read from %s; read from %s instead: %s",
        failed,
        served,
        cause,
        extra={
            "pool": pool.primary,
            "failed": failed,
            "served": served,
            "reason": reason,
            "error": str(cause),
        },
    )
    read_retried.send_robust(pool.primary, failed=failed, served=served, error=cause)
    if failed == pool.primary:
        fell_back_to_replica.send_robust(pool.primary, served=served, reason=Reason.PRIMARY_DOWN)
    elif served == pool.primary:
        fell_back_to_primary.send_robust(pool.primary, served=served, reason=Reason.NO_REPLICA)
