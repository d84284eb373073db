"""
What is asked, of one server and within a deadline: who it is, and how far.

A question runs on the driver's connection, past Django's cursors: it is no statement of the site,
so it stands in no log of queries and in no count of a test. Nobody fails over while one is asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import DatabaseError, InterfaceError, OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf, on_change
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects import (
    Dialect,
    Identification,
    PositionUnavailable,
    Query,
    Row,
    dialect_for,
)
from pinning_middleware.servers.liveness import (
    ServerUnresponsive,
    clear_deadline,
    start_deadline,
    watch_waits,
)
from pinning_middleware.servers.registry import Endpoint, Identity, Report, Server, registry

__all__ = [
    "CONNECTION_ERRORS",
    "ProbeResult",
    "endpoint_for",
    "failover_disabled",
    "probe",
    "probing",
    "probing_allowed",
    "state_of",
    "without_failover",
]

logger = logging.getLogger("pinning_middleware.servers")

# Each question, at the level DEBUG: they stand in no other log.
probe_logger = logging.getLogger("pinning_middleware.questions")

CONNECTION_ERRORS = (OperationalError, InterfaceError)
# The name of the one statement that is prepared on a connection.
_PREPARED = b"pinning_position"

# Set while a question is asked of one node.
failover_disabled: ContextVar[bool] = ContextVar("pinning_asking", default=False)
# Set while a question of ours connects, which is not to wait for as long as the site may.
probing: ContextVar[bool] = ContextVar("pinning_hurried", default=False)

_links: WeakKeyDictionary[Any, ConnectionState] = WeakKeyDictionary()


@contextmanager
def without_failover() -> Iterator[None]:
    """Let nobody stand in for a node that is talked to inside the block."""
    previous = failover_disabled.get()
    failover_disabled.set(True)
    try:
        yield
    finally:
        failover_disabled.set(previous)


def probing_allowed(connection: BaseDatabaseWrapper) -> bool:
    """
    Return whether this is a place for questions. An event loop's thread is not, nor is a test
    that forbids queries, nor an open transaction, in which rows stay as they were.
    """
    if connection.in_atomic_block or hasattr(connection.connect, "wrapped"):
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def endpoint_for(connection: BaseDatabaseWrapper) -> Endpoint:
    """Return what is known of where this connection's alias leads."""
    return registry.endpoint(connection.alias, conf.primary_of.get(connection.alias, ""))


def state_of(connection: BaseDatabaseWrapper, raw: Any = None) -> ConnectionState:
    """Return what is known of the connection that is open now, or of the one just made."""
    raw = connection.connection if raw is None else raw
    kept = connection.__dict__.get("_pinning_link")
    if kept is not None and kept[0] is raw and kept[1].endpoint.is_current:
        return kept[1]  # type: ignore[no-any-return]
    link = _links.get(raw)
    if link is None or not link.endpoint.is_current:
        endpoint = endpoint_for(connection)
        is_ours = "_pinning_private" in connection.__dict__
        fresh = ConnectionState(endpoint, is_ours or endpoint.alias != endpoint.pool, raw)
        if link is not None:
            fresh.session_modified = link.session_modified
        watch_waits(raw, fresh)
        link = _links[raw] = fresh
    link.session_modified_at_checkout = link.session_modified
    connection.__dict__["_pinning_link"] = (raw, link)
    return link


class ProbeResult(NamedTuple):
    """Which server answered, and what it said; ``None`` from one that can't tell."""

    server: Server
    report: Report | None


