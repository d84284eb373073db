"""
Whether a server still runs a session of this process, determined on a separate connection.

A server that does not answer is detected in this way, and a read that waits for a lock on a
standby: only recovery takes locks that conflict with a read there.
https://www.postgresql.org/docs/current/hot-standby.html#HOT-STANDBY-CONFLICT
"""

from __future__ import annotations

import itertools
import logging
import os
import selectors
import threading
import time
from enum import Enum
from functools import partial
from typing import Any, Final

from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects.postgresql import STARTED
from pinning_middleware.utils.forks import ForkSafeLock
from pinning_middleware.utils.race import first_result

logger = logging.getLogger("pinning_middleware.servers")

# Seconds until another attempt, beside those that have not been answered: a load balancer may
# connect it to the session's server. The second applies if the alias has several servers.
ATTEMPT_INTERVAL, BALANCED_ATTEMPT_INTERVAL = 0.25, 0.1
MAX_ATTEMPTS: Final = 20
# Seconds between two checks of the connection of a read whose server another read checks.
ANSWER_INTERVAL: Final = 0.02
# Seconds by which two measurements of how long a read has been running may differ.
TOLERANCE: Final = 0.3


class SessionStatus(Enum):
    """What is known of a session whose client waits for an answer."""

    RUNNING = "running"
    # It waits for a lock, on a standby.
    WAITS_FOR_LOCK = "waits for a lock"
    # Another server answers, or the same one without this session.
    GONE = "gone"
    # New connections are not answered, but a read is: the connections of a pooler, for example, are
    # all in use.
    READS_ANSWERED = "reads are answered"
    # No server answers.
    UNANSWERED = "unanswered"


def session_query(pid: int) -> str:
    """
    Return a statement for whether a server runs a session of the current database, and whether the
    session waits for a lock that WAL replay holds. Any role may run it.
    """
    return (
        f"SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND datname = "
        f"current_database()), pg_is_in_recovery() AND EXISTS (SELECT 1 FROM pg_locks WHERE "
        f"pid = {pid} AND NOT granted)"
    )


def _waits_behind_pooler(seconds: float) -> str:
    """
    Return an expression for whether a read that has been running for ``seconds`` waits for a lock
    that WAL replay holds. Behind a connection pooler its process ID is unknown; so it is true only
    if all reads of this role that have been running for as long wait for a lock.
    """
    return (
        "pg_is_in_recovery() AND (SELECT coalesce(bool_and(EXISTS (SELECT 1 FROM pg_locks WHERE "
        "pg_locks.pid = session.pid AND NOT granted)), false) FROM pg_stat_activity AS session "
        "WHERE datname = current_database() AND usename = current_user AND state = 'active' AND "
        f"abs(extract(epoch FROM clock_timestamp() - query_start) - {seconds}) < {TOLERANCE} "
        "AND pid <> pg_backend_pid())"
    )


class _OtherServer(Exception):
    """Another server answered, or none accepted the connection."""


class _PoolerAnswered(Exception):
    """A connection pooler answered in the server's place, so that the server does not."""


class _Check:
    def __init__(self) -> None:
        self.began, self.done = time.monotonic(), threading.Event()
        self.status = SessionStatus.UNANSWERED


_lock = ForkSafeLock()
_checks: dict[object, _Check] = {}
# The threads that make them do not exist in a forked process.
os.register_at_fork(after_in_child=_checks.clear)


def check_session(raw: Any, state: ConnectionState, began: float, seconds: float) -> SessionStatus:
    """
    Return the status of the session of a psycopg connection whose read began at that monotonic
    time, by a fresh connection, within ``seconds`` or until the read is answered. Reads that wait
    for the same server share a check of whether it answers; if another one's answer does not apply,
    a second check follows.
    """
    key: object = state.server or (state.endpoint, raw.info.host, raw.info.port)
    if state.may_be_any_server:
        key = raw
    with _lock:
        check = _checks.get(key)
        is_first = check is None
        if check is None:
            check = _checks[key] = _Check()
    if is_first:
        try:
            status = _check_by_new_connection(raw, state, began, seconds)
            check.status = _unless_answered(status, raw, state, check.began)
        finally:
            check.done.set()
            with _lock:
                _checks.pop(key, None)
        return check.status
    until = time.monotonic() + seconds
    while not check.done.wait(ANSWER_INTERVAL) and time.monotonic() < until:
        if _is_answered(raw):
            return SessionStatus.RUNNING
    if check.status not in (SessionStatus.GONE, SessionStatus.WAITS_FOR_LOCK):
        return _unless_answered(check.status, raw, state, check.began)
    # The result applies to the first caller's session only: check this one as well.
    return _check_by_new_connection(raw, state, began, seconds)


def _unless_answered(
    status: SessionStatus, raw: Any, state: ConnectionState, since: float
) -> SessionStatus:
    """Return READS_ANSWERED in place of UNANSWERED if this read, or another, has been answered."""
    if status is SessionStatus.UNANSWERED and (_is_answered(raw) or state.last_answer > since):
        return SessionStatus.READS_ANSWERED
    return status


def _is_answered(raw: Any) -> bool:
    """Return whether the answer to a read has arrived."""
    try:
        return is_ready(raw.fileno())
    except OSError:
        # No file descriptor is left for the selector.
        return False


