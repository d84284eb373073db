"""
Servers that say nothing. One that is stopped accepts connections and acknowledges packets, so
only a clock tells.

A question of ours has a deadline. A read of the site has none, since a slow query is no fault: when
a replica has not answered it for a second, the same server is asked on a fresh connection, once for
all who wait, whether it has our session. Silence there ends the reads that wait for it, and so does
an answer of one that has not; else they are left alone.

psycopg 3 lets its waiting be watched: ``Connection.wait`` comes back every tenth of a second, and
its generator is told so. Other drivers can't; a question there is ended by a watchdog that shuts
the socket down, and a read by the driver's own option (``read_timeout`` of mysqlclient).
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
import weakref
from collections.abc import Generator, Iterator
from typing import Any, ClassVar

from django.db import OperationalError

from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects.postgresql import STARTED
from pinning_middleware.servers.registry import registry

__all__ = [
    "DEADLINE",
    "FIRST_CHECK_AFTER",
    "ServerUnresponsive",
    "clear_deadline",
    "is_ready",
    "start_deadline",
    "watch_waits",
]

# Seconds: for a question of ours; before a read that is not answered is looked into, and again.
DEADLINE = 1.0
FIRST_CHECK_AFTER = 1.0
NEXT_CHECK_AFTER = 5.0
# How often a fresh connection may lead to another server than the one that is waited for.
TRIES = 20


class ServerUnresponsive(OperationalError):
    """A server did not answer in time."""


class ServerGone(OperationalError):
    """What is at the other end has ended without a farewell; another one may be there now."""

    # A lost connection, to whoever looks.
    sqlstate = "08006"


def watch_waits(raw: Any, link: ConnectionState) -> None:
    """Watch the waiting of a driver's connection, where the driver allows it."""
    wait = getattr(type(raw), "wait", None)
    if wait is None or not hasattr(raw, "pgconn"):
        return

    # No circle of a connection and its own method: it is to be collected at once.
    known = weakref.ref(raw)

    def watched(generator: Any, *args: Any, **kwargs: Any) -> Any:
        me = known()
        return wait(me, _watch_wait(generator, me, link), *args, **kwargs)

    raw.wait = watched
    link.is_watched = True


def _watch_wait(
    generator: Generator[Any, Any, Any], raw: Any, link: ConnectionState
) -> Generator[Any, Any, Any]:
    try:
        wanted = next(generator)
        since, patience = 0.0, FIRST_CHECK_AFTER
        was_out = _is_out(link)
        while True:
            ready = yield wanted
            if ready:
                since, patience = 0.0, FIRST_CHECK_AFTER
            else:
                now = time.monotonic()
                since = since or now
                if link.deadline:
                    if now >= link.deadline:
                        raise ServerUnresponsive(f"{link.alias} did not answer within {DEADLINE} s")
                elif link.may_fail_over:
                    # It may answer again to whoever asks it all the same.
                    is_out = _is_out(link)
                    if is_out and not was_out:
                        raise ServerUnresponsive(f"{link.alias} does not answer")
                    was_out = is_out
                    if now - since >= patience:
                        answers = _check_shared(raw, link)
                        if answers is None:
                            raise ServerGone(f"{link.alias} does not know this connection any more")
                        if not answers:
                            _mark_unresponsive(link)
                            raise ServerUnresponsive(f"{link.alias} does not answer")
                        since, patience = time.monotonic(), NEXT_CHECK_AFTER
            wanted = generator.send(ready)
    except StopIteration as stop:
        return stop.value


def _is_out(link: ConnectionState) -> bool:
    """Return whether what a connection leads to is known to be silent."""
    server = link.server
    return link.endpoint.out_of_rotation == Fault.UNRESPONSIVE or (
        server is not None and server.out_of_rotation == Fault.UNRESPONSIVE
    )


def _mark_unresponsive(link: ConnectionState) -> None:
    """Take what does not answer out: the server where it is known, else what leads to it."""
    if link.server is not None:
        registry.set_status(link.server, Fault.UNRESPONSIVE, conf.retry_after, "it does not answer")
    else:
        registry.mark_down(
            link.endpoint, Fault.UNRESPONSIVE, conf.retry_after, "it does not answer"
        )


def start_deadline(raw: Any, link: ConnectionState) -> _Guard | None:
    """Let a question over this connection end within the deadline; ``end`` says that it has."""
    link.deadline = time.monotonic() + DEADLINE
    return None if link.is_watched else _watchdog.guard(raw, link.deadline)


def clear_deadline(link: ConnectionState, guard: _Guard | None) -> None:
    link.deadline = 0.0
    if guard is not None:
        guard.done = True


# A fresh connection to the same server


class _Check:
    __slots__ = ("answers", "over")

    def __init__(self) -> None:
        self.over = threading.Event()
        self.answers: bool | None = True


