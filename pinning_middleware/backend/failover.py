"""
Retry a read on other servers, within one time budget.

A read runs where it was sent. If the server there must not or cannot serve it, the read is tried
once on each other replica of the pool and at the end on the primary. It is never moved if that
could change more than the server: inside a transaction, in a session that the code has modified,
to an alias that is not interchangeable, or inside ``no_failover()``. Then the server's own error is
raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, NamedTuple

from django.db import DatabaseError, InterfaceError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.call import (
    Call,
    UnopenedCursor,
    call_of,
    may_fail_over,
    may_move,
    may_run_on_primary,
    rejection_error,
)
from pinning_middleware.backend.former_primary import (
    discard,
    leave_former_primary,
    reopen_elsewhere,
)
from pinning_middleware.backend.read_errors import ErrorAction, classify_error, is_unresponsive
from pinning_middleware.backend.writes import sql_text
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.compatibility import is_interchangeable
from pinning_middleware.routing.guarantees import record_observed
from pinning_middleware.routing.policy import Decision, Rejection, admit
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.replica_choice import balance_key
from pinning_middleware.routing.route import send_fallback
from pinning_middleware.servers.blocked_reads import track_read
from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects import Refusal
from pinning_middleware.servers.liveness import ServerUnresponsive
from pinning_middleware.servers.probe import (
    endpoint_for,
    is_connection_pool_exhausted,
    is_session_modified,
    state_of,
    without_failover,
)
from pinning_middleware.servers.registry import registry
from pinning_middleware.signals import read_retried
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import count_refusal
from pinning_middleware.utils.logging import log_rate_limited
from pinning_middleware.utils.transactions import is_transaction_open

logger = logging.getLogger("pinning_middleware.reads")

# Minimum seconds of the budget for trying another replica.
MIN_LEFT: Final = 0.25

# The policy requires the primary: no other replica may serve, and nothing has failed.
_PRIMARY_ONLY: Final = frozenset(
    {Reason.WROTE, Reason.MANUAL, Reason.LOCK, Reason.PINNED, Reason.PRIMARY_MODEL}
)
# Reasons that are decisions of the policy, not failures: logged at DEBUG, without a signal.
_BY_POLICY: Final = _PRIMARY_ONLY | {Reason.NOT_CAUGHT_UP}


class _Served(NamedTuple):
    result: Any


class _Lost(NamedTuple):
    """A connection was lost, before or while it ran the statement; a new one may succeed."""

    error: Exception
    has_run: bool


def execute_read(pool: Pool, call: Call) -> Any:
    """
    Run a read, on another server of the pool if necessary, and return its result.

    Raise the last server's error if none could serve it; OperationalError if the connection must
    not serve this scope and nothing may take over.
    """
    first = call.cursor.db
    refused = pool.refusals
    known = None if refused.is_empty else refused.find(sql_text(first, call.sql))
    if known is not None and known.is_write:
        call = call.as_write(pool.primary)
    if first.alias == pool.primary and not pool.can_replace_primary:
        return _run_without_failover(pool, call)
    if known is not None and may_run_on_primary(pool, call):
        count_refusal(pool.primary, known.name)
        return _move_to_primary(pool, call, Rejection(Reason.PRIMARY_MODEL)).result
    outcome = _try_connection(pool, call, first)
    if isinstance(outcome, _Served):
        return outcome.result
    first_rejection = outcome
    if not may_fail_over(first, call):
        if outcome.reason is Fault.DEMOTED and may_move(first):
            # The next statement gets a new session.
            discard(first)
        raise rejection_error(first.alias, outcome, "its transaction or session cannot be moved")
    if first.alias == pool.primary:
        # The replicas are the last resort while the primary is down: give them a full budget.
        read_budget.renew()
    for alias in _candidates(pool, call, first.alias, outcome):
        next_outcome = _try_connection(pool, call, connections[alias])
        if isinstance(next_outcome, _Served):
            # This alias may also have refused the statement; then the primary has run it.
            served = call.cursor.db.alias
            _report_failover(pool, call, first.alias, served, first_rejection)
            return next_outcome.result
        if next_outcome.error is not None:
            outcome = next_outcome
    raise rejection_error(first.alias, outcome, "no interchangeable alias of its pool can serve")


def admit_cursor(pool: Pool, cursor: Any) -> None:
    """
    Move a cursor to a connection that may serve a read, for methods of the driver that bypass
    execute wrappers.

    Raise what ``execute_read()`` raises.
    """
    try:
        execute_read(pool, call_of(pool, cursor))
    finally:
        read_budget.renew()


def _run_without_failover(pool: Pool, call: Call) -> Any:
    """
    Run a read on a primary that no replica may replace. Leave a former primary first; raise the
    errors unchanged.
    """
    connection, raw = call.cursor.db, call.cursor.db.connection
    rejection = None if raw is None else admit(pool, connection, call.scope, call.effects.routing)
    if rejection is not None:
        leave_former_primary(pool, call, rejection)
    else:
        call.renew_cursor(raw)
    result = call.run()
    if pool.tracks_reads:
        record_observed(pool, call.scope, connection)
    return result


def _try_connection(pool: Pool, call: Call, connection: BaseDatabaseWrapper) -> _Served | Rejection:
    """
    Admit a connection and run the statement on it, or take its server out of rotation.

    Raise errors that another server would repeat.
    """
    opened, is_first = call.cursor.cursor, call.cursor.db is connection
    must_open = not is_first or connection.connection is None
    if is_first and isinstance(opened, UnopenedCursor):
        if (error := _connect_error(opened, connection)) is not None:
            return _take_out(connection, error)
        must_open = True
    may_be_stale = is_first or connection.connection is not None
    outcome = _try_once(pool, call, connection, must_open)
    if isinstance(outcome, _Lost) and (may_be_stale or not outcome.has_run):
        # The server may have closed it while it was idle.
        endpoint_for(connection).must_reidentify = True
        outcome = _try_once(pool, call, connection, must_open=True)
    if isinstance(outcome, _Lost):
        return _take_out(connection, outcome.error)
    return outcome


def _try_once(
    pool: Pool, call: Call, connection: BaseDatabaseWrapper, must_open: bool
) -> _Served | Rejection | _Lost:
    began = None
    try:
        if must_open:
            _reopen(connection)
            call.move_to(connection)
        if (rejection := _admit(pool, call)) is not None:
            return rejection
        began = time.monotonic()
        result = _run_watched(pool, call, connection)
    except (DatabaseError, InterfaceError) as error:
        ran_for = None if began is None else time.monotonic() - began
        action = classify_error(pool, call, connection, error, ran_for)
        if action is ErrorAction.RAISE:
            raise
        if isinstance(action, Refusal):
            return _move_refused(pool, call, error, action)
        if action is ErrorAction.ELSEWHERE:
            return Rejection(Reason.FAILOVER, error)
        if action is ErrorAction.REOPEN:
            return _Lost(error, has_run=began is not None)
        return _take_out(connection, error)
    if pool.tracks_reads:
        record_observed(pool, call.scope, connection)
    return _Served(result)


def _admit(pool: Pool, call: Call) -> Rejection | None:
    """
    Return why the cursor's connection must not serve the statement, or None. A connection to a
    former primary is reopened.
    """
    connection, raw = call.cursor.db, call.cursor.db.connection
    rejection = admit(pool, connection, call.scope, call.effects.routing)
    if rejection is None:
        call.renew_cursor(raw)
    elif (
        rejection.reason is Fault.DEMOTED
        and may_move(connection)
        and not is_session_modified(connection)
    ):
        if not reopen_elsewhere(pool, connection, call.scope):
            return rejection
        call.move_to(connection)
        return None
    return rejection


def _move_to_primary(pool: Pool, call: Call, rejection: Rejection) -> _Served:
    """Run a statement on the primary, because no replica can. Raise the primary's own error."""
    failed = call.cursor.db.alias
    outcome = _try_connection(pool, call, connections[pool.primary])
    if not isinstance(outcome, _Served):
        raise rejection_error(pool.primary, outcome, "no replica can run the statement")
    _report_failover(pool, call, failed, pool.primary, rejection)
    return outcome