def _check_by_new_connection(
    raw: Any, state: ConnectionState, began: float, seconds: float
) -> SessionStatus:
    from psycopg import conninfo

    parameters = {
        name: value
        for name, value in raw.info.get_parameters().items()
        if name not in ("load_balance_hosts", "target_session_attrs")
    }
    host = {"host": raw.info.host, "port": raw.info.port, "hostaddr": raw.info.hostaddr or None}
    text = conninfo.make_conninfo(**{**parameters, **host, "password": raw.info.password or None})
    # Later than ``first_result()`` ends, which decides about attempts that are still running.
    until = time.monotonic() + seconds + ATTEMPT_INTERVAL
    attempt = partial(_query_session, text.encode(), raw.info.backend_pid, state, began, until)
    has_several = len(state.endpoint.servers) > 1
    interval = BALANCED_ATTEMPT_INTERVAL if has_several else ATTEMPT_INTERVAL
    try:
        # A load balancer may connect to another server: try again to reach the same one.
        return first_result(
            itertools.repeat(attempt, MAX_ATTEMPTS),
            seconds=seconds,
            interval=interval,
            retry=_OtherServer,
            give_up=lambda: _is_answered(raw),
        )
    except _OtherServer:
        return SessionStatus.GONE
    except (TimeoutError, _PoolerAnswered):
        return SessionStatus.UNANSWERED
    except Exception:
        # An error of this process, such as too many open files, says nothing of the server.
        logger.exception("Could not check whether the server of %s answers.", state.alias)
        return SessionStatus.RUNNING


def _query_session(
    text: bytes, pid: int, state: ConnectionState, began: float, until: float
) -> SessionStatus:
    """
    Return the status of a session, on one fresh connection.

    Raise _OtherServer if another server answers or connecting fails, _PoolerAnswered if a pooler
    answers in the server's place, TimeoutError if nothing answers.
    """
    from psycopg import Error, pq

    started = state.server.identity.started if state.server is not None else ""
    columns = f"{STARTED if started else 'NULL'}, pg_backend_pid()"
    connection = pq.PGconn.connect_start(text)
    try:
        if _finish_connecting(connection, until) != pq.PollingStatus.OK:
            # libpq: in every language, only errors of the server, such as "too many clients", have
            # two blanks after the severity.
            is_of_server = b":  " in connection.error_message
            if not is_of_server:
                raise _OtherServer
            if state.behind_pooler:
                raise _PoolerAnswered
            return SessionStatus.RUNNING
        pooled = _waits_behind_pooler(time.monotonic() - began)
        row = _fetch_row(connection, f"{session_query(pid)}, {columns}, {pooled}", until)
        if not row:
            # It answers with an error, so that it cannot be searched for the session.
            return SessionStatus.RUNNING
        has_session, waits_for_lock = row[0] == "t", row[1] == "t"
        # A pooler reports a process ID of its own at connect.
        if state.behind_pooler or row[3] != str(connection.backend_pid):
            state.endpoint.has_pooler = True
            has_session, waits_for_lock = True, row[4] == "t"
        elif row[2] != started if started else not has_session:
            raise _OtherServer
        if not has_session:
            return SessionStatus.GONE
        return SessionStatus.WAITS_FOR_LOCK if waits_for_lock else SessionStatus.RUNNING
    except Error as error:
        raise _OtherServer from error
    finally:
        connection.finish()


def is_ready(fileno: int, seconds: float = 0.0, is_writing: bool = False) -> bool:
    """Return whether a socket becomes readable, or writable, within ``seconds``."""
    # select.select() does not accept a file descriptor above 1023.
    with selectors.DefaultSelector() as selector:
        selector.register(fileno, selectors.EVENT_WRITE if is_writing else selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _wait(connection: Any, until: float, is_writing: bool = False) -> None:
    left = until - time.monotonic()
    if left <= 0 or not is_ready(connection.socket, left, is_writing):
        raise TimeoutError


def _finish_connecting(connection: Any, until: float) -> Any:
    """Return the final status of a connection attempt; raise TimeoutError if there is none."""
    from psycopg.pq import PollingStatus

    while True:
        status = connection.connect_poll()
        if status in (PollingStatus.OK, PollingStatus.FAILED):
            return status
        _wait(connection, until, status == PollingStatus.WRITING)


def _fetch_row(connection: Any, sql: str, until: float) -> list[str | None]:
    """
    Return one row, empty if the server reported an error.

    Raise TimeoutError if nothing answers, _PoolerAnswered for an error of class 08 (connection):
    PgBouncer sends it while it cannot log in to its server.
    https://www.pgbouncer.org/config.html#server_login_retry
    """
    from psycopg.pq import DiagnosticField

    connection.send_query(sql.encode())
    while connection.is_busy():
        _wait(connection, until)
        connection.consume_input()
    result = connection.get_result()
    if result is None:
        raise _OtherServer
    if not result.ntuples:
        if (result.error_field(DiagnosticField.SQLSTATE) or b"").startswith(b"08"):
            raise _PoolerAnswered
        return []
    values = (result.get_value(0, column) for column in range(result.nfields))
    return [None if value is None else value.decode() for value in values]
