"""
Detection of unresponsive servers for drivers that block until they have an answer, as mysqlclient
and psycopg2 do.

A background thread tracks running reads. If one has had no answer for FIRST_CHECK_AFTER seconds,
its server is probed over a new connection. If the server does not answer that either, it is taken
out of rotation, and the sockets of its reads are shut down: the driver then reports a lost
connection, and the read fails over. If the server answers, its query is slow, and goes on.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import logging
import os
import socket
import threading
import time
from enum import Enum
from functools import partial
from typing import Any, Final

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.connect import ConnectTimeout, dedicated_connection
from pinning_middleware.servers.connection_state import ConnectionState, driver_session
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.liveness import (
    DEADLINE,
    FIRST_CHECK_AFTER,
    NEXT_CHECK_AFTER,
    WAIT_INTERVAL,
    ServerUnresponsive,
    driver_connection,
    mark_unresponsive,
)
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    fetch,
    probe,
    without_failover,
)
from pinning_middleware.servers.session_check import ATTEMPT_INTERVAL
from pinning_middleware.utils.race import first_result

logger = logging.getLogger("pinning_middleware.servers")

# Seconds for a probe that begins with connecting. More than DEADLINE, for servers far away; little
# enough to leave time for another replica.
PROBE_TIMEOUT: Final = 0.75
# The pause between two probes for one read doubles up to this (seconds).
LONGEST_PAUSE: Final = 16.0
# New connections until one reaches the server, if the alias has several.
MAX_ATTEMPTS: Final = 20


class ProbeOutcome(Enum):
    """The outcome of a probe over a new connection."""

    # The server answered, possibly with an error: too many connections, for example.
    ANSWERED = "answered"
    # Nothing answered in time, or no server accepted the connection.
    UNANSWERED = "unanswered"
    # Other servers behind the alias answered.
    OTHER_SERVER = "other server"


class BlockedRead:
    """A running read, until ``end()`` is called."""

    __slots__ = (
        "answered_at",
        "check_at",
        "fileno",
        "inode",
        "limit",
        "pause",
        "session",
        "state",
        "was_given_up",
    )

    def __init__(self, state: ConnectionState, fileno: int, session: int | None = None) -> None:
        self.state, self.fileno, self.session = state, fileno, session
        # The descriptor may be closed, and reused, before end() is called.
        self.inode = os.fstat(fileno).st_ino
        # When it began, or when its server last answered a probe (monotonic time).
        self.answered_at = time.monotonic()
        self.check_at = self.answered_at + FIRST_CHECK_AFTER
        self.pause = NEXT_CHECK_AFTER
        # Seconds for the probe.
        self.limit = min(PROBE_TIMEOUT, max(read_budget.left - FIRST_CHECK_AFTER, WAIT_INTERVAL))
        self.was_given_up = False

    @property
    def target(self) -> object:
        """What a probe is for: the server; the endpoint, or one of its several, if unknown."""
        if self.state.may_be_any_server:
            return self
        return self.state.server or self.state.endpoint

    def end(self) -> None:
        """Stop tracking the read."""
        _tracker.remove(self)
        if self.was_given_up:
            read_budget.spend(time.monotonic() - self.answered_at)

    def error(self) -> Exception:
        """Return the error of a read that was given up."""
        if self.limit < DEADLINE:
            # Too little time for a verdict on the server.
            return BudgetExhausted(f"{self.state.alias} did not answer in time")
        return ServerUnresponsive(f"{self.state.alias} does not answer")

    def give_up(self) -> None:
        """Shut down the socket."""
        self.was_given_up = True
        with contextlib.suppress(OSError):
            descriptor = os.dup(self.fileno)
            if os.fstat(descriptor).st_ino != self.inode:
                os.close(descriptor)
                return
            with socket.socket(fileno=descriptor) as own:
                own.shutdown(socket.SHUT_RDWR)


class _ReadTracker:
    """The thread that tracks reads. The first read starts it; it sleeps if there are none."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._reads: set[BlockedRead] = set()
        self._is_running = self._is_asleep = self._has_begun = False
        # Servers, or endpoints, whose probe is running.
        self._probed: set[object] = set()

    def add(self, read: BlockedRead) -> None:
        """Track a read. Raise RuntimeError if the thread cannot be started."""
        with self._condition:
            if not self._is_running:
                _thread.start_new_thread(self._run, ())
                self._is_running = True
            self._reads.add(read)
            self._has_begun = True
            if self._is_asleep:
                self._is_asleep = False
                self._condition.notify()

    def remove(self, read: BlockedRead) -> None:
        with self._condition:
            self._reads.discard(read)

    def _run(self) -> None:
        while True:
            with self._condition:
                # A busy process is not notified of each read.
                self._is_asleep = not self._reads and not self._has_begun
                self._has_begun = False
                self._condition.wait(None if self._is_asleep else WAIT_INTERVAL)
                self._is_asleep = False
                now = time.monotonic()
                due = {read.target: read for read in self._reads if read.check_at <= now}
                due = {target: read for target, read in due.items() if target not in self._probed}
                self._probed.update(due)
            for target, read in due.items():
                try:
                    _thread.start_new_thread(self._check, (target, read))
                except RuntimeError:
                    # No more threads can be started for now.
                    with self._condition:
                        self._probed.discard(target)

    def _check(self, target: object, first: BlockedRead) -> None:
        state, seconds = first.state, first.limit
        began, outcome = time.monotonic(), ProbeOutcome.ANSWERED
        try:
            outcome = probe_afresh(state, seconds, first.session)
            if outcome is ProbeOutcome.UNANSWERED and state.last_answer > began:
                # Others are answered: the connections of a pooler, for example, are all in use.
                outcome = ProbeOutcome.ANSWERED
            if outcome is ProbeOutcome.UNANSWERED and seconds >= DEADLINE:
                mark_unresponsive(state)
        except Exception:
            # Raised by a receiver of connection_created, for example.
            logger.exception("Could not probe the server of a slow read of %s.", state.alias)
        is_unanswered = outcome is not ProbeOutcome.ANSWERED
        with self._condition:
            self._probed.discard(target)
            for read in self._reads:
                if read.target is not target or read.answered_at > began:
                    continue
                if not is_unanswered:
                    read.answered_at, read.check_at = began, began + read.pause
                    read.pause = min(2 * read.pause, LONGEST_PAUSE)
                elif read.limit <= seconds:
                    read.give_up()


