"""
Probe one server, within a deadline: its identity and its replication position.

A probe bypasses Django's cursors: it appears in no query log and in no ``assertNumQueries``. No
failover happens during a probe.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from django.db import DatabaseError, InterfaceError, OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf, on_change
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.connection_state import ConnectionState, driver_session
from pinning_middleware.servers.dialects import (
    Dialect,
    Driver,
    Identification,
    PositionUnavailable,
    Query,
    Refusal,
    Row,
    dialect_for,
)
from pinning_middleware.servers.liveness import (
    DEADLINE,
    ServerUnresponsive,
    driver_connection,
    mark_unresponsive,
    probe_deadline,
    watch_waits,
)
from pinning_middleware.servers.registry import Endpoint, Identity, Report, Server, registry
from pinning_middleware.utils.transactions import driver_in_transaction

logger = logging.getLogger("pinning_middleware.servers")

# Logs the SQL of each probe, at the level DEBUG.
probe_logger = logging.getLogger("pinning_middleware.probes")

CONNECTION_ERRORS = (OperationalError, InterfaceError)
# Seconds since its last answer to a read for which a server counts as one that answers.
ANSWERS_WITHIN: Final = 1.0
# The name of the prepared statement on a connection.
_PREPARED = b"pinning_position"

# True during a probe and inside without_failover().
failover_disabled: ContextVar[bool] = ContextVar("pinning_failover_disabled", default=False)
# True while connecting for a probe, which uses CONNECT_TIMEOUT rather than the site's own timeout.
probing: ContextVar[bool] = ContextVar("pinning_probing", default=False)

_states: WeakKeyDictionary[Any, ConnectionState] = WeakKeyDictionary()


@contextmanager
def without_failover() -> Iterator[None]:
    """Disable failover inside the block."""
    previous = failover_disabled.get()
    failover_disabled.set(True)
    try:
        yield
    finally:
        failover_disabled.set(previous)


def probing_allowed(connection: BaseDatabaseWrapper) -> bool:
    """
    Return whether this thread may probe over a connection now.

    False in the thread of an event loop, in tests that forbid queries, and in a transaction,
    whose snapshot hides what is replayed meanwhile.
    """
    in_raw_transaction = getattr(connection, "in_raw_transaction", False)
    if connection.in_atomic_block or in_raw_transaction or driver_in_transaction(connection):
        return False
    if hasattr(connection.connect, "wrapped"):
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def is_connection_pool_exhausted(error: BaseException) -> bool:
    """
    Return whether an error of connecting means that no connection of psycopg's pool became free in
    time. All may be in use by this process, which is not a fault of the server.
    """
    module = sys.modules.get("psycopg_pool")
    if module is None:
        return False
    cause = error.__cause__ if error.__cause__ is not None else error
    return isinstance(cause, (module.PoolTimeout, module.TooManyRequests))


def endpoint_for(connection: BaseDatabaseWrapper) -> Endpoint:
    """Return the endpoint of a connection's alias."""
    return registry.endpoint(connection.alias, conf.primary_by_replica.get(connection.alias, ""))


def state_of(connection: BaseDatabaseWrapper, raw: Any = None) -> ConnectionState:
    """
    Return the state of the open driver connection, or of ``raw``, if it has just been opened.

    It is created if it does not exist, and again after a change of the settings.
    """
    raw = connection.connection if raw is None else raw
    cached = connection.__dict__.get("pinning_state")
    if cached is not None and cached[0] is raw and not cached[1].endpoint.is_stale:
        return cached[1]  # type: ignore[no-any-return]
    state = _states.get(raw)
    if state is None or state.endpoint.is_stale:
        endpoint = endpoint_for(connection)
        is_dedicated = getattr(connection, "is_dedicated", False)
        fresh = ConnectionState(endpoint, is_dedicated or endpoint.alias != endpoint.pool, raw)
        if state is not None:
            fresh.session_modified = state.session_modified
        watch_waits(raw, fresh)
        _record_read_timeout(connection, raw, fresh)
        state = _states[raw] = fresh
    state.session_modified_at_checkout = state.session_modified
    connection.__dict__["pinning_state"] = (raw, state)
    return state


