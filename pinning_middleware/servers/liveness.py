"""
Detection of unresponsive servers. A stopped process still accepts TCP connections, so only a
timeout reveals it.

A probe has a deadline. A read of the site has none, since a slow query is not a fault. If a replica
has not answered a read for a second, a fresh connection checks whether the same server still runs
that session, once for all reads that wait for it. If the server does not answer, or no longer runs
the session, the reads fail with an error that lets them fail over; otherwise they go on.

psycopg 3 allows its waits to be watched: ``Connection.wait`` resumes its generator every 0.1 s. For
other drivers a watchdog thread shuts down the socket of an unanswered probe, and reads are limited
by the driver's own option (``read_timeout`` of mysqlclient).
"""

from __future__ import annotations

import _thread
import contextlib
import heapq
import itertools
import os
import selectors
import socket
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, ClassVar

from django.db import OperationalError

from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects.postgresql import STARTED
from pinning_middleware.servers.registry import registry
from pinning_middleware.utils.forks import ForkSafeLock

__all__ = [
    "DEADLINE",
    "FIRST_CHECK_AFTER",
    "ServerUnresponsive",
    "clear_deadline",
    "is_ready",
    "start_deadline",
    "watch_waits",
    "watched_wait",
]

# Maximum seconds for a probe.
DEADLINE = 1.0
# Seconds without an answer until a read's server is checked, and until it is checked again.
FIRST_CHECK_AFTER = 1.0
NEXT_CHECK_AFTER = 5.0
# Maximum attempts to reach the same server again through a load balancer.
MAX_ATTEMPTS = 20


class ServerUnresponsive(OperationalError):
    """A server did not answer in time."""


class ServerGone(OperationalError):
    """
    The server process went away without closing the connection; another may have taken its address.
    """

    # Classified as a lost connection.
    sqlstate = "08006"