def probe(connection: BaseDatabaseWrapper, is_trial: bool = False) -> ProbeResult | None:
    """
    Query how far the server of this connection is, and who it is where that is not known. ``None``
    where this is no place to ask, or the database has no positions.

    Raises ``OperationalError`` and ``InterfaceError`` where it can't be reached, or did not answer
    within the deadline: that is then known of it. A trial of one that is out neither takes it back
    nor puts off its retry.
    """
    dialect = dialect_for(connection)
    if dialect is None or not conf.positions or not probing_allowed(connection):
        return None
    before = failover_disabled.get()
    failover_disabled.set(True)
    try:
        return _probe_once(connection, dialect, is_trial)
    except CONNECTION_ERRORS as error:
        is_made = connection.connection is not None
        if not is_made or isinstance(error, ServerUnresponsive) or connection.is_usable():
            raise
        # It was lost while nobody looked, or cut off at once.
        connection.close()
        return _probe_once(connection, dialect, is_trial)
    finally:
        failover_disabled.set(before)


def _probe_once(connection: BaseDatabaseWrapper, dialect: Dialect, is_trial: bool) -> ProbeResult:
    endpoint = endpoint_for(connection)
    token = probing.set(True)
    try:
        connection.ensure_connection()
    except CONNECTION_ERRORS as error:
        if not is_trial:
            registry.mark_down(endpoint, Fault.UNREACHABLE, conf.retry_after, error)
        raise
    finally:
        probing.reset(token)
    link = state_of(connection)
    ask = _asker(connection, link)
    try:
        asked_at = time.monotonic()
        server, row = _identify(connection, dialect, link, ask)
        report = None
        if server.reports_position is not False:
            report = _report(dialect, server, link, ask, row, asked_at)
    except ServerUnresponsive as error:
        if is_trial:
            pass
        elif link.server is not None:
            registry.set_status(link.server, Fault.UNRESPONSIVE, conf.retry_after, error)
        else:
            registry.mark_down(endpoint, Fault.UNRESPONSIVE, conf.retry_after, error)
        # What was asked may still be answered: nobody is to take that for another answer.
        connection.close()
        raise
    if not is_trial:
        endpoint.must_reidentify = False
        registry.mark_up(endpoint)
    return ProbeResult(server, report)


def _asker(connection: BaseDatabaseWrapper, link: ConnectionState) -> Query:
    raw = connection.connection
    fetch = _by_protocol if hasattr(raw, "pgconn") else _by_cursor

    def ask(sql: str) -> tuple[Any, ...]:
        probe_logger.debug("%s: %s", link.alias, sql)
        guard = start_deadline(raw, link)
        try:
            with connection.wrap_database_errors:
                return fetch(raw, sql, link)
        finally:
            clear_deadline(link, guard)

    return ask


def _by_cursor(raw: Any, sql: str, link: ConnectionState) -> Row:
    cursor = raw.cursor()
    try:
        cursor.execute(sql)
        return tuple(cursor.fetchone() or ())
    finally:
        cursor.close()


def _by_protocol(raw: Any, sql: str, link: ConnectionState) -> Row:
    """
    Query over psycopg 3 without a cursor, which takes half of the time; values are text. What is
    asked a third time on a connection is prepared there.
    """
    from psycopg import errors, generators, pq

    pgconn = raw.pgconn
    with raw.lock:
        if link.prepared == sql:
            pgconn.send_query_prepared(_PREPARED, [])
        elif link.next_prepared == sql and not link.behind_pooler:
            pgconn.send_prepare(_PREPARED, sql.encode())
            is_done = raw.wait(generators.execute(pgconn))[-1].status == pq.ExecStatus.COMMAND_OK
            # What the site itself prepared in that name is not ours: then never.
            link.prepared, link.next_prepared = sql if is_done else "", ""
            pgconn.send_query(sql.encode())
        else:
            link.next_prepared = sql if link.server is not None and link.prepared is None else ""
            pgconn.send_query(sql.encode())
        result = raw.wait(generators.execute(pgconn))[-1]
    if result.status != pq.ExecStatus.TUPLES_OK:
        error = errors.error_from_result(result)
        if link.prepared == sql and isinstance(error, errors.InvalidSqlStatementName):
            # Somebody has reset the session (DISCARD ALL).
            link.prepared = None
            return _by_protocol(raw, sql, link)
        raise error
    values = (result.get_value(0, column) for column in range(result.nfields))
    return tuple([None if value is None else value.decode() for value in values])


