"""
Detection of unresponsive servers. A stopped process still accepts TCP connections, so only a
timeout reveals it.

A probe has a deadline. A read of the site has none, since a slow query is not a fault. If a replica
has not answered a read for a moment, its monitor searches for the session on the connection that it
has. After a while longer, a fresh connection checks whether the server still runs the session. If
the server does not answer, no longer runs the session, or makes it wait for a lock that WAL replay
holds, the read fails with an error that lets it fail over; otherwise it goes on.

psycopg 3 allows its waits to be watched: ``Connection.wait`` resumes its generator every 0.1 s. For
other drivers a thread shuts down the socket of an unanswered probe or read (see blocked_reads.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from typing import Any, Final

from django.db import OperationalError

from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault
from pinning_middleware.servers import watchdog
from pinning_middleware.servers.budget import BudgetExhausted, read_budget
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.registry import SlowSession, registry
from pinning_middleware.servers.session_check import SessionStatus, check_session

# Maximum seconds for a probe.
DEADLINE: Final = 0.5
# Seconds without an answer until a fresh connection checks a read's session; the second applies
# after a check that found it.
FIRST_CHECK_AFTER, NEXT_CHECK_AFTER = 0.3, 1.0
# Seconds after which psycopg resumes a generator that waits.
WAIT_INTERVAL: Final = 0.1
# Maximum seconds that a read waits for a lock that WAL replay holds if another server may serve it.
LOCK_TIMEOUT: Final = 0.8
# Maximum seconds to wait until a statement is cancelled that is given up.
CANCEL_TIMEOUT: Final = 0.1


class ServerUnresponsive(OperationalError):
    """
    A server did not answer in time. ``ended_modified_session``: the connection was closed, and its
    session had what the code had set.
    """

    ended_modified_session = False


class ServerGone(OperationalError):
    """
    The server process went away without closing the connection; another may have taken its address.
    """

    # Classified as a lost connection.
    sqlstate = "08006"


class ReplayWaits(OperationalError):
    """A read on a standby waited too long for a lock that recovery holds or waits for."""


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
    raw = driver_connection(raw)
    if hasattr(getattr(raw, "wait", None), "pinning_original"):
        raw.pinning_watched = state
        state.waits_are_watched = True


def driver_connection(raw: Any) -> Any:
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
    watch: _SlowRead | None = None
    try:
        wanted = next(generator)
        was_unresponsive = _is_marked_unresponsive(state)
        while True:
            ready = yield wanted
            if ready:
                if watch is not None:
                    watch.end()
                    watch = None
            elif state.deadline is not None:
                if time.monotonic() >= state.deadline:
                    raise ServerUnresponsive(f"{state.alias} did not answer within {DEADLINE} s")
            elif state.may_fail_over:
                watch = watch or _SlowRead(raw, state, was_unresponsive)
                watch.check()
            wanted = generator.send(ready)
    except StopIteration as stop:
        return stop.value
    finally:
        if watch is not None:
            watch.end()


class _SlowRead:
    """A read that its server has not answered yet, from the first tenth of a second on."""

    def __init__(self, raw: Any, state: ConnectionState, was_unresponsive: bool) -> None:
        self.raw, self.state = raw, state
        self.was_unresponsive = was_unresponsive
        started = state.server.identity.started if state.server is not None else ""
        self.session = SlowSession(raw.info.backend_pid, started)
        # Since when there has been no answer, and when the session was last found on its server.
        self.since = self.last_seen = time.monotonic() - WAIT_INTERVAL
        # After another server did not answer, less time is left for this one.
        self.check_after = min(FIRST_CHECK_AFTER, max(read_budget.left - DEADLINE, WAIT_INTERVAL))
        if not state.may_be_any_server:
            state.endpoint.slow_sessions.add(self.session)
            registry.request_work(state.endpoint)

    def end(self) -> None:
        """Stop the monitor's search."""
        self.state.endpoint.slow_sessions.discard(self.session)

    def check(self) -> None:
        """
        Raise ServerUnresponsive, ServerGone, ReplayWaits or BudgetExhausted if the read must be
        given up.
        """
        state, now = self.state, time.monotonic()
        # The server may have recovered: a read that began after it was marked is not interrupted.
        is_unresponsive = _is_marked_unresponsive(state)
        if is_unresponsive and not self.was_unresponsive:
            self._give_up(ServerUnresponsive(f"{state.alias} does not answer"))
        self.was_unresponsive = is_unresponsive
        if self.session.seen_at > self.last_seen:
            self._found(self.session.seen_at, self.session.waits_for_lock)
        if now - self.last_seen >= self.check_after:
            self._check_on_new_connection()

    def _check_on_new_connection(self) -> None:
        left = read_budget.left - (time.monotonic() - self.last_seen)
        seconds = min(DEADLINE, max(left, WAIT_INTERVAL))
        began = time.monotonic()
        status = check_session(self.raw, self.state, self.since, seconds)
        if status is SessionStatus.GONE:
            self._give_up(ServerGone(f"{self.state.alias} no longer runs this session"))
        if status is SessionStatus.READS_ANSWERED:
            self._found(began, waits_for_lock=False)
            self.check_after = FIRST_CHECK_AFTER
        elif status is not SessionStatus.UNANSWERED:
            self._found(began, status is SessionStatus.WAITS_FOR_LOCK)
        elif self.session.seen_at > began:
            # New connections are not accepted, but the session runs.
            self._found(self.session.seen_at, self.session.waits_for_lock)
        elif seconds < DEADLINE:
            self._give_up(BudgetExhausted(f"{self.state.alias} did not answer in time"))
        else:
            info = self.raw.info
            mark_unresponsive(self.state, (info.host, str(info.port)))
            self._give_up(ServerUnresponsive(f"{self.state.alias} does not answer"))

    def _found(self, seen_at: float, waits_for_lock: bool) -> None:
        """
        Record that the server ran the session at some time, so that it executes the read. Raise
        ReplayWaits if it waits for a lock too long.
        """
        self.last_seen, self.check_after = seen_at, NEXT_CHECK_AFTER
        self.state.waits_for_lock = waits_for_lock
        may_leave = self.state.may_leave
        if not waits_for_lock or may_leave is None or not may_leave():
            return
        left = min(LOCK_TIMEOUT, read_budget.left) - (seen_at - self.since)
        if left > 0:
            self.check_after = left
            return
        # The server would go on waiting for the lock.
        _cancel(self.raw)
        self.last_seen = self.since
        self._give_up(ReplayWaits(f"{self.state.alias} waits for a lock that WAL replay holds"))

    def _give_up(self, error: Exception) -> None:
        # Only the wait since the session was last found counts.
        read_budget.spend(time.monotonic() - self.last_seen)
        raise error