def _record_read_timeout(connection: BaseDatabaseWrapper, raw: Any, state: ConnectionState) -> None:
    """Record whether a read ends if the server of a replica does not answer; log it once if not."""
    endpoint = state.endpoint
    if dialect_for(connection) is None or endpoint.alias == endpoint.pool:
        return
    was_bounded = endpoint.reads_are_bounded
    has_timeout = bool(connection.settings_dict["OPTIONS"].get("read_timeout"))
    has_socket = hasattr(driver_connection(raw), "fileno")
    endpoint.reads_are_bounded = state.waits_are_watched or has_timeout or has_socket
    if was_bounded is not endpoint.reads_are_bounded is False:
        logger.info(
            "Reads of %s cannot time out: connections of %s have no fileno(). Set the option "
            "read_timeout, or use psycopg or mysqlclient.",
            state.alias,
            type(raw).__module__,
        )


class ProbeResult(NamedTuple):
    """The server that answered, and its report; None if it cannot report a position."""

    server: Server
    report: Report | None


def probe(connection: BaseDatabaseWrapper, is_trial: bool = False) -> ProbeResult | None:
    """
    Probe the server of a connection: its position, and its identity if that is unknown.

    Return None if probing is not allowed here, or the database has no positions. Raise
    ``OperationalError`` or ``InterfaceError`` if the server cannot be reached, or did not answer
    within the deadline; it is then out of rotation. A trial of a server that is out of rotation
    changes neither its status nor the time of its retry.
    """
    dialect = dialect_for(connection)
    if dialect is None or not conf.positions or not probing_allowed(connection):
        return None
    if getattr(connection, "is_dedicated", False):
        return _probe(connection, dialect, is_trial)
    if read_budget.left < DEADLINE:
        raise BudgetExhausted(f"no time is left to probe {connection.alias}")
    with read_budget.spending():
        return _probe(connection, dialect, is_trial)


def _probe(connection: BaseDatabaseWrapper, dialect: Dialect, is_trial: bool) -> ProbeResult:
    with without_failover():
        try:
            return _probe_once(connection, dialect, is_trial)
        except CONNECTION_ERRORS as error:
            is_open = connection.connection is not None
            if not is_open or isinstance(error, ServerUnresponsive) or connection.is_usable():
                raise
            if is_session_modified(connection):
                # The statement that follows must not run in a new session.
                raise
            # The connection was lost while it was idle, or right after it was opened.
            connection.close()
            return _probe_once(connection, dialect, is_trial)


def is_session_modified(connection: BaseDatabaseWrapper) -> bool:
    """Return whether the code has modified the session, and nothing restores it elsewhere."""
    if conf.session_setup is not None or dialect_for(connection) is None:
        return False
    return connection.connection is not None and state_of(connection).session_modified


def fetch(connection: BaseDatabaseWrapper, sql: str) -> Row:
    """
    Return a row, within the deadline of a probe. Raise what the driver raises, as Django's errors.
    """
    connection.ensure_connection()
    return _query_for(connection, state_of(connection))(sql)


def refusal_of(connection: BaseDatabaseWrapper, error: Exception) -> Refusal | None:
    """
    Return why the server of a connection has refused a statement because it is a standby, or None
    for any other error. May probe the server.
    """
    dialect = dialect_for(connection)
    if dialect is None or not probing_allowed(connection):
        return None
    with without_failover(), suppress(DatabaseError, InterfaceError):
        return dialect.refusal(_query_for(connection, state_of(connection)), error)
    return None


def standby_limits(connection: BaseDatabaseWrapper) -> Refusal:
    """
    Return which statements every standby refuses to the role of a primary's connection, which must
    be open.
    """
    dialect = dialect_for(connection)
    if dialect is None:
        return Refusal()
    return dialect.standby_limits(_query_for(connection, state_of(connection)))


def _probe_once(connection: BaseDatabaseWrapper, dialect: Dialect, is_trial: bool) -> ProbeResult:
    endpoint = endpoint_for(connection)
    token = probing.set(True)
    try:
        connection.ensure_connection()
    except CONNECTION_ERRORS as error:
        if not (
            is_trial
            or is_connection_pool_exhausted(error)
            or isinstance(error, BudgetExhausted)
            or _refuses_only_this(connection, dialect, endpoint, error)
        ):
            registry.mark_down(endpoint, Fault.UNREACHABLE, conf.retry_after, error)
        raise
    finally:
        probing.reset(token)
    state = state_of(connection)
    query = _query_for(connection, state)
    try:
        sent_at = time.monotonic()
        server, row = _identify(connection, dialect, state, query)
        report = None
        if server.should_query_position:
            report = _fetch_report(dialect, server, state, query, row, sent_at)
    except ServerUnresponsive:
        if not is_trial:
            mark_unresponsive(state)
        raise
    if not is_trial:
        endpoint.must_reidentify = False
        registry.mark_up(endpoint)
    return ProbeResult(server, report)