_lock = threading.Lock()
_checks: dict[object, _Check] = {}


def _check_shared(raw: Any, link: ConnectionState) -> bool | None:
    """
    Return whether a server answers on a fresh connection; asked once for all who wait. ``None``:
    what answers there does not know this session.
    """
    key: object = link.server or link.endpoint
    with _lock:
        check = _checks.get(key)
        mine = check is None
        if check is None:
            check = _checks[key] = _Check()
    if not mine:
        check.over.wait(DEADLINE + 0.5)
        # That another one's session is not known says nothing of this one's.
        return _check_session_alive(raw, link) if check.answers is None else check.answers
    try:
        check.answers = _check_session_alive(raw, link)
    finally:
        check.over.set()
        with _lock:
            _checks.pop(key, None)
    return check.answers


def _check_session_alive(raw: Any, link: ConnectionState) -> bool | None:
    """
    Return whether the server of a connection is there: it says within the deadline that it has
    this session. ``None``: what answers has not, or is another server.
    """
    from psycopg import Error, conninfo, pq

    known = {
        name: value
        for name, value in raw.info.get_parameters().items()
        if name not in ("load_balance_hosts", "target_session_attrs")
    }
    where = {"host": raw.info.host, "port": raw.info.port, "hostaddr": raw.info.hostaddr or None}
    text = conninfo.make_conninfo(**{**known, **where, "password": raw.info.password or None})
    started = link.server.identity.started if link.server is not None else ""
    sql = (
        f"SELECT {STARTED if started else 'NULL'}, pg_backend_pid(), EXISTS (SELECT 1 FROM "
        f"pg_stat_activity WHERE pid = {raw.info.backend_pid} AND datname = current_database())"
    )
    until = time.monotonic() + DEADLINE
    found: bool | None = False
    # Behind a balancer another server may answer: ask until it is the same, for a while.
    for _ in range(TRIES):
        connection = pq.PGconn.connect_start(text.encode())
        try:
            verdict = _poll(connection, until)
            if verdict == pq.PollingStatus.OK:
                row = _ask(connection, sql, until)
                # A pooler makes up the id of the session that it offers.
                behind_pooler = link.behind_pooler or (
                    row and row[1] != str(connection.backend_pid)
                )
                if row is None:
                    return False
                if not row or behind_pooler:
                    # It answers, and can't tell more.
                    return True
                has_session = row[2] == "t"
                if row[0] == started if started else has_session:
                    return has_session or None
                found = None
            elif verdict is None:
                return False
            elif b":  " in connection.error_message:
                # Not the network's error but the server's own ("too many clients"): in every
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
    """Return whether a socket can be read from, or written to, within so many seconds."""
    # Not `select.select`, which takes no number above 1023.
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_WRITE if is_writing else selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _poll(connection: Any, until: float) -> Any:
    """Return how an attempt to connect ended (a plain int), ``None``: not in time."""
    from psycopg.pq import PollingStatus

    while True:
        status = connection.connect_poll()
        if status in (PollingStatus.OK, PollingStatus.FAILED):
            return status
        left = until - time.monotonic()
        is_writing = status == PollingStatus.WRITING
        if left <= 0 or not is_ready(connection.socket, left, is_writing):
            return None


def _ask(connection: Any, sql: str, until: float) -> list[str | None] | None:
    """Return one row, empty where that was refused; ``None``: not in time."""
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


# For drivers that wait by themselves


class _Guard:
    __slots__ = ("done", "socket")

    def __init__(self, number: int) -> None:
        self.socket = socket.socket(fileno=os.dup(number))
        self.done = False


class _Watchdog:
    """One lazy thread that shuts down the sockets of questions that were not answered in time."""

    _order: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._guards: list[tuple[float, int, _Guard]] = []
        self._is_running = False

    def guard(self, raw: Any, until: float) -> _Guard | None:
        fileno = getattr(raw, "fileno", None)
        if fileno is None:
            return None
        guard = _Guard(fileno())
        with self._changed:
            heapq.heappush(self._guards, (until, next(self._order), guard))
            if not self._is_running:
                self._is_running = True
                _thread.start_new_thread(self._run, ())
        return guard

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._guards:
                    self._is_running = False
                    return
                until, _, guard = self._guards[0]
                left = until - time.monotonic()
                if left > 0 and not guard.done:
                    self._changed.wait(min(left, 0.1))
                    continue
                heapq.heappop(self._guards)
            with contextlib.suppress(OSError):
                if not guard.done:
                    guard.socket.shutdown(socket.SHUT_RDWR)
            guard.socket.close()


_watchdog = _Watchdog()


def _forget() -> None:
    global _watchdog, _lock
    _lock, _watchdog = threading.Lock(), _Watchdog()
    _checks.clear()


os.register_at_fork(after_in_child=_forget)