def _cancel(raw: Any) -> None:
    """
    Cancel the statement that a psycopg connection runs. Bounded with libpq 17 and later; earlier
    ones wait for the server, and psycopg 3.1 has no other method.

    https://www.psycopg.org/psycopg3/docs/api/connections.html#psycopg.Connection.cancel_safe
    """
    cancel_safe = getattr(raw, "cancel_safe", None)
    with contextlib.suppress(Exception):
        raw.cancel() if cancel_safe is None else cancel_safe(timeout=CANCEL_TIMEOUT)


def _is_marked_unresponsive(state: ConnectionState) -> bool:
    server = state.server
    return state.endpoint.out_of_rotation == Fault.UNRESPONSIVE or (
        server is not None and server.out_of_rotation == Fault.UNRESPONSIVE
    )


def mark_unresponsive(state: ConnectionState, host: tuple[str, str] | None = None) -> None:
    """
    Take the server out of rotation; the endpoint if the server is unknown; or, if that is one of
    several, have new connections avoid its ``host``, a pair of HOST and PORT.
    """
    error = "the server does not answer"
    if state.server is not None:
        registry.set_status(state.server, Fault.UNRESPONSIVE, conf.retry_after, error)
    elif state.may_be_any_server:
        state.endpoint.hung_at = time.monotonic()
        if host is not None:
            state.endpoint.unresponsive_hosts.add(host)
            registry.request_work(state.endpoint)
    else:
        registry.mark_down(state.endpoint, Fault.UNRESPONSIVE, conf.retry_after, error)


@contextlib.contextmanager
def probe_deadline(raw: Any, state: ConnectionState) -> Iterator[None]:
    """
    Bound the block, which probes by this driver connection, to DEADLINE seconds.

    Raise ServerUnresponsive after that. The connection must then be closed.
    """
    state.deadline = until = time.monotonic() + DEADLINE
    guard = None
    try:
        guard = None if state.waits_are_watched else watchdog.guard(raw, until)
        yield
    finally:
        state.deadline = None
        # The answer may have come while the socket was being shut down.
        if guard is not None and guard.end():
            raise ServerUnresponsive(f"{state.alias} did not answer within {DEADLINE} s")