def _move_refused(pool: Pool, call: Call, error: Exception, refusal: Refusal) -> _Served:
    """
    Run a statement on the primary that a server has refused because it is a standby. If that
    succeeds, the next one goes there at once.
    """
    if refusal.is_write:
        call = call.as_write(pool.primary)
    outcome = _move_to_primary(pool, call, Rejection(Reason.FAILOVER, error))
    primary = call.cursor.db
    known = pool.refusals.add(refusal, sql_text(primary, call.sql), primary.settings_dict["USER"])
    count_refusal(pool.primary, known.name)
    if refusal.is_lasting:
        advice = "PINNING_WRITING_FUNCTIONS" if refusal.is_write else "PINNING_PRIMARY_MODELS"
        log_rate_limited(
            logger,
            logging.WARNING,
            (pool.primary, known.name),
            "No standby can serve %s, which goes to the primary from now on; see %s: %s",
            known.name,
            "PINNING_OFFLOAD" if refusal.all_reads else advice,
            error,
            extra={"pool": pool.primary, "refused": known.name, "error": str(error)},
        )
    return outcome


def _connect_error(opened: UnopenedCursor, connection: BaseDatabaseWrapper) -> Exception | None:
    """Return the error with which connecting for a cursor has just failed, or None."""
    if opened.is_handled:
        return None
    opened.is_handled = True
    if connection.connection is not None and not is_unresponsive(connection, opened.error):
        # It was lost while it was idle.
        return None
    connection.close()
    return opened.error


