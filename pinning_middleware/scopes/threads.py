"""
Threads that begin with a copy of the context of the thread that starts them: the default of
free-threaded builds of Python 3.14 and later.

A thread of a pool may outlive the request that started it, and run work of others. So no thread
inherits a scope or an override, as on other builds; ``propagate_scope`` is for that.

https://docs.python.org/3/using/cmdline.html#cmdoption-X
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, Final, TypeVar

T = TypeVar("T")

INHERIT_CONTEXT: Final = bool(getattr(sys.flags, "thread_inherit_context", False))

_variables: list[ContextVar[Any]] = []
_marker: ContextVar[object] = ContextVar("pinning_thread_marker", default=None)


class _Thread(threading.local):
    is_clear = False


_thread = _Thread()


def not_inherited(variable: ContextVar[Any]) -> None:
    """Let a variable be cleared in a thread that has inherited it."""
    _variables.append(variable)


def getter(variable: ContextVar[T]) -> Callable[[], T]:
    """Return the function that reads a variable which threads do not inherit."""
    not_inherited(variable)
    return clearing(variable.get) if INHERIT_CONTEXT else variable.get


def clearing(get: Callable[[], T]) -> Callable[[], T]:
    """Return a function that clears what this thread has inherited, and then calls another one."""

    def clear_and_get() -> T:
        _clear_inherited()
        return get()

    return clear_and_get


def _clear_inherited() -> None:
    """Clear what this thread has inherited, when it is first called in the thread's own context."""
    if _thread.is_clear:
        return
    # None in the main thread, and in one that Python did not start.
    own: Context | None = getattr(threading.current_thread(), "_context", None)
    # sync_to_async() and asyncio.to_thread() run functions in another context, which belongs to
    # the caller.
    if own is None or _is_current(own):
        if own is not None:
            for variable in _variables:
                variable.set(None)
        _thread.is_clear = True


def _is_current(context: Context) -> bool:
    marker = object()
    token = _marker.set(marker)
    try:
        return context.get(_marker) is marker
    finally:
        _marker.reset(token)