def _refuses_only_this(
    connection: BaseDatabaseWrapper, dialect: Dialect, endpoint: Endpoint, error: Exception
) -> bool:
    """
    Return whether a server refuses a connection of the package's own, but has answered a read of
    the site within the last second: it may allow no further connection.
    """
    is_answering = time.monotonic() - endpoint.answered_at < ANSWERS_WITHIN
    is_dedicated = getattr(connection, "is_dedicated", False)
    return is_dedicated and is_answering and dialect.is_from_server(error)


def _query_for(connection: BaseDatabaseWrapper, state: ConnectionState) -> Query:
    raw = connection.connection
    fetch = _fetch_with_libpq if hasattr(raw, "pgconn") else _fetch_with_cursor

    def query(sql: str) -> Row:
        probe_logger.debug("%s: %s", state.alias, sql)
        try:
            with connection.wrap_database_errors, probe_deadline(raw, state):
                return fetch(raw, sql, state)
        except ServerUnresponsive as error:
            # A late reply may still arrive on this connection, so it must not be reused.
            error.ended_modified_session = is_session_modified(connection)
            connection.close()
            raise

    return query


def _fetch_with_cursor(raw: Any, sql: str, state: ConnectionState) -> Row:
    cursor = raw.cursor()
    try:
        cursor.execute(sql)
        return tuple(cursor.fetchone() or ())
    finally:
        cursor.close()
        if getattr(raw, "autocommit", True) is False:
            # Just after a commit, Django turns autocommit on again, which psycopg2 refuses inside
            # the transaction that it has begun for the probe.
            # https://www.psycopg.org/docs/connection.html#connection.autocommit
            raw.rollback()


def _fetch_with_libpq(raw: Any, sql: str, state: ConnectionState) -> Row:
    """
    Return a row, with values as text, through psycopg 3 without a cursor, in half of the time.

    A statement is prepared when the same one runs for the third time on a connection.
    """
    from psycopg import errors, generators, pq

    pgconn = raw.pgconn
    with raw.lock:
        if state.prepared == sql:
            pgconn.send_query_prepared(_PREPARED, [])
        elif state.next_prepared == sql and not state.behind_pooler:
            pgconn.send_prepare(_PREPARED, sql.encode())
            status = raw.wait(generators.execute(pgconn))[-1].status
            # If the name is already taken by the site, never use the prepared statement on this
            # connection.
            state.can_prepare = status == pq.ExecStatus.COMMAND_OK
            state.prepared, state.next_prepared = sql if state.can_prepare else None, None
            pgconn.send_query(sql.encode())
        else:
            is_candidate = state.server is not None and state.prepared is None
            state.next_prepared = sql if is_candidate and state.can_prepare else None
            pgconn.send_query(sql.encode())
        result = raw.wait(generators.execute(pgconn))[-1]
    if result.status != pq.ExecStatus.TUPLES_OK:
        error = errors.error_from_result(result)
        if state.prepared == sql and isinstance(error, errors.InvalidSqlStatementName):
            # The session was reset (DISCARD ALL).
            state.prepared = None
            return _fetch_with_libpq(raw, sql, state)
        raise error
    values = (result.get_value(0, column) for column in range(result.nfields))
    return tuple([None if value is None else value.decode() for value in values])


def _identify(
    connection: BaseDatabaseWrapper, dialect: Dialect, state: ConnectionState, query: Query
) -> tuple[Server, Row]:
    """Return the server, and the row of its report if the same statement fetched both."""
    if state.server is not None and not state.behind_pooler:
        return state.server, ()
    identification, row = _fetch_identity(connection, dialect, state, query)
    identity = identification.identity
    at_server, at_driver = identification.session, driver_session(connection.connection)
    state.behind_pooler = None not in (at_server, at_driver) and at_server != at_driver
    state.endpoint.has_pooler = state.behind_pooler
    # The alias resolved to this server when the connection was opened; it may not any more.
    seen_at = None if state.behind_pooler else state.opened_at
    server = registry.get(identity)
    if server is None:
        system, timeline = state.endpoint.pool, None
        try:
            system = dialect.system(query, identity)
            if identification.lacks_timeline_privilege:
                timeline = dialect.checkpoint_timeline(query)
        except CONNECTION_ERRORS:
            raise
        except DatabaseError as error:
            logger.debug("%s cannot report its system identifier: %s", state.alias, error)
        server = registry.register(state.alias, identity, system, seen_at)
        server.checkpoint_timeline = timeline
    else:
        registry.register(state.alias, identity, server.system, seen_at)
    server.lacks_timeline_privilege = identification.lacks_timeline_privilege
    endpoint = state.endpoint
    if state.behind_pooler and not endpoint.pooler_mixes_servers:
        mixes_servers = len(endpoint.recent_servers) > 1
        if endpoint.splits_reads_and_writes is None:
            _detect_load_balancing(endpoint, dialect, query)
            # Another server may answer the same statement.
            again = _fetch_identity(connection, dialect, state, query)[0].identity
            mixes_servers = mixes_servers or again != identity
        if mixes_servers and not endpoint.pooler_mixes_servers:
            endpoint.pooler_mixes_servers = True
            logger.warning(
                "%s resolves to several servers behind a connection pooler; positions are ignored, "
                "and %s. Give each server an alias of its own.",
                state.alias,
                _without_positions(endpoint),
            )
    state.server = server
    return server, row