def watched_wait(wait: Any) -> Any:
    """Replace ``wait()`` of psycopg's connections, to watch those that ``watch_waits()`` names."""

    def watched(self: Any, generator: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get("pinning_watched")
        if state is not None:
            generator = _watch_wait(generator, self, state)
        return wait(self, generator, *args, **kwargs)

    return watched


def watch_waits(raw: Any, state: ConnectionState) -> None:
    """Watch the waits of a driver connection, if the driver is psycopg 3."""
    raw = _driver_connection(raw)
    if hasattr(getattr(raw, "wait", None), "pinning_original"):
        raw.pinning_watched = state
        state.is_watched = True


def _driver_connection(raw: Any) -> Any:
    """
    Return the connection behind a proxy: of SQLAlchemy's pools, or of an agent that uses wrapt.

    https://docs.sqlalchemy.org/en/20/core/connections.html#working-with-the-dbapi-cursor-directly
    https://wrapt.readthedocs.io/en/master/wrappers.html#object-proxy
    """
    for attribute in ("driver_connection", "__wrapped__"):
        raw = getattr(raw, attribute, None) or raw
    return raw


def _watch_wait(
    generator: Generator[Any, Any, Any], raw: Any, state: ConnectionState
) -> Generator[Any, Any, Any]:
    try:
        wanted = next(generator)
        since, check_after = 0.0, FIRST_CHECK_AFTER
        was_unresponsive = _is_marked_unresponsive(state)
        while True:
            ready = yield wanted
            if ready:
                since, check_after = 0.0, FIRST_CHECK_AFTER
            else:
                now = time.monotonic()
                since = since or now
                if state.deadline is not None:
                    if now >= state.deadline:
                        raise ServerUnresponsive(
                            f"{state.alias} did not answer within {DEADLINE} s"
                        )
                elif state.may_fail_over:
                    # It may have recovered, so a read that began after it was marked, inside
                    # no_failover() for example, is not interrupted.
                    is_unresponsive = _is_marked_unresponsive(state)
                    if is_unresponsive and not was_unresponsive:
                        raise ServerUnresponsive(f"{state.alias} does not answer")
                    was_unresponsive = is_unresponsive
                    if now - since >= check_after:
                        is_alive = _check_shared(raw, state)
                        if is_alive is None:
                            raise ServerGone(f"{state.alias} no longer runs this session")
                        if not is_alive:
                            _mark_unresponsive(state)
                            raise ServerUnresponsive(f"{state.alias} does not answer")
                        since, check_after = time.monotonic(), NEXT_CHECK_AFTER
            wanted = generator.send(ready)
    except StopIteration as stop:
        return stop.value


def _is_marked_unresponsive(state: ConnectionState) -> bool:
    server = state.server
    return state.endpoint.out_of_rotation == Fault.UNRESPONSIVE or (
        server is not None and server.out_of_rotation == Fault.UNRESPONSIVE
    )


def _mark_unresponsive(state: ConnectionState) -> None:
    """Take the server out of rotation, or the endpoint if the server is unknown."""
    error = "it does not answer"
    if state.server is not None:
        registry.set_status(state.server, Fault.UNRESPONSIVE, conf.retry_after, error)
    else:
        registry.mark_down(state.endpoint, Fault.UNRESPONSIVE, conf.retry_after, error)


def start_deadline(raw: Any, state: ConnectionState) -> _Guard | None:
    """
    Start the probe deadline on this connection; ``clear_deadline(state, guard)`` clears it. Return
    the guard to pass on.
    """
    state.deadline = time.monotonic() + DEADLINE
    return None if state.is_watched else _watchdog.guard(raw, state.deadline)


def clear_deadline(state: ConnectionState, guard: _Guard | None) -> None:
    state.deadline = None
    if guard is not None:
        guard.done = True


# The check on a fresh connection


class _Check:
    __slots__ = ("done", "is_alive")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.is_alive: bool | None = True


_lock = ForkSafeLock()
_checks: dict[object, _Check] = {}


def _check_shared(raw: Any, state: ConnectionState) -> bool | None:
    """
    Return what ``_check_session_alive`` returns, run once for all reads that wait for a server.
    """
    key: object = state.server or state.endpoint
    with _lock:
        check = _checks.get(key)
        is_first = check is None
        if check is None:
            check = _checks[key] = _Check()
    if not is_first:
        check.done.wait(DEADLINE + 0.5)
        # The session of the first read has ended, but that of this read may still run.
        return _check_session_alive(raw, state) if check.is_alive is None else check.is_alive
    try:
        check.is_alive = _check_session_alive(raw, state)
    finally:
        check.done.set()
        with _lock:
            _checks.pop(key, None)
    return check.is_alive


def _check_session_alive(raw: Any, state: ConnectionState) -> bool | None:
    """
    Return whether the server of a connection answers, within the deadline, on a fresh connection.

    Return None if the server that answers does not run this session, or is another one.
    """
    from psycopg import Error, conninfo, pq

    parameters = {
        name: value
        for name, value in raw.info.get_parameters().items()
        if name not in ("load_balance_hosts", "target_session_attrs")
    }
    host = {"host": raw.info.host, "port": raw.info.port, "hostaddr": raw.info.hostaddr or None}
    text = conninfo.make_conninfo(**{**parameters, **host, "password": raw.info.password or None})
    started = state.server.identity.started if state.server is not None else ""
    sql = (
        f"SELECT {STARTED if started else 'NULL'}, pg_backend_pid(), EXISTS (SELECT 1 FROM "
        f"pg_stat_activity WHERE pid = {raw.info.backend_pid} AND datname = current_database())"
    )
    until = time.monotonic() + DEADLINE
    found: bool | None = False
    # A load balancer may connect to another server: retry for a while to get the same one.
    for _ in range(MAX_ATTEMPTS):
        connection = pq.PGconn.connect_start(text.encode())
        try:
            status = _finish_connecting(connection, until)
            if status == pq.PollingStatus.OK:
                row = _fetch_row(connection, sql, until)
                # A pooler reports a process ID of its own at connect.
                behind_pooler = state.behind_pooler or (
                    row and row[1] != str(connection.backend_pid)
                )
                if row is None:
                    return False
                if not row or behind_pooler:
                    # It answers, but the session cannot be checked.
                    return True
                has_session = row[2] == "t"
                if row[0] == started if started else has_session:
                    return has_session or None
                found = None
            elif status is None:
                return False
            elif b":  " in connection.error_message:
                # An error of the server ("too many clients"), not of the network: in every
                # language, only these have two blanks after the severity.
                return True
        except Error:
            pass
        finally:
            connection.finish()
        if time.monotonic() > until - DEADLINE / 2:
            break
    return found


def is_ready(number: int, seconds: float, is_writing: bool = False) -> bool:
    """Return whether a socket becomes readable, or writable, within so many seconds."""
    # select.select() does not accept a file descriptor above 1023.
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_WRITE if is_writing else selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _finish_connecting(connection: Any, until: float) -> Any:
    """Return the final status of a connection attempt (an int), or None if it timed out."""
    from psycopg.pq import PollingStatus

    while True:
        status = connection.connect_poll()
        if status in (PollingStatus.OK, PollingStatus.FAILED):
            return status
        left = until - time.monotonic()
        is_writing = status == PollingStatus.WRITING
        if left <= 0 or not is_ready(connection.socket, left, is_writing):
            return None


def _fetch_row(connection: Any, sql: str, until: float) -> list[str | None] | None:
    """Return one row, empty if the statement failed, or None if it timed out."""
    connection.send_query(sql.encode())
    while connection.is_busy():
        left = until - time.monotonic()
        if left <= 0 or not is_ready(connection.socket, left):
            return None
        connection.consume_input()
    result = connection.get_result()
    if result is None or not result.ntuples:
        return []
    values = (result.get_value(0, column) for column in range(result.nfields))
    return [None if value is None else value.decode() for value in values]


# For drivers whose waits cannot be watched


class _Guard:
    __slots__ = ("done", "socket")

    def __init__(self, number: int) -> None:
        self.socket = socket.socket(fileno=os.dup(number))
        self.done = False


class _Watchdog:
    """A lazily started thread that shuts down the sockets of probes that miss their deadline."""

    _order: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._guards: list[tuple[float, int, _Guard]] = []
        self._is_running = False

    def guard(self, raw: Any, until: float) -> _Guard | None:
        fileno = getattr(raw, "fileno", None)
        if fileno is None:
            return None
        guard = _Guard(fileno())
        with self._condition:
            heapq.heappush(self._guards, (until, next(self._order), guard))
            if not self._is_running:
                self._is_running = True
                _thread.start_new_thread(self._run, ())
        return guard

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._guards:
                    self._is_running = False
                    return
                until, _, guard = self._guards[0]
                left = until - time.monotonic()
                if left > 0 and not guard.done:
                    self._condition.wait(min(left, 0.1))
                    continue
                heapq.heappop(self._guards)
            with contextlib.suppress(OSError):
                if not guard.done:
                    guard.socket.shutdown(socket.SHUT_RDWR)
            guard.socket.close()


_watchdog = _Watchdog()


def _reset_after_fork() -> None:
    global _watchdog
    _watchdog = _Watchdog()
    _checks.clear()


os.register_at_fork(after_in_child=_reset_after_fork)
