"""Locks that a forked process can use, whichever thread of the parent held them."""

from __future__ import annotations

import os
import threading
from weakref import WeakSet


class ForkSafeLock:
    """
    A lock that is unlocked in a child process.

    Only the thread that calls ``os.fork`` exists in the child, so a lock that another thread of
    the parent held at that moment would never be released there.
    """

    __slots__ = ("__weakref__", "_held", "_lock")

    def __init__(self) -> None:
        self._lock = self._held = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        lock = self._lock
        lock.acquire()
        # Only the holder gets here. Its block must release this lock, even if the block forks.
        self._held = lock

    def __exit__(self, *exc_info: object) -> None:
        self._held.release()

    def locked(self) -> bool:
        return self._lock.locked()


_locks: WeakSet[ForkSafeLock] = WeakSet()


def _replace_locks() -> None:
    for lock in list(_locks):
        lock._lock = threading.Lock()


os.register_at_fork(after_in_child=_replace_locks)