def _detect_load_balancing(endpoint: Endpoint, dialect: Dialect, query: Query) -> None:
    try:
        endpoint.splits_reads_and_writes = dialect.balances_reads(query)
    except DatabaseError as error:
        if isinstance(error, CONNECTION_ERRORS):
            raise
        endpoint.splits_reads_and_writes = False
    if endpoint.splits_reads_and_writes:
        endpoint.pooler_mixes_servers = True
        logger.error(
            "%s resolves to pgpool-II with load_balance_mode = on, so any of its servers "
            "may answer a read; positions are ignored. Set load_balance_mode = off.",
            endpoint.alias,
        )


def _fetch_identity(
    connection: BaseDatabaseWrapper, dialect: Dialect, state: ConnectionState, query: Query
) -> tuple[Identification, Row]:
    driver = _driver_of(connection)
    # If the statement of the best strategy is refused, the identity alone may be available.
    for strategy in (next(iter(dialect.strategies(conf.positions)), None), None):
        try:
            return dialect.identify(query, driver, strategy)
        except DatabaseError as error:
            if isinstance(error, CONNECTION_ERRORS) and not dialect.refuses_probe(error):
                raise
            logger.debug("%s cannot report its identity: %s", state.alias, error)
    return Identification(Identity("", driver.host, driver.port)), ()


def _fetch_report(
    dialect: Dialect,
    server: Server,
    state: ConnectionState,
    query: Query,
    row: Row,
    sent_at: float,
) -> Report | None:
    """Return the report of the best strategy that the server supports, None if there is none."""
    strategies = dialect.strategies(conf.positions)
    cause: object = f"PINNING_POSITIONS = {conf.positions!r} is not supported by this database"
    # A row that came with the identity was fetched with the first strategy.
    if not row and server.strategy in strategies:
        strategies = strategies[strategies.index(server.strategy) :]
    for strategy in strategies:
        try:
            if not row:
                sent_at = time.monotonic()
                row = dialect.report(query, server, strategy)
            report = dialect.read(row, server, strategy)
        except PositionUnavailable as error:
            cause = error
            break
        except DatabaseError as error:
            if isinstance(error, CONNECTION_ERRORS) and not dialect.refuses_probe(error):
                raise
            cause = error
        else:
            server.strategy = strategy
            server.record_position_available()
            registry.apply_report(server, report, sent_at)
            return report
    if server.record_position_unavailable(str(cause)):
        if isinstance(cause, DatabaseError) and (
            dialect.error_code(cause) not in dialect.permission_errors
        ):
            logger.warning(
                "%s refuses the probe for its replication position with an unexpected error; %s: "
                "%s",
                state.alias,
                _without_positions(state.endpoint),
                cause,
            )
        else:
            logger.info(
                "%s cannot report a replication position; %s: %s",
                state.alias,
                _without_positions(state.endpoint),
                cause,
            )
    return None


def _without_positions(endpoint: Endpoint) -> str:
    """Return what it means for pins if the servers of an alias report no position."""
    if endpoint.alias == endpoint.pool:
        return "its pins last the full window"
    return "it serves no pinned reads"


def _driver_of(connection: BaseDatabaseWrapper) -> Driver:
    """Return host and port, as the driver or the settings report them, and the server's version."""
    info = getattr(connection.connection, "info", None)
    settings = connection.settings_dict
    host = getattr(info, "host", None) or settings["HOST"] or ""
    port = getattr(info, "port", None) or settings["PORT"] or 0
    # MySQL and MariaDB send their version in the handshake.
    version = getattr(connection.connection, "get_server_info", str)()
    return Driver(str(host), int(port) if str(port).isdigit() else 0, version)


on_change(registry.clear)
