"""
Reads of drivers whose waits cannot be watched: mysqlclient and psycopg2 block until they have an
answer.

A thread looks at such reads from outside. If one has not been answered for a moment, its server is
probed over a fresh connection. If the server does not answer that either, it is marked, and the
sockets of its reads are shut down: the driver then reports a lost connection, and the read fails
over. A server that answers is left alone, since its query is slow.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import socket
import threading
import time
from functools import partial
from typing import Any

from pinning_middleware.servers.budget import read_budget
from pinning_middleware.servers.connect import dedicated_connection
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.liveness import (
    DEADLINE,
    FIRST_CHECK_AFTER,
    NEXT_CHECK_AFTER,
    WAIT_INTERVAL,
    driver_connection,
    mark_unresponsive,
)
from pinning_middleware.servers.probe import CONNECTION_ERRORS, probe, without_failover
from pinning_middleware.utils.race import first_result

__all__ = ["BlockedRead", "is_answering", "watch_read"]


class BlockedRead:
    """A read that runs, until ``end()`` is called."""

    __slots__ = ("check_at", "fileno", "last_seen", "state", "was_given_up")

    def __init__(self, state: ConnectionState, fileno: int) -> None:
        self.state, self.fileno = state, fileno
        # When it began, or when its server last answered a probe (monotonic time).
        self.last_seen = time.monotonic()
        self.check_at = self.last_seen + FIRST_CHECK_AFTER
        self.was_given_up = False

    @property
    def server(self) -> object:
        """Its server, or the endpoint if that is unknown."""
        return self.state.server or self.state.endpoint

    def end(self) -> None:
        """Stop looking at the read."""
        _watcher.remove(self)
        if self.was_given_up:
            read_budget.spend(time.monotonic() - self.last_seen)

    def give_up(self) -> None:
        """
        Shut down the socket. The caller makes sure that the read still runs, so that its file
        descriptor is that of the socket.
        """
        self.was_given_up = True
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.fileno)) as own:
            own.shutdown(socket.SHUT_RDWR)


class _Watcher:
    """The thread that looks at reads. The first one starts it; it sleeps while there are none."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._reads: set[BlockedRead] = set()
        self._is_running = False
        # What is being probed.
        self._probed: set[object] = set()

    def add(self, read: BlockedRead) -> None:
        with self._condition:
            self._reads.add(read)
            if not self._is_running:
                self._is_running = True
                _thread.start_new_thread(self._run, ())
            elif len(self._reads) == 1:
                self._condition.notify()

    def remove(self, read: BlockedRead) -> None:
        with self._condition:
            self._reads.discard(read)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait(WAIT_INTERVAL if self._reads else None)
                now = time.monotonic()
                due = {read.server: read for read in self._reads if read.check_at <= now}
                due = {server: read for server, read in due.items() if server not in self._probed}
                self._probed.update(due)
            for server, read in due.items():
                _thread.start_new_thread(self._check, (server, read.state))

    def _check(self, server: object, state: ConnectionState) -> None:
        began = time.monotonic()
        answering = is_answering(state, DEADLINE)
        if answering is False:
            mark_unresponsive(state)
        with self._condition:
            self._probed.discard(server)
            for read in self._reads:
                if read.server is not server or read.last_seen > began:
                    continue
                if answering is False:
                    read.give_up()
                else:
                    read.last_seen, read.check_at = began, began + NEXT_CHECK_AFTER


def is_answering(state: ConnectionState, seconds: float) -> bool | None:
    """
    Return whether the server of a connection answers on a fresh one within so many seconds; None if
    another server behind the alias did.
    """
    attempt = partial(_probe_afresh, state)
    try:
        return first_result((attempt,), seconds=seconds, interval=seconds)
    except TimeoutError:
        return False


def _probe_afresh(state: ConnectionState) -> bool | None:
    with contextlib.closing(dedicated_connection(state.alias)) as fresh, without_failover():
        try:
            result = probe(fresh, is_trial=True)
            if result is None:
                # Positions are disabled.
                fresh.ensure_connection()
                return fresh.is_usable()
        except CONNECTION_ERRORS:
            return False
        return True if state.server in (None, result.server) else None


_watcher = _Watcher()


def watch_read(raw: Any, state: ConnectionState) -> BlockedRead | None:
    """
    Look at a read that begins on this driver connection; None if its waits are watched, or if the
    driver does not name its socket.
    """
    if state.is_watched:
        return None
    fileno = getattr(driver_connection(raw), "fileno", None)
    if fileno is None:
        return None
    # mysqlclient allows this only while the connection is idle.
    read = BlockedRead(state, fileno())
    _watcher.add(read)
    return read


def _reset_after_fork() -> None:
    global _watcher
    _watcher = _Watcher()


os.register_at_fork(after_in_child=_reset_after_fork)
