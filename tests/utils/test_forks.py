"""ForkSafeLock: a child process can use a lock that was held in its parent."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable

from pinning_middleware.utils import forks
from pinning_middleware.utils.forks import ForkSafeLock


def result_in_child(function: Callable[[], bool]) -> bool:
    """Return what a function returns in a forked process."""
    child = os.fork()
    if not child:
        status = 2
        try:
            status = not function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def can_be_acquired(lock: ForkSafeLock) -> bool:
    with lock:
        return lock.locked()


def test_lock_is_held_inside_the_block_only() -> None:
    lock = ForkSafeLock()
    assert not lock.locked()
    with lock:
        assert lock.locked()
    assert not lock.locked()


def test_lock_excludes_other_threads() -> None:
    lock, entered = ForkSafeLock(), threading.Event()

    def enter() -> None:
        with lock:
            entered.set()

    with lock:
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    thread.join(5)
    assert entered.is_set()


def test_lock_held_by_another_thread_at_the_fork_is_free_in_the_child() -> None:
    lock, is_held, release = ForkSafeLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(5)
    try:
        assert result_in_child(lambda: can_be_acquired(lock))
        assert lock.locked()
    finally:
        release.set()
        thread.join(5)


def test_block_that_forks_can_be_left_in_both_processes() -> None:
    lock = ForkSafeLock()
    with lock:
        child = os.fork()
    if not child:
        os._exit(lock.locked())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not lock.locked()


def test_lock_without_references_is_freed() -> None:
    lock = ForkSafeLock()
    reference = weakref.ref(lock)
    assert lock in forks._locks
    del lock
    gc.collect()
    assert reference() is None