def _identify(
    connection: BaseDatabaseWrapper, dialect: Dialect, link: ConnectionState, ask: Query
) -> tuple[Server, Row]:
    """Return the server, and what it said of itself where one statement asked both."""
    if link.server is not None and not link.behind_pooler:
        return link.server, ()
    who, row = _introduce(connection, dialect, link, ask)
    server = registry.get(who.identity)
    if server is None:
        system, followed = link.endpoint.pool, ""
        try:
            system = dialect.system(ask, who.identity)
            if who.lacks_timeline_privilege:
                followed = dialect.checkpoint_timeline(ask)
        except CONNECTION_ERRORS:
            raise
        except DatabaseError as error:
            logger.debug("%s does not say what it belongs to: %s", link.alias, error)
        server = registry.register(link.alias, who.identity, system)
        server.checkpoint_timeline = followed
    else:
        registry.register(link.alias, who.identity, server.system)
    server.lacks_timeline_privilege = who.lacks_timeline_privilege
    own = _session_of(connection)
    link.behind_pooler = who.session is not None and own is not None and who.session != own
    if (
        link.behind_pooler
        and len(link.endpoint.recent_servers) > 1
        and not link.endpoint.pooler_mixes_servers
    ):
        link.endpoint.pooler_mixes_servers = True
        logger.warning(
            "%s leads to several servers behind a pooler: the window serves for it.", link.alias
        )
    link.server = server
    return server, row


def _introduce(
    connection: BaseDatabaseWrapper, dialect: Dialect, link: ConnectionState, ask: Query
) -> tuple[Identification, Row]:
    where = _where(connection)
    # The best way first; one that is refused leaves at least the name.
    for way in (next(iter(dialect.strategies(conf.positions)), None), None):
        try:
            return dialect.identify(ask, where, way)
        except CONNECTION_ERRORS as error:
            if dialect.error_code(error) not in dialect.permission_errors:
                raise
        except DatabaseError as error:
            logger.debug("%s does not say which server it is: %s", link.alias, error)
    return Identification(Identity("", *where)), ()


def _report(
    dialect: Dialect, server: Server, link: ConnectionState, ask: Query, row: Row, asked_at: float
) -> Report | None:
    ways = dialect.strategies(conf.positions)
    why: object = f"PINNING_POSITIONS = {conf.positions!r} is no way of this database"
    # What came with the name came by the first way.
    for way in (
        ways if row else ways[ways.index(server.strategy) if server.strategy in ways else 0 :]
    ):
        try:
            if not row:
                asked_at = time.monotonic()
                row = dialect.report(ask, server, way)
            report = dialect.read(row, server, way)
        except PositionUnavailable as error:
            why = error
            break
        except DatabaseError as error:
            if dialect.error_code(error) not in dialect.permission_errors:
                raise
            why = error
        else:
            server.strategy, server.reports_position = way, True
            registry.apply_report(server, report, asked_at)
            return report
    server.reports_position = False
    logger.info("%s does not tell how far it is, the window serves: %s", link.alias, why)
    return None


def _where(connection: BaseDatabaseWrapper) -> tuple[str, int]:
    """Return the host and port that the driver, or the settings, know."""
    info = getattr(connection.connection, "info", None)
    settings = connection.settings_dict
    host = getattr(info, "host", None) or settings["HOST"] or ""
    port = getattr(info, "port", None) or settings["PORT"] or 0
    return str(host), int(port) if str(port).isdigit() else 0


def _session_of(connection: BaseDatabaseWrapper) -> int | None:
    """Return the id of the session as the driver knows it: a pooler makes one up."""
    raw = connection.connection
    info = getattr(raw, "info", None)
    known = getattr(info, "backend_pid", None)
    if known is None and hasattr(raw, "thread_id"):
        known = raw.thread_id()
    return known


on_change(registry.clear)