class _OtherServer(Exception):
    """Another server behind the alias answered."""


def probe_afresh(
    state: ConnectionState, seconds: float, session: int | None = None
) -> ProbeOutcome:
    """
    Probe the server of a connection over a new one, within ``seconds``. ``session``: the ID of the
    connection's own, by which a server is recognised that has not been identified.

    A load balancer may connect to another server: try again to reach the same one.
    """
    attempt = partial(_attempt, state, session)
    attempts = itertools.repeat(attempt, MAX_ATTEMPTS)
    try:
        return first_result(
            attempts, seconds=seconds, interval=ATTEMPT_INTERVAL, retry=_OtherServer
        )
    except _OtherServer:
        return ProbeOutcome.OTHER_SERVER
    except TimeoutError:
        return ProbeOutcome.UNANSWERED


def _attempt(state: ConnectionState, session: int | None) -> ProbeOutcome:
    with contextlib.closing(dedicated_connection(state.alias)) as fresh, without_failover():
        try:
            result = probe(fresh, is_trial=True)
            if result is not None and state.server is not None:
                is_same = result.server is state.server
            else:
                is_same = _runs_session(fresh, session)
        except (ConnectTimeout, ServerUnresponsive):
            return ProbeOutcome.UNANSWERED
        except CONNECTION_ERRORS as error:
            dialect = dialect_for(fresh)
            is_from_server = dialect is not None and dialect.is_from_server(error)
            return ProbeOutcome.ANSWERED if is_from_server else ProbeOutcome.UNANSWERED
    if not is_same:
        raise _OtherServer
    return ProbeOutcome.ANSWERED


def _runs_session(fresh: BaseDatabaseWrapper, session: int | None) -> bool:
    """Return whether a server runs a session, or a pooler hides that."""
    dialect = dialect_for(fresh)
    search = "" if dialect is None or session is None else dialect.session_search(session)
    if not search:
        fetch(fresh, "SELECT 1")
        return True
    own, is_running = fetch(fresh, search)
    is_pooler = int(own) != driver_session(fresh.connection)
    # A value that was fetched without a cursor is text.
    return is_pooler or is_running in (True, "t")


_tracker = _ReadTracker()


def track_read(raw: Any, state: ConnectionState) -> BlockedRead | None:
    """
    Track a read that begins on this driver connection; None if the driver does not block, or its
    connections have no ``fileno()``.
    """
    if state.waits_are_watched:
        return None
    try:
        read = BlockedRead(state, driver_connection(raw).fileno(), driver_session(raw))
        _tracker.add(read)
    except Exception:
        # It is closed, for which the read itself raises the driver's error; or no thread can be
        # started.
        return None
    return read


def _reset_after_fork() -> None:
    global _tracker
    _tracker = _ReadTracker()


os.register_at_fork(after_in_child=_reset_after_fork)