def _take_out(connection: BaseDatabaseWrapper, error: Exception) -> Rejection:
    """
    Take the endpoint of a connection out of rotation, unless it already is.

    Raise the error if only the site's own pool had no connection, which is no fault of the server.
    """
    if is_connection_pool_exhausted(error):
        raise error
    endpoint = endpoint_for(connection)
    # Of several servers, the one that does not answer has been taken out.
    is_one_of_several = isinstance(error, ServerUnresponsive) and len(endpoint.recent_servers) > 1
    if not (endpoint.is_down or is_one_of_several or isinstance(error, BudgetExhausted)):
        is_down = not is_unresponsive(connection, error)
        fault = Fault.UNREACHABLE if is_down else Fault.UNRESPONSIVE
        registry.mark_down(endpoint, fault, conf.retry_after, error)
    return Rejection(Reason.FAILOVER, error)


def _reopen(connection: BaseDatabaseWrapper) -> None:
    with without_failover():
        connection.close_if_health_check_failed()
        connection.ensure_connection()


def _run_watched(pool: Pool, call: Call, connection: BaseDatabaseWrapper) -> Any:
    """
    Run the statement; notice if its server does not answer, or makes it wait for a lock that WAL
    replay holds, and another one may serve it.
    """
    is_primary = connection.alias == pool.primary
    if pool.dialect is None or (is_primary and not pool.can_replace_primary):
        return call.run()
    state = state_of(connection)
    if is_primary:
        state.may_fail_over = not is_transaction_open(connection)
    else:
        state.waits_for_lock = False
        state.may_leave = partial(may_fail_over, connection, call)
    try:
        if state.waits_are_watched or not may_fail_over(connection, call):
            result = call.run()
        else:
            result = _run_tracked(call, connection, state)
        state.record_answer()
        return result
    finally:
        state.may_leave = None
        if is_primary:
            state.may_fail_over = False


def _run_tracked(call: Call, connection: BaseDatabaseWrapper, state: ConnectionState) -> Any:
    """Run the statement on a driver that blocks, while a thread tracks it."""
    read = track_read(connection.connection, state)
    try:
        result = call.run()
        if read is not None and read.was_given_up:
            # It was answered at the same time. The connection is closed before the next request.
            connection.errors_occurred = True
        return result
    except (DatabaseError, InterfaceError) as error:
        if read is not None and read.was_given_up:
            raise read.error() from error
        raise
    finally:
        if read is not None:
            read.end()


def _candidates(pool: Pool, call: Call, failed: str, rejection: Rejection) -> Iterator[str]:
    """
    Yield the interchangeable aliases that may serve instead. A replica is skipped if too little of
    the budget is left, unless the primary is not interchangeable.
    """
    skipped = None
    for alias in _alternatives(pool, call, failed, rejection):
        if not is_interchangeable(failed, alias) or is_session_modified(connections[alias]):
            continue
        if alias == pool.primary or read_budget.left >= MIN_LEFT:
            yield alias
        else:
            skipped = skipped or alias
    if skipped is not None and not is_interchangeable(failed, pool.primary):
        read_budget.renew()
        yield skipped


def _alternatives(pool: Pool, call: Call, failed: str, rejection: Rejection) -> Iterator[str]:
    """Yield the aliases that may serve instead, each once, and the primary last."""
    if failed == pool.primary:
        if pool.can_replace_primary:
            yield from pool.replica_set.freshest_first()
        return
    if rejection.reason not in _PRIMARY_ONLY:
        override, scope = call.effects.routing, call.scope
        max_lag, group = (override.max_lag, override.group) if override else (None, None)
        # For a pinned read the primary comes before a higher tier.
        requirement = scope.state(pool.key).required(clock.now())
        is_pinned = override is None and not requirement.is_empty
        rotations = pool.replica_set.rotations
        for alias in rotations.alternatives(group, balance_key(scope), fallback=not is_pinned):
            lag = pool.replica_set.lag(alias) if max_lag is not None else 0.0
            if alias != failed and (max_lag is None or (lag is not None and lag <= max_lag)):
                yield alias
    yield pool.primary


def _report_failover(
    pool: Pool, call: Call, failed: str, served: str, rejection: Rejection
) -> None:
    """Log and signal the failover, and make the rest of the scope use the new server."""
    cursor = call.cursor
    reason = rejection.reason if isinstance(rejection.reason, Reason) else Reason.FAILOVER
    replica = None if served == pool.primary else served
    decision = cursor.__dict__.get("pinning_decision")
    if decision is None:
        decision = Decision(failed, None if failed == pool.primary else failed, reason)
    cursor.pinning_decision = decision._replace(reason=reason)
    may_keep = served == pool.primary or served in pool.replica_set.rotation.weights
    if may_keep and (failed in pool.replica_set.out_of_rotation or reason is Reason.NOT_CAUGHT_UP):
        call.scope.keep_replica(pool.key, replica)
    if reason in _BY_POLICY:
        logger.debug("Read from %s instead of %s: %s", served, failed, reason.description)
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
    read_retried.send_robust(pool.primary, failed=failed, served=served, error=rejection.error)
    if failed == pool.primary:
        send_fallback(pool, call.scope, served, Reason.PRIMARY_DOWN)
    elif served == pool.primary:
        send_fallback(pool, call.scope, served, Reason.NO_REPLICA)
