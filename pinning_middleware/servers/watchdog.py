"""
Deadlines of probes, and of setting up a connection, for drivers whose waits cannot be watched: a
thread shuts down the socket.
"""

from __future__ import annotations

import _thread
import contextlib
import heapq
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar


class Guard:
    """A deadline, until ``end()`` is called."""

    __slots__ = ("_lock", "has_shut_down", "is_over", "socket")

    def __init__(self, fileno: int) -> None:
        self.socket = socket.socket(fileno=os.dup(fileno))
        self._lock = threading.Lock()
        self.is_over = self.has_shut_down = False

    def end(self) -> bool:
        """End the deadline. Return whether the socket was shut down, and so is unusable."""
        with self._lock:
            self.is_over = True
            return self.has_shut_down

    def expire(self) -> None:
        """Shut down the socket, unless the guard has ended."""
        with self._lock:
            if not self.is_over:
                self.has_shut_down = True
                self.socket.shutdown(socket.SHUT_RDWR)


class _Watchdog:
    """A lazily started thread that shuts down the sockets of those that miss their deadline."""

    _order: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._guards: list[tuple[float, int, Guard]] = []
        self._is_running = False

    def guard(self, raw: Any, until: float) -> Guard | None:
        # PyMySQL has only its socket.
        fileno = getattr(raw, "fileno", None) or getattr(
            getattr(raw, "_sock", None), "fileno", None
        )
        if fileno is None:
            return None
        try:
            guard = Guard(fileno())
        except Exception:
            # It is closed, for which drivers raise errors of their own, or no descriptors are left.
            return None
        with self._condition:
            if not self._is_running:
                try:
                    _thread.start_new_thread(self._run, ())
                except RuntimeError:
                    guard.socket.close()
                    return None
                self._is_running = True
            heapq.heappush(self._guards, (until, next(self._order), guard))
        return guard

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._guards:
                    self._is_running = False
                    return
                until, _, guard = self._guards[0]
                left = until - time.monotonic()
                if left > 0 and not guard.is_over:
                    self._condition.wait(min(left, 0.1))
                    continue
                heapq.heappop(self._guards)
            with contextlib.suppress(OSError):
                guard.expire()
            guard.socket.close()


_watchdog = _Watchdog()


def guard(raw: Any, until: float) -> Guard | None:
    """
    Shut down the socket of a driver's connection at ``until`` (monotonic time), unless the guard
    that is returned has ended by then. Return None if the driver does not name its socket, or no
    thread can be started.
    """
    return _watchdog.guard(raw, until)


def _reset_after_fork() -> None:
    global _watchdog
    _watchdog = _Watchdog()


os.register_at_fork(after_in_child=_reset_after_fork)
